"""The whole merge stage: ``fastmerge.merge`` against the same stage of the naive dense network, and how good the students are.

Timed is what lies between two trained teachers and the end of the stage; of fastmerge, compression too. Rounds differ in the
order of the batches and in the gates that are drawn, which a seed fixes for all contenders. What becomes of each student is
found out between the timed stages, see ``MergeTask``. In the JSON, by contender:

* ``step_seconds``: seconds of a step in each epoch, medians over its steps and then over the rounds;
* ``fixed_seconds``: of each round, what the stage took beside such steps: checks, analysis, building, capturing, compression,
  statistics of BatchNorm;
* ``stage_seconds``: of each round, what a stage of the paper's length would take with such steps, the same parts of it linked;
* ``accuracies``: of each round's student, after its fine-tuning;
* ``dropped``: of each round, the share of channels that early compaction dropped.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import names
from benchmarks.cases import Case, parameters
from benchmarks.effort import Effort
from benchmarks.learnable import TimedBatches
from benchmarks.merge_task import MergeTask
from benchmarks.race import Contender, race

ROUNDS = 5
# Steps of the paper's merge stages: epochs of ImageNet, CIFAR and Imagewoof, in batches of the recipes.
PAPER = {"resnet18": 20 * 5004, "resnet20": 150 * 390, "lenet": 1000 * 282}
TASKS = {
    task.case: task
    for task in (
        MergeTask(Case("resnet18", 256, 224, "bf16", "cuda"), 4, 15, teacher_epochs=4, finetune_epochs=2),
        MergeTask(Case("resnet20", 128, 32, "bf16", "cuda"), 6, 25, teacher_epochs=5, finetune_epochs=3),
        MergeTask(Case("resnet20", 32, 16), 6, 7, teacher_epochs=8, finetune_epochs=5, test=500),
        MergeTask(Case("lenet", 128, 28), 5, 9, teacher_epochs=15, finetune_epochs=3),
    )
}
OPTIONS: dict[str, dict[str, Any]] = {
    names.MERGE_LINKED_LATE: {"link_at": 0.5},
    names.MERGE_COMPACTED: {"link_at": 0.5, "compact_at": 0.0},
    names.MERGE: {"link_at": 0.0},
}


def options_of(case: Case) -> dict[str, dict[str, Any] | None]:
    """Of ``fastmerge.merge``, by contender; None is the naive network.

    Stages on a CPU are so short that no gate closes for good: what early compaction is worth there, ``bench_compact`` says.
    """
    left_out = () if case.device == "cuda" else (names.MERGE_COMPACTED,)
    return {names.NAIVE: None, **{name: options for name, options in OPTIONS.items() if name not in left_out}}


class Stages:
    """One contender's stages, each with a seed of its own: their number.

    Args:
        task: what is trained.
        options: of ``fastmerge.merge``; None for the naive network.

    Attributes:
        loaders: of the stages so far, with the seconds of their epochs.
        accuracies: of the students of all stages but the last, until :meth:`settle`.
        dropped: the share of channels that left early, by stage.
    """

    def __init__(self, task: MergeTask, options: dict[str, Any] | None) -> None:
        self.task, self.options = task, options
        self.loaders: list[TimedBatches] = []
        self.accuracies: list[float] = []
        self.dropped: list[float] = []
        self._result: Any = None

    def run(self) -> None:
        """The next stage; returns when the device is done."""
        seed = len(self.loaders)
        torch.manual_seed(seed)
        batches = self.task.batches(seed)
        if self.options is None:
            self._result, dropped = self.task.naive(batches), 0.0
        else:
            self._result, dropped = self.task.merged(batches, **self.options)
        self.dropped.append(dropped)
        self.loaders.append(batches)

    def settle(self) -> None:
        """Finds out how good the last stage's student is, unless it is known."""
        if self._result is None:
            return
        student = self.task.student_of(self._result) if self.options is None else self._result
        self._result = None
        self.accuracies.append(self.task.accuracy(student, len(self.accuracies)))

    def facts(self, samples: list[float]) -> dict[str, Any]:
        """What is known of the stages that the samples are of, the last ones.

        Args:
            samples: the stages' seconds.
        """
        skipped = len(self.loaders) - len(samples)
        # A pass after the epochs estimates BatchNorm's statistics anew.
        passes = [loader.seconds[: self.task.epochs] for loader in self.loaders[skipped:]]
        fixed = [whole - self.task.steps * sum(steps) for whole, steps in zip(samples, passes, strict=True)]
        length = PAPER[self.task.case.network]
        return {
            "step_seconds": [statistics.median(steps) for steps in zip(*passes, strict=True)],
            "fixed_seconds": fixed,
            "stage_seconds": [f + length * statistics.mean(steps) for f, steps in zip(fixed, passes, strict=True)],
            "accuracies": self.accuracies[skipped:],
            "dropped": self.dropped[skipped:],
        }


@pytest.mark.parametrize("case", parameters(list(TASKS)))
def bench_merge(benchmark: BenchmarkFixture, case: Case, effort: Effort) -> None:
    task = TASKS[case]
    benchmark.group = benchmark.extra_info["case"] = f"merge, {case.name}"
    steps = task.epochs * task.steps
    facts = {"items": steps * case.batch, "epochs": task.epochs, "steps": steps}
    stages = {name: Stages(task, options) for name, options in options_of(case).items()}

    def maker(own: Stages) -> Callable[[], Contender]:
        def make() -> Contender:
            assert task.teachers  # trained before anything is timed
            return Contender(own.run, facts, check=own.settle, before=own.settle, more=own.facts)

        return make

    makers = {name: maker(own) for name, own in stages.items()}
    race(benchmark, makers, effort, case.device, rounds=effort.asked or ROUNDS, warmup=0, alone=1, profile=False)

"""The whole merge stage, at a fixed number of steps: ``fastmerge.merge`` against the same stage of the naive dense network.

Both build the wide network and train it and its gates for the same steps on the same batches; fastmerge also compresses it. No
accuracy is compared here: the batches are random, and so few steps leave the gates where they are. For ``compact_at`` they are
therefore closed by hand at the end of each epoch, as many as would have closed by then if equally many did in each epoch and
1/T of them stayed open. ``step_seconds`` of a contender are its seconds per step in each epoch, what happens between epochs
left out: medians over the rounds.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

import fastmerge
from benchmarks import names
from benchmarks.baselines.naive_dense import naive_dense
from benchmarks.bench_compact import close_gates
from benchmarks.cases import Case, parameters
from benchmarks.effort import Effort
from benchmarks.race import Contender, race
from benchmarks.steps import Step
from fastmerge.merging import stages

# Epochs and batches of each epoch, by case.
STAGES = {
    Case("resnet18", 256, 224, "bf16", "cuda"): (4, 25),
    Case("resnet20", 128, 32, "bf16", "cuda"): (4, 100),
    Case("resnet20", 32, 32): (4, 2),
    Case("lenet", 128, 28): (4, 5),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "merge, link_at=0.25": {"link_at": 0.25},
    "merge, link_at=1": {"link_at": 1.0},
    names.MERGE_COMPACTED: {"compact_at": 0.0},
    "merge, link_at=0.25, compact_at=0": {"link_at": 0.25, "compact_at": 0.0},
    names.MERGE: {},
}


class TimedBatches:
    """One batch again and again, as a loader that times the passes over it.

    Attributes:
        seconds: per step, of each whole pass so far; the device's work included, which is waited for before and after a pass.
    """

    def __init__(self, batch: tuple[Tensor, Tensor], count: int) -> None:
        self.batch, self.count = batch, count
        self.seconds: list[float] = []

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        start = self._now()
        for _ in range(self.count):
            yield self.batch
        self.seconds.append((self._now() - start) / self.count)

    def _now(self) -> float:
        if self.batch[0].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


class ClosingBigStudent(fastmerge.BigStudent):
    """Has closed gates whenever it is compacted, more each time.

    Attributes:
        epochs: of the stage; all but the last end with a compaction.
    """

    epochs = 1
    _done = 0

    def compact(self, *arguments: Any, **options: Any) -> Any:
        self._done += 1
        close_gates(self, (1 - 1 / self.num_teachers) * self._done / self.epochs)
        return super().compact(*arguments, **options)


def naive_stage(case: Case, epochs: int, loader: TimedBatches) -> None:
    step = Step(case, [case.place(naive_dense(case.make_teachers())).train()])
    for _ in range(epochs):
        for _ in loader:
            step()


def fastmerge_stage(case: Case, epochs: int, loader: TimedBatches, **options: Any) -> None:
    def closing(*teachers: nn.Module, **arguments: Any) -> ClosingBigStudent:
        big = ClosingBigStudent(*teachers, **arguments)
        big.epochs = epochs
        return big

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few steps leave the gates where they are
        patch.setattr(stages, "BigStudent", closing)
        fastmerge.merge(
            case.make_teachers(),
            loader,
            merge_epochs=epochs,
            finetune_epochs=0,
            lr=1e-3,
            autocast=None if case.precision == "fp32" else case.dtype,
            channels_last=True,
            progress=False,
            **options,
        )


@pytest.mark.parametrize("case", parameters(list(STAGES)))
def bench_merge(benchmark: BenchmarkFixture, case: Case, effort: Effort) -> None:
    benchmark.group = benchmark.extra_info["case"] = f"merge, {case.name}"
    epochs, batches = STAGES[case]
    facts = {"items": epochs * batches * case.batch, "epochs": epochs, "steps": epochs * batches}
    loaders = {name: TimedBatches(case.make_batch(), batches) for name in (names.NAIVE, *OPTIONS)}

    def maker(stage: Callable[[], None]) -> Callable[[], Contender]:
        return lambda: Contender(stage, facts)

    makers = {names.NAIVE: maker(lambda: naive_stage(case, epochs, loaders[names.NAIVE]))}
    for name, options in OPTIONS.items():
        loader = loaders[name]
        makers[name] = maker(lambda loader=loader, options=options: fastmerge_stage(case, epochs, loader, **options))
    try:
        race(benchmark, effort.chosen(makers), 5, warmup=1, seconds=effort.seconds)
    finally:  # an interrupted race keeps its samples
        for name, contender in benchmark.extra_info.get("contenders", {}).items():
            if contender.get("samples"):
                contender["step_seconds"] = by_epoch(loaders[name].seconds, epochs, len(contender["samples"]))


def by_epoch(seconds: list[float], epochs: int, rounds: int) -> list[float]:
    """The median over the last rounds of each epoch's seconds; a round that was interrupted is none."""
    timed = seconds[: len(seconds) // epochs * epochs][-epochs * rounds :]
    return [statistics.median(timed[epoch::epochs]) for epoch in range(epochs)]

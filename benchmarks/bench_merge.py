"""The whole merge stage, at a fixed number of steps: ``fastmerge.merge`` against the same stage of the naive dense network.

Both build the wide network and train it and its gates for the same steps on the same batches; fastmerge also compresses it. No
accuracy is compared here: the batches are random.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import fastmerge
from benchmarks import names
from benchmarks.baselines.naive_dense import naive_dense
from benchmarks.cases import Case, parameters
from benchmarks.effort import Effort
from benchmarks.race import Contender, race
from benchmarks.steps import Step

# Epochs and batches of each epoch, by case.
STAGES = {
    Case("resnet18", 256, 224, "bf16", "cuda"): (4, 25),
    Case("resnet20", 128, 32, "bf16", "cuda"): (4, 100),
    Case("resnet20", 32, 32): (4, 1),
    Case("lenet", 128, 28): (4, 5),
}


def naive_stage(case: Case, steps: int) -> None:
    step = Step(case, [case.place(naive_dense(case.make_teachers())).train()])
    for _ in range(steps):
        step()


def fastmerge_stage(case: Case, epochs: int, loader: list[tuple[Tensor, Tensor]], **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few steps leave the gates where they are
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
    loader = [case.make_batch()] * batches
    facts = {"items": epochs * batches * case.batch, "epochs": epochs, "steps": epochs * batches}

    def maker(stage: Callable[[], None]) -> Callable[[], Contender]:
        return lambda: Contender(stage, facts)

    options: dict[str, dict[str, Any]] = {
        **{f"merge, link_at={link_at:g}": {"link_at": link_at} for link_at in (0.0, 0.25, 1.0)},
        names.MERGE: {},
    }
    makers = {
        names.NAIVE: maker(lambda: naive_stage(case, epochs * batches)),
        **{
            n: maker(lambda chosen=chosen: fastmerge_stage(case, epochs, loader, **chosen))
            for n, chosen in options.items()
        },
    }
    race(benchmark, effort.chosen(makers), 5, warmup=1, seconds=effort.seconds)

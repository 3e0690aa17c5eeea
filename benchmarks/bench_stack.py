"""Twenty merges of the digits' LeNet as one stack: from labels alone, and with what the teachers say in the fine-tuning.

Stages are a third as long as the recipe's, so that what is done once in a merge, such as asking the teachers, weighs more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import count

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import names
from benchmarks.effort import Effort
from benchmarks.race import Contender, race
from fastmerge.experiments.column import Column
from fastmerge.experiments.lab import Lab
from fastmerge.experiments.place import Place
from fastmerge.experiments.recipes import digits
from fastmerge.merging.options import Plan
from fastmerge.methods.distill import DISTILL

REPLICATES, ROUNDS = 20, 5


@cache
def teachers() -> tuple[Lab, list[Column]]:
    """Two of each replicate, which have begun to learn."""
    place = Place(recipe=digits().scaled(1 / 3), data=None, device=torch.device("cpu"), seed=0).opened_here()
    lab = Lab(place, range(REPLICATES), "stack")
    return lab, [lab.train(lab.fresh(number), Plan(epochs=2, lr=0.02), "teacher", number) for number in range(2)]


def bench_stack(benchmark: BenchmarkFixture, effort: Effort) -> None:
    benchmark.group = benchmark.extra_info["case"] = f"merges in a stack, {REPLICATES} of digits cpu"

    def maker(distill: float) -> Callable[[], Contender]:
        numbers = count()

        def make() -> Contender:
            lab, columns = teachers()
            return Contender(
                lambda: lab.merge(columns, names.MERGE, next(numbers), distill=distill), {"items": REPLICATES}
            )

        return make

    makers = {names.FROM_LABELS: maker(0.0), names.DISTILLED: maker(DISTILL)}
    race(benchmark, makers, effort, "cpu", rounds=effort.asked or ROUNDS, warmup=0, alone=1)

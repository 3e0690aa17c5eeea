"""Training steps before and after early compaction: linked and unlinked, with a quarter or half of the candidates closed.

Before linking all teachers keep as many as the one with the most open, so that less is dropped than is closed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import fastmerge
from benchmarks.cases import Case, parameters
from benchmarks.contenders import big
from benchmarks.effort import Effort
from benchmarks.race import Contender, race
from benchmarks.steps import Step

CASES = [
    Case("resnet18", 256, 224, "bf16", "cuda"),
    Case("resnet20", 512, 32, "bf16", "cuda"),
    Case("resnet20", 128, 32),
]
OPEN, CLOSED = 3.0, -40.0


@torch.no_grad()
def close_gates(network: fastmerge.BigStudent, share: float) -> None:
    """Closes gates for good, chosen at random: in all, the dropped ones among them, a share of each group's candidates."""
    generator = torch.Generator().manual_seed(0)
    for group in network.groups:
        gate: Any = network.gates[group.name]
        count, candidates = len(gate.loc), network.num_teachers * group.size
        loc = torch.full((count,), OPEN)
        loc[torch.randperm(count, generator=generator)[: max(0, count - candidates + int(share * candidates))]] = CLOSED
        gate.loc.copy_(loc)


@pytest.mark.parametrize("linked", [True, False], ids=["linked", "unlinked"])
@pytest.mark.parametrize("share", [0.25, 0.5])
@pytest.mark.parametrize("case", parameters(CASES))
def bench_compact(benchmark: BenchmarkFixture, case: Case, share: float, linked: bool, effort: Effort) -> None:
    name = f"early compaction, {'linked' if linked else 'unlinked'}, {share:.0%} closed, {case.name}"
    benchmark.group = benchmark.extra_info["case"] = name
    whole = big(case, linked)
    close_gates(whole, share)
    compacted = copy.deepcopy(whole)
    done = compacted.compact()
    benchmark.extra_info["dropped"] = done.total

    def maker(network: fastmerge.BigStudent) -> Callable[[], Contender]:
        return lambda: Contender(Step(case, [network]), {"items": case.batch})

    makers = {"whole": maker(whole), "compacted": maker(compacted)}
    race(benchmark, makers, effort, case.device)

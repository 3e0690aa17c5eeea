"""Gate sampling, forward and backward: every group by itself, all groups at once, compiled, and the fused kernel.

Groups are those of ``BigStudent(t1, t2)`` for the network named. Needs a CUDA GPU; skips without one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fastmerge.kernels.gate import sample_gates, sample_gates_reference
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.baselines.naive_dense import naive_dense
from benchmarks.cases import Case, needs_gpu
from benchmarks.effort import Effort
from benchmarks.race import Contender, race

pytestmark = needs_gpu

CASES = [
    Case("resnet18", 256, 224, device="cuda"),
    Case("resnet50", 256, 224, device="cuda"),
    Case("resnet20", 128, 32, device="cuda"),
    Case("sine", 10_000, 0, device="cuda"),
]


def group_sizes(network: str) -> list[int]:
    """Gates of each channel group of two teachers of this name."""
    gates = naive_dense(Case(network, 1, 0).make_teachers()).gates
    return [parameter.numel() for parameter in gates.parameters()]


def by_group(loc: Tensor, n: int, sizes: list[int]) -> Tensor:
    return torch.cat([sample_gates_reference(part, n) for part in loc.split(sizes)], 1)


def at_once(loc: Tensor, n: int, sizes: list[int]) -> Tensor:
    return sample_gates_reference(loc, n)


def fused(loc: Tensor, n: int, sizes: list[int]) -> Tensor:
    return sample_gates(loc, n)


SAMPLERS: dict[str, Callable[[], Callable[[Tensor, int, list[int]], Tensor]]] = {
    "eager, by group": lambda: by_group,
    "eager, at once": lambda: at_once,
    "compiled, at once": lambda: torch.compile(at_once, fullgraph=True),
    "fused": lambda: fused,
}


def contender(sampler: str, case: Case, sizes: list[int]) -> Contender:
    sample, n = SAMPLERS[sampler](), case.batch
    loc = torch.randn(sum(sizes), device="cuda", requires_grad=True)
    dz = torch.randn(n, sum(sizes), device="cuda")

    # Forward writes the gates, backward reads them and their gradient.
    facts = {"items": n, "bytes": 3 * dz.nbytes}
    return Contender(lambda: torch.autograd.grad(sample(loc, n, sizes), loc, dz), facts)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def bench_gate(benchmark: BenchmarkFixture, case: Case, effort: Effort) -> None:
    benchmark.group = benchmark.extra_info["case"] = f"gates, {case.network} batch {case.batch} cuda"
    sizes = group_sizes(case.network)
    makers = {name: (lambda name=name: contender(name, case, sizes)) for name in SAMPLERS}
    race(benchmark, makers, effort, "cuda")

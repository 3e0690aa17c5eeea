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

from benchmarks.cases import needs_gpu
from benchmarks.effort import Effort
from benchmarks.race import Contender, race

pytestmark = needs_gpu

# Samples of a batch and channels of each channel group, both teachers' together.
NETWORKS = {
    "resnet18 batch 256": (256, [128, 128, 128, 256, 256, 256, 512, 512, 512, 1024, 1024, 1024]),
    "resnet20 batch 128": (128, [32] * 4 + [64] * 4 + [128] * 4),
    "sine batch 10000": (10_000, [200]),
}


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


def contender(sampler: str, n: int, sizes: list[int]) -> Contender:
    sample = SAMPLERS[sampler]()
    loc = torch.randn(sum(sizes), device="cuda", requires_grad=True)
    dz = torch.randn(n, sum(sizes), device="cuda")

    def step() -> None:
        torch.autograd.grad(sample(loc, n, sizes), loc, dz)
        torch.cuda.synchronize()

    # Forward writes the gates, backward reads them and their gradient.
    return Contender(step, {"items": n, "bytes": 3 * dz.nbytes})


@pytest.mark.parametrize("network", NETWORKS)
def bench_gate(benchmark: BenchmarkFixture, network: str, effort: Effort) -> None:
    benchmark.group = benchmark.extra_info["case"] = f"gates, {network} cuda"
    makers = {name: (lambda name=name: contender(name, *NETWORKS[network])) for name in SAMPLERS}
    race(benchmark, effort.chosen(makers), effort.rounds("cuda"), seconds=effort.seconds)

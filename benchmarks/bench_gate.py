"""Gate sampling, forward and backward: every group by itself, all groups at once, compiled, and the fused kernel.

Groups are those of ``BigStudent(t1, t2)`` for the network named. Needs a CUDA GPU; skips without one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fastmerge.kernels.gate import sample_gates, sample_gates_reference
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

# Samples of a batch and channels of each channel group, both teachers' together.
NETWORKS = {
    "resnet18-256": (256, [128, 128, 128, 256, 256, 256, 512, 512, 512, 1024, 1024, 1024]),
    "resnet20-128": (128, [32] * 4 + [64] * 4 + [128] * 4),
    "sine-10000": (10_000, [200]),
}


def by_group(loc: Tensor, n: int, sizes: list[int]) -> Tensor:
    return torch.cat([sample_gates_reference(part, n) for part in loc.split(sizes)], 1)


def at_once(loc: Tensor, n: int, sizes: list[int]) -> Tensor:
    return sample_gates_reference(loc, n)


def fused(loc: Tensor, n: int, sizes: list[int]) -> Tensor:
    return sample_gates(loc, n)


SAMPLERS = {
    "eager-by-group": lambda: by_group,
    "eager-at-once": lambda: at_once,
    "compiled-at-once": lambda: torch.compile(at_once, fullgraph=True),
    "fused": lambda: fused,
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_gate(network: str, sampler: str, benchmark: Callable[..., None]) -> None:
    n, sizes = NETWORKS[network]
    sample = SAMPLERS[sampler]()
    loc = torch.randn(sum(sizes), device="cuda", requires_grad=True)
    dz = torch.randn(n, sum(sizes), device="cuda")

    def step() -> None:
        torch.autograd.grad(sample(loc, n, sizes), loc, dz)
        torch.cuda.synchronize()

    benchmark.group = f"gate {network}"  # type: ignore[attr-defined]
    benchmark.extra_info.update(samples=n, channels=sum(sizes), bytes=3 * dz.nbytes)  # type: ignore[attr-defined]
    for _ in range(5):
        step()
    benchmark(step)

"""How long merging takes that trains nothing: matching ResNet-50 by weights, reconstructing ResNet-18 on 512 images."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn
from torchvision import models

from benchmarks.effort import Effort
from fastmerge import methods

IMAGES, SIDE, BATCH = 512, 64, 64


def images() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Noise in batches."""
    generator = torch.Generator().manual_seed(0)
    shape, labels = (BATCH, 3, SIDE, SIDE), torch.zeros(BATCH, dtype=torch.int64)
    return [(torch.randn(shape, generator=generator), labels) for _ in range(IMAGES // BATCH)]


def rebasin(teachers: Sequence[nn.Module]) -> None:
    methods.rebasin(teachers, images()[:1], by="weights")


def reconstruct(teachers: Sequence[nn.Module]) -> None:
    methods.reconstruct(teachers, images(), samples=IMAGES)


CASES: dict[str, tuple[Callable[..., nn.Module], Callable[[Sequence[nn.Module]], None]]] = {
    "resnet50": (models.resnet50, rebasin),
    "resnet18": (models.resnet18, reconstruct),
}


@pytest.mark.parametrize("network", CASES)
def bench_methods(benchmark: BenchmarkFixture, network: str, effort: Effort) -> None:
    make, method = CASES[network]
    benchmark.extra_info["case"] = f"methods, {network} {SIDE}px cpu"
    torch.manual_seed(0)
    teachers = [make().eval() for _ in range(2)]
    samples: list[float] = []

    def run() -> None:
        start = time.perf_counter()
        method(teachers)
        samples.append(time.perf_counter() - start)

    benchmark.pedantic(run, rounds=min(3, effort.rounds("cpu")))
    benchmark.extra_info["contenders"] = {method.__name__: {"samples": samples}}

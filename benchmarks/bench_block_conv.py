"""Block-diagonal convolutions of two networks, each pass: cuDNN one after another, cuDNN's groups, and the Triton kernels.

Layers of ResNet-18 and ResNet-50 at 224 pixels and of ResNet-20 at 32, named after their channels, kernel, stride and size. The
Triton contender runs the tile that is fastest here; the time of every tile is in its facts, under ``tiles``. cuDNN's groups
read and write joined tensors, the others one tensor for each network. ``device_ms`` is a contender's time on the device alone,
with a cold L2 cache: what a step whose kernels wait in the queue pays, and what decides who wins, as in
``fastmerge.kernels.block_conv.choice``. Needs a CUDA GPU; skips without one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fastmerge.kernels.block_conv import passes
from fastmerge.kernels.block_conv.choice import SPLIT, Run, device_milliseconds, run_beside_each_other
from fastmerge.kernels.block_conv.formulas import Geometry, fetches_boxes
from fastmerge.kernels.block_conv.layouts import empty_channels_last
from fastmerge.kernels.block_conv.problem import Problem
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.convolution_tables import fastest
from benchmarks.effort import Effort
from benchmarks.race import Contender, UnavailableError, race

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

TEACHERS = 2
PASSES = ("forward", "input gradient", "weight gradient")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Layer:
    """One network's convolution: channels in and out, kernel, stride, and the side of its input, for a batch."""

    network: str
    batch: int
    channels: int
    outputs: int
    kernel: int
    stride: int
    side: int

    @property
    def name(self) -> str:
        return f"{self.network} {self.channels}-{self.outputs} k{self.kernel} s{self.stride} {self.side}px batch {self.batch}"

    @property
    def flops(self) -> int:
        """Of a pass, all teachers together: each of the three has as many."""
        products = self.channels * self.outputs * self.kernel**2
        return 2 * TEACHERS * self.batch * math.prod(self.output) * products

    @property
    def geometry(self) -> Geometry:
        padding = self.kernel // 2
        return Geometry((self.kernel, self.kernel), (self.stride, self.stride), (padding, padding))

    @property
    def output(self) -> tuple[int, int]:
        return self.geometry.output_size(self.side, self.side)


LAYERS = [
    Layer("resnet18", 256, 64, 64, 3, 1, 56),
    Layer("resnet18", 256, 128, 128, 3, 1, 28),
    Layer("resnet18", 256, 256, 256, 3, 1, 14),
    Layer("resnet18", 256, 512, 512, 3, 1, 7),
    Layer("resnet18", 256, 64, 128, 3, 2, 56),
    Layer("resnet18", 256, 128, 256, 3, 2, 28),
    Layer("resnet18", 256, 256, 512, 3, 2, 14),
    Layer("resnet18", 256, 64, 128, 1, 2, 56),
    Layer("resnet18", 256, 128, 256, 1, 2, 28),
    Layer("resnet18", 256, 256, 512, 1, 2, 14),
    Layer("resnet20", 128, 16, 16, 3, 1, 32),
    Layer("resnet20", 128, 32, 32, 3, 1, 16),
    Layer("resnet20", 128, 64, 64, 3, 1, 8),
    Layer("resnet20", 128, 16, 32, 3, 2, 32),
    Layer("resnet20", 128, 32, 64, 3, 2, 16),
    Layer("resnet50", 256, 128, 128, 3, 2, 56),
    Layer("resnet50", 256, 256, 256, 3, 2, 28),
    Layer("resnet50", 256, 512, 512, 3, 2, 14),
    Layer("resnet50", 256, 64, 64, 1, 1, 56),
    Layer("resnet50", 256, 64, 256, 1, 1, 56),
    Layer("resnet50", 256, 256, 64, 1, 1, 56),
    Layer("resnet50", 256, 512, 128, 1, 1, 28),
    Layer("resnet50", 256, 1024, 256, 1, 1, 14),
    Layer("resnet50", 256, 512, 2048, 1, 1, 7),
]


def functions(layer: Layer, step: str, dtype: torch.dtype, joined: bool) -> Mapping[str, Run]:
    """The candidates of a pass, by name, on random tensors."""
    streams = 1 if joined else TEACHERS

    def random(channels: int, height: int, width: int) -> list[Tensor]:
        size = (layer.batch, channels * TEACHERS // streams, height, width)
        like = torch.empty((), dtype=dtype, device="cuda")
        return [empty_channels_last(like, size).normal_() for _ in range(streams)]

    xs, dys = random(layer.channels, layer.side, layer.side), random(layer.outputs, *layer.output)
    size = (TEACHERS * layer.outputs, layer.channels, layer.kernel, layer.kernel)
    weight = torch.randn(size, dtype=dtype, device="cuda").contiguous(memory_format=torch.channels_last)
    problem = Problem(TEACHERS, layer.geometry)
    if step == "forward":
        return passes.forward_candidates(problem, xs, weight, None)
    if step == "input gradient":
        return passes.input_gradient_candidates(problem, xs[0].shape, dys, weight)
    return passes.weight_gradient_candidates(problem, size, dys, xs)


def contender(layer: Layer, step: str, dtype: torch.dtype, implementation: str) -> Contender:
    if implementation == "triton" and not fetches_boxes(torch.device("cuda")):
        raise UnavailableError("needs compute capability 9.0")
    candidates = functions(layer, step, dtype, joined=implementation == "groups")
    facts: dict[str, Any] = {"flops": layer.flops}
    run = candidates.get(implementation)
    if run is None:
        tiles = {name: run for name, run in candidates.items() if name.startswith("triton")}
        run_beside_each_other(list(tiles.values()))
        facts["tiles"] = times = {name: device_milliseconds(run) for name, run in tiles.items()}
        facts["tile"] = min(times, key=times.__getitem__)
        run = tiles[facts["tile"]]
    facts["device_ms"] = device_milliseconds(run)

    def synchronised() -> None:
        run()
        torch.cuda.synchronize()

    return Contender(synchronised, facts)


# The first to vary stands first: bfloat16 is measured whole before float16.
@pytest.mark.parametrize("step", PASSES)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name.replace(" ", "-"))
@pytest.mark.parametrize("dtype", DTYPES)
def bench_block_conv(benchmark: BenchmarkFixture, layer: Layer, step: str, dtype: str, effort: Effort) -> None:
    benchmark.group = benchmark.extra_info["case"] = f"block convolution, {step}, {layer.name} {dtype} cuda"
    benchmark.extra_info["convolution"] = {"pass": step, "layer": layer.name, "dtype": dtype}
    makers: dict[str, Callable[[], Contender]] = {
        name: (lambda name=name: contender(layer, step, DTYPES[dtype], name)) for name in (SPLIT, "groups", "triton")
    }
    try:
        race(benchmark, effort.chosen(makers), effort.rounds("cuda"), seconds=effort.seconds)
    finally:
        benchmark.extra_info["convolution"]["winner"] = fastest(benchmark.extra_info["contenders"])

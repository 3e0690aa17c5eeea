"""Block-sparse convolutions, each pass: cuDNN with a masked and an unmasked dense weight, and the Triton kernels.

Layers of two networks side by side, twice as wide as those named. A half or a quarter of the weight's blocks is live, or those
of a block diagonal. *masked* is what runs without Triton: cuDNN with zeros in the other blocks, its gradient masked. *dense* is
the same convolution with every block live, which computes more than is asked for: what sparsity has to beat. Triton runs the
tile that is fastest here. ``device_ms`` is a contender's time on the device alone. Needs a CUDA GPU; skips without one.

Block-diagonal convolutions have no benchmark of their own: a training step times every candidate for each of its layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fastmerge.kernels.block_conv import live_blocks, passes
from fastmerge.kernels.block_conv.choice import SPLIT, Run, device_milliseconds
from fastmerge.kernels.block_conv.formulas import Geometry, fetches_boxes
from fastmerge.kernels.block_conv.layouts import empty_laid_out
from fastmerge.kernels.block_conv.problem import Problem
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.cases import DTYPES, needs_gpu
from benchmarks.convolution_tables import DENSE, MASKED, TRITON, fastest
from benchmarks.effort import Effort
from benchmarks.race import Contender, UnavailableError, race

pytestmark = needs_gpu

TEACHERS = 2
PASSES = ("forward", "input gradient", "weight gradient")
LEAST_BLOCK = 16  # channels: the kernels take no smaller one
# Of a grid of so many blocks in each direction, those of a cyclic band are live: as many in every row and column.
PATTERNS = {"half": (4, 2), "quarter": (4, 1), "diagonal": (TEACHERS, 1)}


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
    Layer("resnet18", 256, 128, 256, 3, 2, 28),
    Layer("resnet50", 256, 1024, 256, 1, 1, 14),
    Layer("resnet20", 128, 16, 16, 3, 1, 32),
    Layer("resnet20", 128, 64, 64, 3, 1, 8),
]


def pattern(name: str, layer: Layer) -> Tensor | None:
    """The mask of a pattern's live blocks, or None where its blocks would be too small for the layer."""
    grid, band = PATTERNS[name]
    if TEACHERS * min(layer.channels, layer.outputs) // grid < LEAST_BLOCK:
        return None
    blocks = torch.arange(grid)
    return (blocks[None, :] - blocks[:, None]) % grid < band


def functions(
    layer: Layer, step: str, dtype: torch.dtype, mask: Tensor | None, device: str = "cuda"
) -> Mapping[str, Run]:
    """The candidates of a pass, by name, on random tensors; without a mask those of the dense convolution."""

    def random(*size: int) -> Tensor:
        return empty_laid_out(torch.empty((), dtype=dtype, device=device), size, True).normal_()

    inputs, outputs = TEACHERS * layer.channels, TEACHERS * layer.outputs
    size = (outputs, inputs, layer.kernel, layer.kernel)
    xs = [random(layer.batch, inputs, layer.side, layer.side)]
    dys = [random(layer.batch, outputs, *layer.output)]
    weight = random(*size)
    problem = Problem(1, layer.geometry, None if mask is None else live_blocks(mask.to(device)))
    if step == "forward":
        return passes.forward_candidates(problem, xs, weight, None)
    if step == "input gradient":
        return passes.input_gradient_candidates(problem, xs[0].shape, dys, weight)
    return passes.weight_gradient_candidates(problem, size, dys, xs)


def flops(layer: Layer, mask: Tensor) -> int:
    """Of a pass, in the live blocks."""
    dense = 2 * layer.batch * math.prod(layer.output) * TEACHERS**2 * layer.channels * layer.outputs * layer.kernel**2
    return dense * int(mask.sum()) // mask.numel()


def contender(candidates: Mapping[str, Run], triton: bool, facts: dict[str, Any]) -> Contender:
    """Plain PyTorch, or of Triton's tiles the one that is fastest here."""
    name = SPLIT
    if triton:
        if not fetches_boxes(torch.device("cuda")):
            raise UnavailableError("needs compute capability 9.0")
        times = {tile: device_milliseconds(run) for tile, run in candidates.items() if tile.startswith(TRITON)}
        name = min(times, key=times.__getitem__)
        facts |= {"tiles": times, "tile": name}
    return Contender(candidates[name], facts | {"device_ms": device_milliseconds(candidates[name])})


CASES = [(layer, name) for layer in LAYERS for name in PATTERNS if pattern(name, layer) is not None]


# The first to vary stands first: bfloat16 is measured whole before float16.
@pytest.mark.parametrize("step", PASSES)
@pytest.mark.parametrize(
    ("layer", "live"), CASES, ids=[f"{layer.name.replace(' ', '-')}-{name}" for layer, name in CASES]
)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def bench_block_sparse(
    benchmark: BenchmarkFixture, layer: Layer, live: str, step: str, dtype: str, effort: Effort
) -> None:
    case = f"block-sparse convolution, {step}, {layer.name} {live} {dtype} cuda"
    benchmark.group = benchmark.extra_info["case"] = case
    benchmark.extra_info["sparse"] = {"pass": step, "layer": layer.name, "live": live, "dtype": dtype}
    mask = pattern(live, layer)
    assert mask is not None

    def make(name: str) -> Contender:
        candidates = functions(layer, step, DTYPES[dtype], None if name == DENSE else mask)
        return contender(candidates, name == TRITON, {"flops": flops(layer, mask)})

    makers = {name: (lambda name=name: make(name)) for name in (MASKED, DENSE, TRITON)}
    try:
        race(benchmark, makers, effort, "cuda")
    finally:
        benchmark.extra_info["sparse"]["winner"] = fastest(benchmark.extra_info["contenders"])

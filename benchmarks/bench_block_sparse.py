"""Block-sparse convolutions, each pass: cuDNN with a masked and an unmasked dense weight, and the Triton kernels.

The layers of two networks side by side, twice as wide as the ``convolution_layers`` that name them. A half or a quarter of the
weight's blocks is live, or those of a block diagonal. *masked* is what runs without Triton: cuDNN with zeros in the other
blocks, its gradient masked. *dense* is the same convolution with every block live, which computes more than is asked for: what
sparsity has to beat. Triton runs the tile that is fastest here. Needs a CUDA GPU; skips without one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from fastmerge.kernels.block_conv import live_blocks, passes
from fastmerge.kernels.block_conv.choice import SPLIT, Run
from fastmerge.kernels.block_conv.problem import Problem
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.convolution_layers import DTYPES, LAYERS, PASSES, TEACHERS, Layer, random, timed_contender
from benchmarks.convolution_tables import DENSE, MASKED, TRITON, fastest
from benchmarks.effort import Effort
from benchmarks.race import Contender, race

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

LEAST_BLOCK = 16  # channels: the kernels take no smaller one
# Of a grid of so many blocks in each direction, those of a cyclic band are live: as many in every row and column.
PATTERNS = {"half": (4, 2), "quarter": (4, 1), "diagonal": (TEACHERS, 1)}
SPARSE_DTYPES = ("bf16", "fp16")


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
    inputs, outputs = TEACHERS * layer.channels, TEACHERS * layer.outputs
    size = (outputs, inputs, layer.kernel, layer.kernel)
    xs = [random((layer.batch, inputs, layer.side, layer.side), dtype, device)]
    dys = [random((layer.batch, outputs, *layer.output), dtype, device)]
    weight = random(size, dtype, device)
    problem = Problem(1, layer.geometry, None if mask is None else live_blocks(mask.to(device)))
    if step == "forward":
        return passes.forward_candidates(problem, xs, weight, None)
    if step == "input gradient":
        return passes.input_gradient_candidates(problem, xs[0].shape, dys, weight)
    return passes.weight_gradient_candidates(problem, size, dys, xs)


def flops(layer: Layer, mask: Tensor) -> int:
    """Of a pass, in the live blocks."""
    return layer.flops * TEACHERS * int(mask.sum()) // mask.numel()


CASES = [(layer, name) for layer in LAYERS for name in PATTERNS if pattern(name, layer) is not None]


# The first to vary stands first: bfloat16 is measured whole before float16.
@pytest.mark.parametrize("step", PASSES)
@pytest.mark.parametrize(
    ("layer", "live"), CASES, ids=[f"{layer.name.replace(' ', '-')}-{name}" for layer, name in CASES]
)
@pytest.mark.parametrize("dtype", SPARSE_DTYPES)
def bench_block_sparse(
    benchmark: BenchmarkFixture, layer: Layer, live: str, step: str, dtype: str, effort: Effort
) -> None:
    case = f"block-sparse convolution, {step}, {layer.name} {live} {dtype} cuda"
    benchmark.group = benchmark.extra_info["case"] = case
    benchmark.extra_info["sparse"] = {"pass": step, "layer": layer.name, "live": live, "dtype": dtype}
    mask = pattern(live, layer)
    assert mask is not None

    def contender(name: str) -> Contender:
        candidates = functions(layer, step, DTYPES[dtype], None if name == DENSE else mask)
        return timed_contender(candidates, TRITON if name == TRITON else SPLIT, flops(layer, mask))

    makers: dict[str, Callable[[], Contender]] = {
        name: (lambda name=name: contender(name)) for name in (MASKED, DENSE, TRITON)
    }
    try:
        race(benchmark, makers, effort, "cuda")
    finally:
        benchmark.extra_info["sparse"]["winner"] = fastest(benchmark.extra_info["contenders"])

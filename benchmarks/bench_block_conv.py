"""Block-diagonal convolutions of two networks, each pass: cuDNN one after another, cuDNN's groups, and the Triton kernels.

Layers of ResNet-18 and ResNet-50 at 224 pixels and of ResNet-20 at 32, named after their channels, kernel, stride and size. The
Triton contender runs the tile that is fastest here; the time of every tile is in its facts, under ``tiles``. cuDNN's groups
read and write joined tensors, the others one tensor for each network. ``device_ms`` is a contender's time on the device alone,
with a cold L2 cache: what a step whose kernels wait in the queue pays, and what decides who wins, as in
``fastmerge.kernels.block_conv.choice``. Contiguous tensors come last, after all that is channels-last; in Triton's time are the
copies it makes of them. Needs a CUDA GPU; skips without one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from fastmerge.kernels.block_conv import passes
from fastmerge.kernels.block_conv.choice import SPLIT, Run
from fastmerge.kernels.block_conv.layouts import memory_format
from fastmerge.kernels.block_conv.problem import Problem
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.convolution_layers import DTYPES, LAYERS, PASSES, TEACHERS, Layer, random, timed_contender
from benchmarks.convolution_tables import fastest
from benchmarks.effort import Effort
from benchmarks.race import Contender, race

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def functions(
    layer: Layer, step: str, dtype: torch.dtype, joined: bool, channels_last: bool, device: str = "cuda"
) -> Mapping[str, Run]:
    """The candidates of a pass, by name, on random tensors."""
    streams = 1 if joined else TEACHERS

    def streams_of(channels: int, height: int, width: int) -> list[Tensor]:
        size = (layer.batch, channels * TEACHERS // streams, height, width)
        return [random(size, dtype, device, channels_last) for _ in range(streams)]

    xs, dys = streams_of(layer.channels, layer.side, layer.side), streams_of(layer.outputs, *layer.output)
    size = (TEACHERS * layer.outputs, layer.channels, layer.kernel, layer.kernel)
    weight = random(size, dtype, device).contiguous(memory_format=memory_format(channels_last))
    problem = Problem(TEACHERS, layer.geometry, channels_last=channels_last)
    if step == "forward":
        return passes.forward_candidates(problem, xs, weight, None)
    if step == "input gradient":
        return passes.input_gradient_candidates(problem, xs[0].shape, dys, weight)
    return passes.weight_gradient_candidates(problem, size, dys, xs)


# The first to vary stands first: bfloat16 is measured whole before float16, and channels-last before contiguous.
@pytest.mark.parametrize("step", PASSES)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name.replace(" ", "-"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels-last", "contiguous"])
def bench_block_conv(
    benchmark: BenchmarkFixture, layer: Layer, step: str, dtype: str, channels_last: bool, effort: Effort
) -> None:
    kind = dtype if channels_last else f"{dtype} contiguous"
    benchmark.group = benchmark.extra_info["case"] = f"block convolution, {step}, {layer.name} {kind} cuda"
    benchmark.extra_info["convolution"] = {"pass": step, "layer": layer.name, "dtype": kind}

    def contender(name: str) -> Contender:
        candidates = functions(layer, step, DTYPES[dtype], name == "groups", channels_last)
        return timed_contender(candidates, name, layer.flops)

    makers: dict[str, Callable[[], Contender]] = {
        name: (lambda name=name: contender(name)) for name in (SPLIT, "groups", "triton")
    }
    try:
        race(benchmark, makers, effort, "cuda")
    finally:
        benchmark.extra_info["convolution"]["winner"] = fastest(benchmark.extra_info["contenders"])

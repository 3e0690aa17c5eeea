"""BatchNorm with what follows it, forward and backward in training: eager, compiled, fused, and a copy of as many bytes.

Layers are those of ``BigStudent(resnet18, resnet18)`` at 224 px, linked, or one teacher's stream of it, channels-last; of
two ResNet-50s and two ResNet-20s those that differ.
Eager and compiled are the reference: ``F.batch_norm``, add, ReLU, max-pooling, and a gate cast to the activation's dtype.
``bytes`` is what the fused operation has to move at the least, for bandwidths. Needs a CUDA GPU; skips without one.

``bench_cuts`` varies how the fused passes are cut and how many of their loads are in flight, each way as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from fastmerge.kernels.batch_norm import (
    batch_norm_act,
    batch_norm_act_pool,
    batch_norm_act_pool_reference,
    batch_norm_act_reference,
    tiles,
)
from fastmerge.kernels.cuda_graph import capture
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.cases import DTYPES, needs_gpu
from benchmarks.effort import Effort
from benchmarks.race import Contender, race

pytestmark = needs_gpu

POOLING: dict[str, Any] = {"kernel_size": 3, "stride": 2, "padding": 1}
LAYERS: dict[str, tuple[int, ...]] = {
    "stem": (256, 128, 112, 112),
    "layer1": (256, 128, 56, 56),
    "layer1 stream": (256, 64, 56, 56),
    "layer2": (256, 256, 28, 28),
    "layer3": (256, 512, 14, 14),
    "layer4": (256, 1024, 7, 7),
    "resnet20 layer1": (128, 32, 32, 32),
    "resnet20 layer2": (128, 64, 16, 16),
    "resnet20 layer3": (128, 128, 8, 8),
    "resnet50 layer1": (256, 512, 56, 56),
    "resnet50 layer2": (256, 1024, 28, 28),
    "resnet50 layer3": (256, 2048, 14, 14),
    "resnet50 layer4": (256, 4096, 7, 7),
}
CASES = [
    *[
        (layer, kind, "bf16")
        for layer in LAYERS
        for kind in ("gate", "residual gate")
        if (layer, kind[0]) != ("stem", "r")
    ],
    *[(layer, "gate", "fp16") for layer in ("stem", "layer1", "layer2")],
    *[(layer, "plain", "bf16") for layer in ("stem", "layer1", "layer2")],
]
Operation = Callable[..., Tensor]
RUNS: dict[str, Callable[[Operation, Operation], Operation]] = {
    "eager": lambda reference, fused: reference,
    "compiled": lambda reference, fused: torch.compile(reference, fullgraph=True),
    "fused": lambda reference, fused: fused,
}


def moved(layer: str, kind: str, x: Tensor) -> int:
    """The bytes that the fused operation has to move, gates and vectors of channels aside."""
    if layer == "stem":
        # x is read three times and its gradient written. y, the x kept for it and its gradient are a quarter of x: two
        # writes, two reads for the sums, one for dx. The places in the windows, of one byte, are written and read.
        return 4 * x.nbytes + 5 * x.nbytes // 4 + 2 * x.numel() // 4
    # Reads of x for the statistics, of x for y, of dy and x for the sums, of dy and x for dx; writes of y and dx. A residual
    # is read twice; its gradient is written, and read in place of dy.
    return (11 if "residual" in kind else 8) * x.nbytes


def contender(run: str, layer: str, kind: str, dtype: torch.dtype) -> Contender:
    shape = LAYERS[layer]
    n, c = shape[:2]

    def image() -> Tensor:
        return torch.randn(shape, device="cuda", dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()

    x = image()
    facts = {"items": n, "bytes": moved(layer, kind, x)}
    if run == "copy":
        source = torch.randn(facts["bytes"] // 8, device="cuda")
        target = torch.empty_like(source)
        return Contender(lambda: target.copy_(source), facts)

    pooled = layer == "stem"
    reference, fused = (
        (batch_norm_act_pool_reference, batch_norm_act_pool) if pooled else (batch_norm_act_reference, batch_norm_act)
    )
    operation, options = RUNS[run](reference, fused), POOLING if pooled else {}
    weight, bias = torch.rand(c, device="cuda", requires_grad=True), torch.randn(c, device="cuda", requires_grad=True)
    running = torch.zeros(c, device="cuda"), torch.ones(c, device="cuda")
    more = {"residual": image()} if "residual" in kind else {}
    if "gate" in kind:
        more["gate"] = torch.rand(n, c, device="cuda", requires_grad=True)
    tensors = [x, weight, bias, *more.values()]

    def forward() -> Tensor:
        return operation(x, weight, bias, *running, training=True, **more, **options)

    dy = torch.randn_like(forward())

    return Contender(lambda: torch.autograd.grad(forward(), tensors, dy), facts)


@pytest.mark.parametrize(("layer", "kind", "precision"), CASES, ids=[" ".join(c).replace(" ", "-") for c in CASES])
def bench_batch_norm(benchmark: BenchmarkFixture, layer: str, kind: str, precision: str, effort: Effort) -> None:
    benchmark.group = benchmark.extra_info["case"] = f"BatchNorm, {layer} {kind} {precision} cuda"
    dtype = DTYPES[precision]
    makers = {run: (lambda run=run: contender(run, layer, kind, dtype)) for run in (*RUNS, "copy")}
    race(benchmark, makers, effort, "cuda")


# Layers by what they cost; and what the constants of ``tiles`` that decide about latency may be.
CUT_LAYERS = ("layer1", "layer1 stream", "layer3")
CUTS = {
    f"{stages} stages, {programs} programs": {
        "STAGES": stages,
        "_SUMMING": {**tiles._SUMMING, "programs": programs},
    }
    for stages in (1, 3)
    for programs in (1056, 2048)
}


def cut_contender(cut: dict[str, Any], layer: str, kind: str) -> Contender:
    """The fused operation cut as told, replayed, so that nothing but the device is timed."""
    with tiles.constants(**cut):
        made = contender("fused", layer, kind, torch.bfloat16)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            made.step()
        side.synchronize()
        replay, _ = capture(made.step, torch.device("cuda"))
    # The check holds the tensors that the graph reads.
    return Contender(replay, made.facts, check=made.step)


@pytest.mark.parametrize("kind", ["gate", "residual gate"], ids=["gate", "residual-gate"])
@pytest.mark.parametrize("layer", CUT_LAYERS, ids=[layer.replace(" ", "-") for layer in CUT_LAYERS])
def bench_cuts(benchmark: BenchmarkFixture, layer: str, kind: str, effort: Effort) -> None:
    benchmark.group = benchmark.extra_info["case"] = f"BatchNorm cuts, {layer} {kind} bf16 cuda"
    makers: dict[str, Callable[[], Contender]] = {}
    for name, cut in CUTS.items():
        makers[name] = partial(cut_contender, cut, layer, kind)
    makers["copy"] = lambda: contender("copy", layer, kind, torch.bfloat16)
    race(benchmark, makers, effort, "cuda")

"""BatchNorm with what follows it, forward and backward in training: eager, compiled, and the fused operation.

Layers are those of ``BigStudent(resnet18, resnet18)`` at 224 px and a batch of 256, linked or as one stream of a teacher,
channels-last. Eager and compiled are the reference: ``F.batch_norm``, add, ReLU, max-pooling, and a gate cast to the
activation's dtype. "bytes" is what the fused operation has to move at the least, so that bytes / time is the bandwidth
achieved; beside it stands the bandwidth of a copy of the same tensor. Needs a CUDA GPU; skips without one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastmerge.kernels.batch_norm import batch_norm_act, batch_norm_act_reference
from fastmerge.kernels.batch_norm_pool import batch_norm_act_pool, batch_norm_act_pool_reference
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

LAYERS = {
    "layer1": (256, 128, 56, 56),
    "layer1-stream": (256, 64, 56, 56),
    "layer2": (256, 256, 28, 28),
    "layer3": (256, 512, 14, 14),
    "layer4": (256, 1024, 7, 7),
    "resnet20": (128, 32, 32, 32),
}
STEM = (256, 128, 112, 112)
POOLING: dict[str, Any] = {"kernel_size": 3, "stride": 2, "padding": 1}

# With what, and how often each kind of tensor is moved at the least: the statistics, the result, the sums and dx each read x
# or write once; a residual is read twice, and its gradient written and, in place of dy and itself, read.
KINDS: dict[str, tuple[bool, bool]] = {
    "plain": (False, False),
    "gate": (False, True),
    "residual": (True, False),
    "residual-gate": (True, True),
}
MOVES = {False: 3 + 5, True: 4 + 7}

RUNS: dict[str, Callable[[Callable[..., Tensor], Callable[..., Tensor]], Callable[..., Tensor]]] = {
    "eager": lambda reference, fused: reference,
    "compiled": lambda reference, fused: torch.compile(reference, fullgraph=True),
    "fused": lambda reference, fused: fused,
}
by_run = pytest.mark.parametrize("run", RUNS)
by_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def measure(
    operation: Callable[..., Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    moved: float,
    benchmark: Any,
    residual: bool,
    gated: bool,
    **options: Any,
) -> None:
    """Times steps of one layer; ``moved`` is in tensors of the shape."""
    n, c = shape[:2]

    def image() -> Tensor:
        return torch.randn(shape, device="cuda", dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()

    x = image()
    weight, bias = torch.rand(c, device="cuda", requires_grad=True), torch.randn(c, device="cuda", requires_grad=True)
    running = torch.zeros(c, device="cuda"), torch.ones(c, device="cuda")
    more = {"residual": image()} if residual else {}
    if gated:
        more["gate"] = torch.rand(n, c, device="cuda", requires_grad=True)
    tensors = [x, weight, bias, *more.values()]
    dy = torch.randn_like(operation(x, weight, bias, *running, training=True, **more, **options))

    def step() -> None:
        y = operation(x, weight, bias, *running, training=True, **more, **options)
        torch.autograd.grad(y, tensors, dy)
        torch.cuda.synchronize()

    benchmark.extra_info.update(shape=list(shape), dtype=str(dtype), bytes=int(moved * x.nbytes))
    for _ in range(5):
        step()
    benchmark(step)


@by_run
@by_dtype
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_batch_norm_act(layer: str, kind: str, dtype: torch.dtype, run: str, benchmark: Any) -> None:
    residual, gated = KINDS[kind]
    benchmark.group = f"batch_norm_act {layer} {kind} {str(dtype)[6:]}"
    operation = RUNS[run](batch_norm_act_reference, batch_norm_act)
    measure(operation, LAYERS[layer], dtype, MOVES[residual], benchmark, residual, gated)


@by_run
@by_dtype
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gate"])
def test_batch_norm_act_pool(gated: bool, dtype: torch.dtype, run: str, benchmark: Any) -> None:
    benchmark.group = f"batch_norm_act_pool {'gate' if gated else 'plain'} {str(dtype)[6:]}"
    operation = RUNS[run](batch_norm_act_pool_reference, batch_norm_act_pool)
    # x is read three times and its gradient written; y, the x kept for it and dy are a quarter of x each, of which two are
    # written, two read for the sums, one for dx; the places in the windows take a byte where x takes two.
    places = 1 / (4 * dtype.itemsize)
    measure(operation, STEM, dtype, 4 + 5 / 4 + 2 * places, benchmark, False, gated, **POOLING)


@by_dtype
def test_copy(dtype: torch.dtype, benchmark: Any) -> None:
    x = torch.randn(LAYERS["layer1"], device="cuda", dtype=dtype)
    y = torch.empty_like(x)

    def step() -> None:
        y.copy_(x)
        torch.cuda.synchronize()

    benchmark.group = f"copy {str(dtype)[6:]}"
    benchmark.extra_info.update(shape=list(x.shape), dtype=str(dtype), bytes=2 * x.nbytes)
    for _ in range(5):
        step()
    benchmark(step)

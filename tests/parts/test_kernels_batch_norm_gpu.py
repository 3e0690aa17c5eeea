"""The fused BatchNorm on a CUDA device (``pytest -m gpu``), at the shapes of real networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastmerge.kernels.batch_norm import ACTIVATIONS, batch_norm_act, batch_norm_act_pool, why_not_fused
from torch import Tensor

from batch_norm_checks import (
    DTYPES,
    OTHER_ACTIVATIONS,
    by_dtype_and_layout,
    check_against_float64,
    check_streams,
    in_layout,
    laid_out,
    make,
    stretched,
)

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

TRAINING: dict[str, Any] = {"training": True, "activation": "relu"}
STEM: dict[str, Any] = {"kernel_size": 3, "stride": 2, "padding": 1}
# Layers of ResNet-18, ResNet-50 and ResNet-20 of two teachers, and odd sizes.
REAL = [(32, 128, 56, 56), (32, 256, 28, 28), (64, 512, 14, 14), (64, 1024, 7, 7), (16, 4096, 7, 7), (128, 32, 32, 32)]
ODD = [(2, 1, 1, 1), (3, 5, 7, 3), (7, 13), (33, 65, 17, 19), (5, 1000, 3, 3), (1000, 300)]
by_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.mark.usefixtures("poisoned_memory")
@by_dtype_and_layout
@pytest.mark.parametrize("shape", ODD, ids=str)
def test_odd_shapes(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    if len(shape) == 2 and layout == "channels-last":
        layout = "transposed"
    case = laid_out(make(shape, dtype, "cuda", samples=shape[0]), layout)
    assert why_not_fused(**case) is None
    check_against_float64(case, TRAINING)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("samples", [None, 1, 33])
@pytest.mark.parametrize("residual", [True, False])
def test_options(residual: bool, samples: int | None, training: bool) -> None:
    case = laid_out(make((33, 65, 17, 19), torch.float16, "cuda", samples=samples, residual=residual), "channels-last")
    for activation in ACTIVATIONS:
        check_against_float64(stretched(case), {"training": training, "activation": activation}, dy_layout="contiguous")


@by_dtype
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_real_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    case = laid_out(make(shape, dtype, "cuda", samples=shape[0]), "channels-last")
    check_against_float64(case, TRAINING, dy_layout="channels-last")
    case["x"], case["residual"] = in_layout(case["x"], "slice"), None
    check_against_float64(case, TRAINING, dy_layout="slice")


@pytest.mark.usefixtures("poisoned_memory")
@by_dtype_and_layout
@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (3, 5, 7, 3), (1, 130, 33, 17), (16, 128, 112, 112)], ids=str)
def test_stem(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    case = laid_out(make(shape, dtype, "cuda", samples=shape[0], residual=False), layout)
    check_against_float64(case, TRAINING | STEM, dy_layout=layout)
    check_against_float64(case, {"training": False, "activation": "identity"} | STEM)
    for activation in OTHER_ACTIVATIONS:
        check_against_float64(stretched(case), TRAINING | STEM | {"activation": activation}, dy_layout=layout)
    if min(shape[2:]) > 1:
        check_against_float64(case, TRAINING | {"kernel_size": 2, "stride": 2})


@pytest.mark.usefixtures("poisoned_memory")
@by_dtype
@pytest.mark.parametrize("place", ["apart", "slices"])
@pytest.mark.parametrize("shape", [(3, 5, 7, 3), (33, 72, 17, 19)], ids=str)
def test_streams(shape: tuple[int, ...], place: str, dtype: torch.dtype) -> None:
    for count in (2, 3):
        check_streams(count, shape, dtype, device="cuda", place=place, residual=True, samples=shape[0])
        check_streams(count, shape, dtype, device="cuda", place=place, pool=(3, 2, 1), samples=shape[0])


def step(operation: Callable[..., Tensor], tensors: dict[str, Tensor], options: dict[str, Any]) -> list[Tensor]:
    """Result, new running statistics and gradients."""
    x, channels = tensors["x"], tensors["x"].shape[1]
    mean, var = torch.zeros(channels, device=x.device), torch.ones(channels, device=x.device)
    named = {name: tensors[name] for name in ("residual", "gate") if name in tensors}
    y = operation(x, tensors["weight"], tensors["bias"], mean, var, training=True, **named, **options)
    return [y.detach(), mean, var, *torch.autograd.grad(y, list(tensors.values()), y.detach() + 1)]


def learners(shape: tuple[int, ...], dtype: torch.dtype, residual: bool) -> dict[str, Tensor]:
    case = laid_out(make(shape, dtype, "cuda", samples=shape[0], residual=residual), "channels-last")
    return {name: t.requires_grad_() for name, t in case.items() if t is not None}


OPERATIONS = [
    pytest.param(batch_norm_act, {}, True, id="batch_norm_act"),
    pytest.param(batch_norm_act_pool, STEM, False, id="batch_norm_act_pool"),
]


@pytest.mark.parametrize(("operation", "options", "residual"), OPERATIONS)
def test_repeats_bit_by_bit(operation: Callable[..., Tensor], options: dict[str, Any], residual: bool) -> None:
    tensors = learners((64, 128, 28, 28), torch.bfloat16, residual)
    first = step(operation, tensors, options)
    for _ in range(4):
        for a, b in zip(first, step(operation, tensors, options), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("operation", "options", "residual"), OPERATIONS)
def test_replayed_graph(operation: Callable[..., Tensor], options: dict[str, Any], residual: bool) -> None:
    tensors = learners((16, 64, 14, 14), torch.float16, residual)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(operation, tensors, options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(operation, tensors, options)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.copy_(torch.rand_like(tensor))
    graph.replay()
    for a, b in zip(captured, step(operation, tensors, options), strict=True):
        assert torch.equal(a, b)


# Inductor recommends TensorFloat32 and more.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("operation", "options", "residual"), OPERATIONS)
def test_torch_compile_takes_it_whole(
    operation: Callable[..., Tensor], options: dict[str, Any], residual: bool
) -> None:
    tensors = learners((16, 64, 14, 14), torch.float32, residual)
    compiled = torch.compile(operation, fullgraph=True)
    for a, b in zip(step(operation, tensors, options), step(compiled, tensors, options), strict=True):
        torch.testing.assert_close(a, b)


def test_slices_of_longer_vectors_and_of_gates() -> None:
    case = make((8, 64, 14, 14), torch.bfloat16, "cuda", samples=8)
    gates = torch.rand(8, 200, device="cuda", requires_grad=True)
    mean, var = torch.zeros(200, device="cuda"), torch.ones(200, device="cuda")
    y = batch_norm_act(case["x"], None, None, mean[7:71], var[7:71], training=True, gate=gates[:, 7:71])
    y.float().sum().backward()
    assert gates.grad is not None
    for changed in (mean != 0, var != 1, (gates.grad != 0).any(0)):
        assert changed.nonzero().flatten().tolist() == list(range(7, 71))


def test_far_from_zero_nothing_cancels() -> None:
    x = in_layout(1e3 + 0.1 * torch.randn(64, 64, 56, 56, device="cuda"), "channels-last")
    mean, var = torch.zeros(64, device="cuda"), torch.zeros(64, device="cuda")
    batch_norm_act(x, None, None, mean, var, training=True, momentum=1.0)
    expected = x.double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(mean.double(), expected.mean(1), rtol=2e-7, atol=0)
    torch.testing.assert_close(var.double(), expected.var(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("pooled", [False, True])
def test_not_a_number_is_not_hidden(pooled: bool) -> None:
    # The interpreter's maximum keeps a NaN whatever the kernel says; the card's doesn't.
    x = torch.randn(2, 5, 8, 8, device="cuda")
    x[1, 2, 0, 0] = float("nan")
    running = torch.zeros(5, device="cuda"), torch.ones(5, device="cuda")
    operation, options = (batch_norm_act_pool, {"kernel_size": 2, "stride": 2}) if pooled else (batch_norm_act, {})
    y = operation(x, None, None, *running, training=False, **options)
    assert y.isnan().nonzero().tolist() == [[1, 2, 0, 0]]
    y = operation(x, None, None, *running, training=True, **options)
    assert y.isnan().all(-1).all(-1).nonzero().tolist() == [[0, 2], [1, 2]]
    assert y.isnan().sum() == y[:, 2].numel()
    for statistic in running:
        assert statistic.isnan().nonzero().tolist() == [[2]]


@pytest.mark.parametrize("pooled", [False, True])
def test_more_than_2_to_the_31_elements(pooled: bool) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    n, c, h = 170, 64, 448
    x = torch.empty(n, c, h, h, device="cuda", dtype=torch.float16, memory_format=torch.channels_last).normal_()
    assert x.numel() > 2**31
    x.requires_grad_()
    gate = torch.rand(n, c, device="cuda")
    options: dict[str, Any] = {"training": False} | (STEM if pooled else {})
    operation = batch_norm_act_pool if pooled else batch_norm_act
    running = torch.zeros(c, device="cuda"), torch.ones(c, device="cuda")
    y = operation(x, None, None, *running, gate=gate, **options)
    (dx,) = torch.autograd.grad(y, x, torch.ones((), device="cuda", dtype=y.dtype).expand(y.shape))
    for part in (slice(0, 2), slice(n - 2, n)):
        few = x.detach()[part].clone(memory_format=torch.preserve_format).requires_grad_()
        y_few = operation(few, None, None, *running, gate=gate[part], **options)
        torch.testing.assert_close(y[part], y_few)
        torch.testing.assert_close(dx[part], torch.autograd.grad(y_few, few, torch.ones_like(y_few))[0])
    if not pooled:
        mean, var = torch.zeros(c, device="cuda"), torch.ones(c, device="cuda")
        batch_norm_act(x.detach(), None, None, mean, var, training=True, momentum=1.0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-3)
        torch.testing.assert_close(var, torch.ones_like(var), rtol=1e-3, atol=0)


def test_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    case = make((3, 5, 7, 3), torch.float32, "cuda:1", samples=3)
    check_against_float64(case, TRAINING)

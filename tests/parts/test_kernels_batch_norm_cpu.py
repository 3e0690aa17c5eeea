"""BatchNorm + residual + activation + gate through the C++ extension, against float64; what it leaves to plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastmerge.kernels.batch_norm import ACTIVATIONS, batch_norm_act, batch_norm_act_reference, cpu, why_not_fused
from torch import Tensor

from batch_norm_checks import (
    NAMES,
    OTHER_ACTIVATIONS,
    check_against_float64,
    check_at_kinks,
    in_layout,
    laid_out,
    make,
    stretched,
)
from extension_stub import check_stub

needs_extension = pytest.mark.skipif(cpu._batch_norm is None, reason="the C++ extension is not built")
TRAINING = {"training": True, "activation": "relu"}
# Below and above the channels that are worked on together; several samples to a chunk, several chunks to a sample.
SHAPES = [
    (2, 1, 1, 1),
    (3, 5, 7, 3),
    (4, 16, 4, 8),
    (5, 37, 5, 4),
    (7, 13),
    (64, 48),
    (300, 80, 3, 3),
    (2, 70, 23, 21),
    (3, 20, 9),
]
SPLIT = (3, 64, 17, 19)  # 323 positions of 64 channels: two chunks to a sample


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["channels-last", "slice"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    case = laid_out(make(shape, dtype, samples=shape[0]), layout)
    assert (
        why_not_fused(*[case[name] for name in ("x", "weight", "bias")], residual=case["residual"], gate=case["gate"])
        is None
    )
    y = check_against_float64(case, TRAINING, dy_layout=layout)
    assert y.movedim(1, -1).is_contiguous()


@needs_extension
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("samples", [None, 1, 3])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(3, 5, 4, 3), SPLIT], ids=str)
def test_every_combination(
    shape: tuple[int, ...], activation: str, residual: bool, samples: int | None, training: bool
) -> None:
    case = laid_out(make(shape, torch.float32, samples=samples, residual=residual), "channels-last")
    check_against_float64(case, {"training": training, "activation": activation, "momentum": 0.3, "eps": 1e-3})


@needs_extension
@pytest.mark.parametrize(
    "learning", [(), ("x",), ("weight",), ("bias",), ("residual",), ("gate",), ("x", "residual")], ids=str
)
@pytest.mark.parametrize(("training", "activation"), [(True, "relu"), (False, "relu"), (True, "identity")])
def test_only_the_gradients_wanted(learning: tuple[str, ...], training: bool, activation: str) -> None:
    case = laid_out(make((3, 5, 4, 3), torch.float32, samples=3), "channels-last")
    check_against_float64(case, {"training": training, "activation": activation}, learning=learning)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", OTHER_ACTIVATIONS)
def test_other_activations(activation: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    case = stretched(laid_out(make(shape, dtype, samples=shape[0]), "channels-last"))
    check_against_float64(case, {"training": True, "activation": activation}, dy_layout="slice")


@needs_extension
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_at_kinks_and_far_out(activation: str) -> None:
    check_at_kinks(activation)


@needs_extension
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "slice", "transposed", "cropped"])
def test_gradients_and_residuals_in_any_layout(layout: str) -> None:
    case = make((3, 5, 4, 3), torch.float32, samples=3)
    case["x"], case["residual"] = in_layout(case["x"], "channels-last"), in_layout(case["residual"], layout)
    check_against_float64(case, TRAINING, dy_layout=layout)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_whatever_the_default_dtype_is(dtype: torch.dtype) -> None:
    case = laid_out(make((3, 5, 4, 3), torch.float32, samples=3), "channels-last")
    torch.set_default_dtype(dtype)
    try:
        check_against_float64(case, TRAINING)
    finally:
        torch.set_default_dtype(torch.float32)


@needs_extension
def test_without_weights() -> None:
    case = laid_out(make((3, 5, 4, 3), torch.float32, samples=3), "channels-last") | {"weight": None, "bias": None}
    check_against_float64(case, TRAINING)


@needs_extension
def test_small_variance_far_from_zero() -> None:
    case = laid_out(make((64, 16, 12, 12), torch.float32, residual=False), "channels-last")
    x = (case["x"].double() / 100 + 300).float()
    y = batch_norm_act(x, None, None, None, None, training=True, activation="identity")
    expected = batch_norm_act_reference(x.double(), None, None, None, None, training=True, activation="identity")
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=2e-3)


@needs_extension
@pytest.mark.parametrize("shape", [(64, 48, 13, 7), (2, 24, 64, 33), (512, 96)], ids=str)
def test_the_same_bits_with_any_number_of_threads(shape: tuple[int, ...]) -> None:
    case = laid_out(make(shape, torch.float32, samples=shape[0]), "channels-last")
    assert case["x"].numel() >= cpu._WORTH_THREADS

    def results(threads: int) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            tensors = [case[name].detach().requires_grad_() for name in NAMES]
            x, weight, bias, residual, gate = tensors
            y = batch_norm_act(x, weight, bias, None, None, residual=residual, gate=gate, **TRAINING)
            return [y.detach(), *torch.autograd.grad(y, tensors, torch.cos(y.detach()))]
        finally:
            torch.set_num_threads(before)

    alone = results(1)
    for threads in (2, 3):
        assert all(map(torch.equal, alone, results(threads)))


@needs_extension
def test_nan_stays() -> None:
    case = laid_out(make((3, 18, 4, 3), torch.float32, samples=3, residual=False), "channels-last")
    case["x"][1, 2, 0, 0] = case["x"][1, 17, 0, 0] = float("nan")
    running = torch.zeros(18), torch.ones(18)
    y = batch_norm_act(case["x"], None, None, *running, training=False)
    assert torch.equal(y.isnan(), case["x"].isnan())
    as_bfloat16 = batch_norm_act(case["x"].bfloat16(), None, None, *running, training=False)
    assert torch.equal(as_bfloat16.isnan(), case["x"].isnan())


@needs_extension
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_second_derivatives(gated: bool, activation: str, training: bool) -> None:
    case = laid_out(make((3, 5, 4, 3), torch.float32, samples=3 if gated else None), "channels-last")
    found = []
    for operation, dtype in ((batch_norm_act, torch.float32), (batch_norm_act_reference, torch.float64)):
        tensors = {name: t.detach().to(dtype).requires_grad_() for name, t in case.items() if t is not None}
        named = {name: tensors[name] for name in ("residual", "gate") if name in tensors}
        running = torch.zeros(5, dtype=dtype), torch.ones(5, dtype=dtype)
        y = operation(*list(tensors.values())[:3], *running, training=training, activation=activation, **named)
        learners = list(tensors.values())
        first = torch.autograd.grad(y.square().sum(), learners, create_graph=True)
        loss = sum(gradient.square().sum() for gradient in first)
        found.append([*first, *torch.autograd.grad(loss, learners)])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3 * (1 + expected.abs().max().item()))


@needs_extension
def test_what_stays_with_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = in_layout(torch.randn(3, 5, 4, 3), "channels-last")
    assert why_not_fused(x) is None
    assert why_not_fused(x.double()) == "x is torch.float64"
    assert why_not_fused(x.half()) == "x is torch.float16"
    assert why_not_fused(x.contiguous()) == "the channels of x don't lie side by side"
    assert why_not_fused(in_layout(x, "cropped")) == "the channels of x don't lie side by side"
    assert why_not_fused(x, activation="gelu") == f"the activation is gelu, not one of {', '.join(ACTIVATIONS)}"
    assert why_not_fused(x.to("meta")) == "x is on meta, neither on a CUDA device nor on a CPU"
    with torch.autograd.forward_ad.dual_level():
        assert why_not_fused(x) == "there is no forward-mode derivative"
    seen: list[str | None] = []
    torch.func.vmap(lambda x: seen.append(why_not_fused(x)) or x)(torch.randn(2, 3, 5, 4, 3))
    assert seen[0] is not None
    monkeypatch.setattr(cpu, "_batch_norm", None)
    assert why_not_fused(x) == "the C++ extension is not built"
    y = batch_norm_act(x, None, None, None, None, training=True)
    assert torch.equal(y, batch_norm_act_reference(x, None, None, None, None, training=True))


@needs_extension
def test_compiled_it_is_plain_pytorch() -> None:
    x = in_layout(torch.randn(3, 5, 4, 3), "channels-last")

    def norm(x: Tensor) -> Tensor:
        return batch_norm_act(x, None, None, None, None, training=True)

    compiled = torch.compile(norm, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), norm(x))


@needs_extension
@pytest.mark.parametrize(
    "changes",
    [
        *({"shape": (0, 1, 4)}, {"shape": (3, 1, -4)}, {"x": ([0], 4)}, {"x": ([], 4)}, {"mean": 0}, {"var": 0}),
        *({"y": ([], 4)}, {"y": ([0], 4)}, {"residual": ([1, 1], 4)}, {"activation": "gelu"}),
    ],
    ids=str,
)
def test_the_extension_checks_by_itself(changes: dict[str, Any]) -> None:
    x, y, mean, var = torch.randn(3, 4), torch.zeros(3, 4), torch.zeros(4), torch.zeros(4)
    call = {"shape": (3, 1, 4), "bfloat16": False, "x": ([x.data_ptr()], 4), "y": ([y.data_ptr()], 4)}
    call |= {"training": True, "mean": mean.data_ptr(), "var": var.data_ptr(), "residual": ([], 0), "gates": (0, 0)}
    call |= {
        "running_mean": 0,
        "running_var": 0,
        "momentum": 0.1,
        "weight": 0,
        "bias": 0,
        "eps": 1e-5,
        "activation": "relu",
    }
    with pytest.raises(ValueError, match="batch_norm needs"):
        cpu._batch_norm.forward(**call | changes)
    assert not any(tensor.any() for tensor in (y, mean, var))


@needs_extension
def test_the_stub_names_what_the_module_has() -> None:
    check_stub(cpu._batch_norm)

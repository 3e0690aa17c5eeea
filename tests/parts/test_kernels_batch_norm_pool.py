"""BatchNorm + activation + max-pooling + gate, fused, against float64 in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastmerge.kernels.batch_norm import batch_norm_act_pool
from torch import Tensor

from batch_norm_checks import (
    OTHER_ACTIVATIONS,
    by_dtype_and_layout,
    check_against_float64,
    fused,
    in_layout,
    make,
    small_cuts,
    stretched,
)
from interpreter import interpreted

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned_memory")

STEM = {"kernel_size": 3, "stride": 2, "padding": 1}
TRAINING = {"training": True, "activation": "relu"} | STEM
SHAPE = (3, 5, 7, 6)
WINDOWS: list[dict[str, Any]] = [
    STEM,
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 3, "stride": 1, "padding": 1},
    {"kernel_size": 2, "stride": 3},
    {"kernel_size": (2, 5), "stride": (3, 2), "padding": (0, 2)},
]


def case_of(
    shape: tuple[int, ...], dtype: torch.dtype, samples: int | None, layout: str = "contiguous"
) -> dict[str, Tensor | None]:
    case = make(shape, dtype, samples=samples, residual=False)
    return case | {"x": in_layout(case["x"], layout)}


@interpreted
@by_dtype_and_layout
# Smallest, odd, typical, just past the blocks (of 8 channels and 8 columns).
@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (3, 5, 7, 3), (2, 8, 8, 8), (1, 18, 5, 17)], ids=str)
def test_against_float64(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    with fused():
        y = check_against_float64(case_of(shape, dtype, shape[0], layout), TRAINING)
    assert y.movedim(1, 1 if layout == "contiguous" else -1).is_contiguous()


@interpreted
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("samples", [None, 1, 3])
@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("direct", [True, False])
def test_every_combination(direct: bool, activation: str, samples: int | None, training: bool) -> None:
    options = {"training": training, "activation": activation, "momentum": 0.3, "eps": 1e-3} | STEM
    with fused(direct):
        check_against_float64(case_of(SHAPE, torch.float32, samples, "channels-last"), options)


@interpreted
@pytest.mark.parametrize(
    ("dtype", "layout", "direct"), [(torch.float32, "contiguous", True), (torch.float16, "channels-last", False)]
)
@pytest.mark.parametrize("activation", OTHER_ACTIVATIONS)
def test_other_activations(activation: str, dtype: torch.dtype, layout: str, direct: bool) -> None:
    """SiLU and Hardswish fall before they rise: the largest x of a window need not be the largest result."""
    case = stretched(case_of(SHAPE, dtype, 3, layout))
    with fused(direct):
        check_against_float64(case, {"training": True, "activation": activation} | STEM, dy_layout="slice")


@interpreted
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_windows(window: dict[str, Any]) -> None:
    with fused():
        for activation, layout in (("identity", "channels-last"), ("relu", "cropped")):
            check_against_float64(
                case_of(SHAPE, torch.float32, 3, layout), {"training": True, "activation": activation} | window
            )


@interpreted
@pytest.mark.parametrize("learning", [(), ("x",), ("weight",), ("bias",), ("gate",)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_only_the_gradients_wanted(learning: tuple[str, ...], training: bool) -> None:
    with fused():
        check_against_float64(case_of(SHAPE, torch.float32, 3), TRAINING | {"training": training}, learning=learning)


@interpreted
@pytest.mark.parametrize(
    ("layout", "dy_layout"), [("contiguous", "slice"), ("slice", "contiguous"), ("slice", "cropped")]
)
def test_many_tiles_and_programs(layout: str, dy_layout: str) -> None:
    with small_cuts(), fused():
        check_against_float64(case_of((3, 5, 6, 5), torch.float32, 3, layout), TRAINING, dy_layout=dy_layout)


@interpreted
def test_equal_values_give_the_gradient_to_the_first() -> None:
    # Few values, so that most windows hold several of the largest; a weight of each sign, and 0, where all are equal.
    x = torch.randint(0, 3, (2, 3, 9, 8)).float()
    weight = torch.tensor([1.5, -0.5, 0.0], requires_grad=True)
    tensors = [x.requires_grad_(), weight]
    arguments = (torch.ones(3), torch.zeros(3), torch.ones(3))
    y = F.max_pool2d(F.batch_norm(x, *arguments[1:], weight, arguments[0]), 3, 2, 1)
    dy = torch.randn(y.shape)
    expected = torch.autograd.grad(y, tensors, dy)
    with fused():
        got = torch.autograd.grad(
            batch_norm_act_pool(x, weight, *arguments, training=False, activation="identity", **STEM), tensors, dy
        )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@interpreted
@pytest.mark.parametrize("window", WINDOWS[:3], ids=str)
def test_places_are_those_of_torch(window: dict[str, Any]) -> None:
    x = torch.randint(0, 3, (2, 3, 9, 8)).float()
    sizes = [window["kernel_size"], window["stride"], window.get("padding", 0)]
    _, peak, place = torch.ops.fastmerge.batch_norm_act_pool(
        x,
        None,
        None,
        torch.zeros(3),
        torch.ones(3),
        None,
        False,
        0.0,
        "identity",
        [n for n in sizes for _ in "hw"],
        True,
    )
    y, flat = F.max_pool2d(x, *sizes, return_indices=True)
    kernel, stride, padding = sizes
    row = torch.arange(y.shape[2])[:, None] * stride - padding + place // kernel
    column = torch.arange(y.shape[3]) * stride - padding + place % kernel
    assert place.dtype == torch.int8
    assert torch.equal(row * x.shape[3] + column, flat)
    assert torch.equal(peak, y)


@interpreted
@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_infinite_values(value: float) -> None:
    x = torch.randn(1, 2, 4, 4)
    x[0, 0, :2, :2], x[0, 1] = value, value
    arguments = (x, None, None, torch.zeros(2), torch.ones(2))
    with fused():
        y = batch_norm_act_pool(*arguments, training=False, activation="identity", eps=0.0, kernel_size=2, stride=2)
    assert torch.equal(y, F.max_pool2d(x, 2, 2))


@interpreted
def test_not_a_number_is_not_hidden() -> None:
    x = torch.randn(1, 2, 4, 4)
    x[0, 0, 0, 0] = float("nan")
    with fused():
        y = batch_norm_act_pool(x, None, None, torch.zeros(2), torch.ones(2), training=False, kernel_size=2, stride=2)
    assert y.isnan().nonzero().tolist() == [[0, 0, 0, 0]]


@interpreted
def test_closed_gates_are_exact_zeros() -> None:
    case = case_of(SHAPE, torch.float32, 3)
    case["gate"][:, 2], case["gate"][1, 4] = 0, 0
    x, gate = case["x"].requires_grad_(), case["gate"].requires_grad_()
    with fused():
        y = batch_norm_act_pool(x, None, None, None, None, training=True, gate=gate, **STEM)
    assert (y[:, 2] == 0).all()
    assert (y[1, 4] == 0).all()
    y.backward(torch.randn(y.shape))
    assert (x.grad[:, 2] == 0).all()
    assert (gate.grad[:, 2] != 0).all()


@interpreted
def test_what_is_kept_for_the_backward_pass() -> None:
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = []
    x = torch.randn(SHAPE, dtype=torch.float16)

    def keep(tensor: Tensor) -> Tensor:
        shapes.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    with fused(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        batch_norm_act_pool(x, None, None, None, None, training=True, **STEM)
        assert shapes == []
        batch_norm_act_pool(x.requires_grad_(), None, None, None, None, training=True, **STEM)
    pooled, half = (3, 5, 4, 3), torch.float16
    vectors = [((5,), torch.float32)] * 2
    assert sorted(shapes, key=str) == sorted([(SHAPE, half), (pooled, half), (pooled, torch.int8), *vectors], key=str)

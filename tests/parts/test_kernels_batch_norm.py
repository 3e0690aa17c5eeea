"""BatchNorm + residual + activation + gate, fused, against float64 in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from fastmerge.kernels.batch_norm import ACTIVATIONS, batch_norm_act, batch_norm_act_pool, batch_norm_act_reference

from batch_norm_checks import (
    NAMES,
    OTHER_ACTIVATIONS,
    by_dtype_and_layout,
    by_shape,
    check_against_float64,
    check_at_kinks,
    fused,
    in_layout,
    laid_out,
    make,
    small_cuts,
    stretched,
)
from interpreter import interpreted

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned_memory")

TRAINING = {"training": True, "activation": "relu"}
SHAPE = (3, 5, 4, 3)
operators = torch.ops.fastmerge


@interpreted
@by_dtype_and_layout
@by_shape
def test_against_float64(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    if len(shape) == 2 and layout == "channels-last":
        layout = "transposed"
    case = laid_out(make(shape, dtype, samples=shape[0]), layout)
    with fused():
        y = check_against_float64(case, TRAINING)
    channels_last = len(shape) > 2 and layout != "contiguous"
    assert y.movedim(1, -1 if channels_last else 1).is_contiguous()


@interpreted
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("samples", [None, 1, 3])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("direct", [True, False])
def test_every_combination(direct: bool, activation: str, residual: bool, samples: int | None, training: bool) -> None:
    case = laid_out(make(SHAPE, torch.float32, samples=samples, residual=residual), "channels-last")
    with fused(direct):
        check_against_float64(case, {"training": training, "activation": activation, "momentum": 0.3, "eps": 1e-3})


@interpreted
@pytest.mark.parametrize(
    ("shape", "dtype", "layout", "samples", "direct"),
    [
        ((2, 1, 1, 1), torch.float16, "contiguous", 2, True),
        ((3, 5, 7, 3), torch.float32, "contiguous", 3, True),
        ((4, 16, 4, 2), torch.float16, "channels-last", None, True),
        ((2, 18, 5, 4), torch.float32, "slice", 1, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("activation", OTHER_ACTIVATIONS)
def test_other_activations(
    activation: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str, samples: int | None, direct: bool
) -> None:
    residual = layout == "contiguous"
    case = stretched(laid_out(make(shape, dtype, samples=samples, residual=residual), layout))
    options = {"training": layout != "channels-last", "activation": activation}
    with fused(direct):
        check_against_float64(case, options, dy_layout="slice")


@interpreted
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_at_kinks_and_far_out(activation: str) -> None:
    with fused():
        check_at_kinks(activation)


@interpreted
@pytest.mark.parametrize(
    "learning", [(), ("x",), ("weight",), ("bias",), ("residual",), ("gate",), ("x", "residual")], ids=str
)
@pytest.mark.parametrize(("training", "activation"), [(True, "relu"), (False, "relu"), (True, "identity")])
def test_only_the_gradients_wanted(learning: tuple[str, ...], training: bool, activation: str) -> None:
    options = {"training": training, "activation": activation}
    with fused():
        check_against_float64(make(SHAPE, torch.float32, samples=3), options, learning=learning)


@interpreted
@pytest.mark.parametrize(
    ("x_layout", "residual_layout", "dy_layout"),
    [
        ("contiguous", "channels-last", "slice"),
        ("slice", "contiguous", "transposed"),
        ("cropped", "slice", "contiguous"),
        ("transposed", "cropped", "cropped"),
    ],
)
def test_each_tensor_in_a_layout_of_its_own(x_layout: str, residual_layout: str, dy_layout: str) -> None:
    case = make(SHAPE, torch.float32, samples=3)
    case["x"], case["residual"] = in_layout(case["x"], x_layout), in_layout(case["residual"], residual_layout)
    with fused():
        check_against_float64(case, TRAINING, dy_layout=dy_layout)


@interpreted
@pytest.mark.parametrize("samples", [None, 1, 5])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((5, 9, 7, 4), "contiguous"), ((5, 9, 7, 4), "slice"), ((5, 9, 2, 1), "channels-last"), ((5, 9), "contiguous")],
    ids=str,
)
def test_many_tiles_and_programs(shape: tuple[int, ...], samples: int | None, layout: str) -> None:
    with small_cuts(), fused():
        check_against_float64(laid_out(make(shape, torch.float32, samples=samples), layout), TRAINING)


@interpreted
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_many_tiles_and_programs_in_half_precision(dtype: torch.dtype, layout: str) -> None:
    with small_cuts(), fused():
        check_against_float64(laid_out(make((5, 9, 7, 4), dtype, samples=5), layout), TRAINING, dy_layout=layout)


@interpreted
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16])
def test_gates_and_weights_of_other_dtypes(x_dtype: torch.dtype) -> None:
    case = make(SHAPE, x_dtype, samples=3)
    other = torch.float16 if x_dtype == torch.float32 else torch.float32
    # A slice of the gates of a whole network.
    case["gate"] = torch.cat([torch.rand(3, 7), case["gate"].float(), torch.rand(3, 2)], 1).to(other)[:, 7:-2]
    case["weight"], case["bias"] = case["weight"].half(), None
    with fused():
        check_against_float64(case, TRAINING)
        case["gate"] = in_layout(case["gate"], "transposed")
        check_against_float64(case, TRAINING)


@interpreted
def test_broadcast_gradient() -> None:
    case = make(SHAPE, torch.float32, samples=3)
    tensors = [t.requires_grad_() for t in case.values()]
    with fused():
        y = batch_norm_act(*tensors[:3], None, None, training=True, residual=tensors[3], gate=tensors[4])
    expanded = torch.autograd.grad(y, tensors, torch.tensor(0.5).expand(y.shape), retain_graph=True)
    full = torch.autograd.grad(y, tensors, torch.full(y.shape, 0.5))
    for a, b in zip(expanded, full, strict=True):
        torch.testing.assert_close(a, b)


@interpreted
@pytest.mark.parametrize("training", [True, False])
def test_slices_of_longer_vectors(training: bool) -> None:
    case = make(SHAPE, torch.float32, samples=3)
    mean, var = torch.zeros(3, 11), torch.ones(3, 11)
    weights = torch.randn(2, 11, requires_grad=True)
    # Every second number: a stride, in what is read and in what is written.
    running = mean[1, 1::2], var[1, 1::2]
    alone = [t.clone() for t in running]
    arguments = {"training": training, "residual": case["residual"], "gate": case["gate"]}
    with fused():
        y = batch_norm_act(case["x"], weights[0, 3:8], weights[1, 1::2], *running, **arguments)
        expected = batch_norm_act(case["x"], weights[0, 3:8].clone(), weights[1, 1::2].clone(), *alone, **arguments)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert weights.grad is not None
    assert (weights.grad != 0).sum() == 10
    for whole, (slice_, vector), start in ((mean, (running[0], alone[0]), 0.0), (var, (running[1], alone[1]), 1.0)):
        assert torch.equal(slice_, vector)
        assert (slice_ != start).all() == training
        slice_.fill_(start)
        assert (whole == start).all()


@interpreted
def test_closed_gates_are_exact_zeros() -> None:
    case = make(SHAPE, torch.float32, samples=3)
    case["gate"][:, 2], case["gate"][1, 4] = 0, 0
    tensors = {name: t.requires_grad_() for name, t in case.items()}
    with fused():
        y = batch_norm_act(
            *[tensors[k] for k in NAMES[:3]],
            None,
            None,
            training=True,
            residual=tensors["residual"],
            gate=tensors["gate"],
        )
    assert (y[:, 2] == 0).all()
    assert (y[1, 4] == 0).all()
    y.backward(torch.randn(y.shape))
    assert (tensors["residual"].grad[:, 2] == 0).all()
    assert (tensors["x"].grad[:, 2] == 0).all()
    assert tensors["weight"].grad[2] == tensors["bias"].grad[2] == 0
    # Nothing passes a closed gate, but the gate itself learns what is behind it.
    assert (tensors["gate"].grad[:, 2] != 0).all()


@interpreted
def test_constant_channels() -> None:
    x = torch.randn(SHAPE)
    x[:, 1], x[:, 3] = 0, 1e4
    x.requires_grad_()
    bias, mean, var = torch.full((5,), 0.5), torch.zeros(5), torch.ones(5)
    with fused():
        y = batch_norm_act(x, None, bias, mean, var, training=True)
    assert (y[:, [1, 3]] == 0.5).all()
    torch.testing.assert_close(mean[[1, 3]], torch.tensor([0.0, 1e3]))
    torch.testing.assert_close(var[[1, 3]], torch.tensor([0.9, 0.9]))
    y.sum().backward()
    assert x.grad.isfinite().all()


@interpreted
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_far_from_zero_nothing_cancels(layout: str) -> None:
    # 1000 ± 0.1 in float32: the mean of squares less the squared mean would be noise.
    x = in_layout(1e3 + 0.1 * torch.randn(6, 5, 8, 8), layout)
    # A program whose first tile lies far from all others.
    x[0, 3], x[0, 4, 0, 0] = 0.0, -1e3
    mean, var = torch.zeros(5), torch.zeros(5)
    expected = x.double().movedim(1, 0).flatten(1)
    for cut in (small_cuts(), small_cuts(16, 1)):
        with cut, fused():
            y = batch_norm_act(x, None, None, mean, var, training=True, momentum=1.0, activation="identity", eps=0.0)
        torch.testing.assert_close(mean.double(), expected.mean(1), rtol=1e-6, atol=0)
        torch.testing.assert_close(var.double(), expected.var(1), rtol=1e-4, atol=0)
        normal = (expected - expected.mean(1, True)) / expected.var(1, unbiased=False, keepdim=True).sqrt()
        torch.testing.assert_close(y.double().movedim(1, 0).flatten(1), normal, rtol=0, atol=1e-3)


@interpreted
@pytest.mark.parametrize("pooled", [False, True])
def test_every_pass_rounds_the_scale_alike(pooled: bool) -> None:
    """Where the activation's argument is 0 or just above, by how weight / std is rounded, all passes must agree on which."""
    weight, var = torch.rand(2, 64).add(0.5)
    std = (var + 1e-5).sqrt()
    x = torch.ones(2, 64, 1, 1).requires_grad_()
    bias = -torch.where(torch.arange(64) % 2 == 0, weight / std, weight * (1 / std)).requires_grad_()
    bias.retain_grad()
    arguments = (x, weight, bias, torch.zeros(64), var)
    with fused():
        if pooled:
            y = batch_norm_act_pool(*arguments, training=False, kernel_size=1, stride=1)
        else:
            y = batch_norm_act(*arguments, training=False)
        y.sum().backward()
    passes = (y > 0)[0].flatten()
    assert 0 < passes.sum() < 64
    assert torch.equal(passes, bias.grad != 0)
    assert torch.equal(passes, x.grad[0].flatten() != 0)


@interpreted
def test_not_a_number_is_not_hidden() -> None:
    x = torch.randn(SHAPE)
    x[1, 2, 0, 0] = float("nan")
    mean, var = torch.zeros(5), torch.ones(5)
    with fused():
        assert batch_norm_act(x, None, None, mean, var, training=False).isnan().sum() == 1
        y = batch_norm_act(x, None, None, mean, var, training=True)
    for tensor in (y[:, 2], mean[2], var[2]):
        assert tensor.isnan().all()
    assert y[:, [0, 1, 3, 4]].isfinite().all()


@interpreted
def test_offsets_beyond_32_bits() -> None:
    # Sample 2 of such a tensor starts 2^31 elements in. Only the pages that are written exist.
    torch.use_deterministic_algorithms(False)
    stride = 2**30
    far = torch.empty(2 * stride + 20, dtype=torch.float16)
    x = far.as_strided((3, 5, 2, 2), (stride, 4, 2, 1))
    case = make((3, 5, 2, 2), torch.float16, samples=3)
    case["x"] = x.copy_(case["x"])
    with fused():
        check_against_float64(case, TRAINING)
        case["x"], case["residual"] = case["residual"], x
        check_against_float64(case, TRAINING)


@interpreted
def test_what_is_kept_for_the_backward_pass() -> None:
    def kept(activation: str, gate_learns: bool) -> list[tuple[int, ...]]:
        case = make(SHAPE, torch.float32, samples=3)
        x = case["x"].requires_grad_()
        case["gate"].requires_grad_(gate_learns)
        shapes: list[tuple[int, ...]] = []
        with (
            fused(),
            torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t),
        ):
            batch_norm_act(
                x,
                None,
                None,
                None,
                None,
                training=True,
                activation=activation,
                residual=case["residual"],
                gate=case["gate"],
            )
        return sorted(shapes)

    vectors = [(3, 5), (5,), (5,)]
    assert (
        kept("relu", False) == kept("relu", True) == kept("identity", True) == [vectors[0], SHAPE, SHAPE, *vectors[1:]]
    )
    assert kept("silu", False) == kept("relu", False)
    assert kept("identity", False) == [vectors[0], SHAPE, *vectors[1:]]


@interpreted
@pytest.mark.parametrize("direct", [True, False])
def test_running_statistics_change_their_version(direct: bool) -> None:
    x, mean, var = torch.randn(SHAPE, requires_grad=True), torch.zeros(5), torch.ones(5)
    with fused(direct):
        y = batch_norm_act(x, None, None, mean, var, training=False)
        batch_norm_act(x, None, None, mean, var, training=True)
    # The statistics that y was computed with are gone: an error, not a wrong gradient.
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@interpreted
def test_second_derivative_of_an_operator_is_refused() -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    with fused(direct=False):
        (dx,) = torch.autograd.grad(
            batch_norm_act(x, None, None, None, None, training=True).sum(), x, create_graph=True
        )
    with pytest.raises(RuntimeError):
        dx.sum().backward()


@interpreted
def test_second_derivative_of_a_plain_call() -> None:
    found = []
    for operation in (batch_norm_act, batch_norm_act_reference):
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)).requires_grad_()
        with fused():
            (dx,) = torch.autograd.grad(
                operation(x, None, None, None, None, training=True).square().sum(), x, create_graph=True
            )
            found.append((dx, *torch.autograd.grad(dx.square().sum(), x)))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

"""What the tests of the fused BatchNorm share: cases, layouts, and the comparison with the float64 reference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from fastmerge.kernels.batch_norm import (
    ACTIVATIONS,
    act,
    batch_norm_act,
    batch_norm_act_pool,
    batch_norm_act_streams,
    tiles,
)
from fastmerge.kernels.batch_norm.formulas import batch_norm_act_pool_reference, batch_norm_act_reference
from torch import Tensor

# Relative and absolute, for results of order 1.
TOLERANCES = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-2},
}
DTYPES = list(TOLERANCES)
# Those beside ReLU and the identity, which most cases run with.
OTHER_ACTIVATIONS = ["relu6", "silu", "hardswish"]
LAYOUTS = ["contiguous", "channels-last", "slice"]
# Smallest, odd, typical, just past the blocks (of 8 channels and 16 positions), and without a plane.
SHAPES = [(2, 1, 1, 1), (3, 5, 7, 3), (4, 16, 4, 8), (2, 18, 5, 4), (7, 13), (3, 6, 10)]

by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
# Every dtype in both dense layouts, every layout in one dtype.
by_dtype_and_layout = pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.float32, layout) for layout in LAYOUTS]
    + [(dtype, layout) for dtype in DTYPES[1:] for layout in LAYOUTS[:2]],
)

NAMES = ("x", "weight", "bias", "residual", "gate")


def in_layout(tensor: Tensor, layout: str) -> Tensor:
    """A copy of a tensor of shape (N, C, ...) that lies in memory as told."""
    if layout == "contiguous":
        return tensor.clone(memory_format=torch.contiguous_format)
    if layout == "transposed":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "cropped":
        wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 3, dtype=tensor.dtype, device=tensor.device)
        wide[..., 1:-2] = tensor
        return wide[..., 1:-2]
    channels = {"channels-last": tensor.shape[1], "slice": tensor.shape[1] + 8}[layout]
    last = tensor.new_full((tensor.shape[0], *tensor.shape[2:], channels), float("nan"))
    view = last.movedim(-1, 1)[:, channels - tensor.shape[1] :]
    return view.copy_(tensor)


def make(
    shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", samples: int | None = None, residual: bool = True
) -> dict[str, Tensor | None]:
    """Inputs of one call, contiguous: weights in float32, gates closed, open and between, one row for each of ``samples``."""
    generator = torch.Generator().manual_seed(0)
    channels = shape[1]
    gate = None if samples is None else (1.6 * torch.rand(samples, channels, generator=generator) - 0.3).clamp(0, 1)
    case = {
        "x": 2 * torch.randn(shape, generator=generator)
        + torch.linspace(-3, 3, channels).reshape(-1, *[1] * (len(shape) - 2)),
        "weight": torch.randn(channels, generator=generator),
        "bias": torch.randn(channels, generator=generator),
        "residual": torch.randn(shape, generator=generator) if residual else None,
        "gate": gate,
    }
    wide = {"weight", "bias"}
    return {
        name: None if t is None else t.to(device, torch.float32 if name in wide else dtype) for name, t in case.items()
    }


def stretched(case: dict[str, Any]) -> dict[str, Any]:
    """The case with weights that take some arguments of the activation beyond all kinks."""
    return case | {"weight": 4 * case["weight"]}


def laid_out(case: dict[str, Any], layout: str) -> dict[str, Any]:
    """The case with its images in one layout."""
    return {k: in_layout(t, layout) if t is not None and k in ("x", "residual") else t for k, t in case.items()}


def check_against_float64(
    case: dict[str, Tensor | None],
    options: dict[str, Any],
    *,
    learning: tuple[str, ...] = NAMES,
    dy_layout: str = "contiguous",
    operation: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Compares result, running statistics and gradients with those of the reference in float64; returns the result.

    Args:
        case: see ``make``; the tensors' layouts are kept.
        options: of ``batch_norm_act``, or with a kernel_size of ``batch_norm_act_pool``.
        learning: which tensors of the case require a gradient.
        dy_layout: of the result's gradient.
        operation: in place of the public function.
    """
    pooled = "kernel_size" in options
    function = operation or (batch_norm_act_pool if pooled else batch_norm_act)
    reference = batch_norm_act_pool_reference if pooled else batch_norm_act_reference
    x = case["x"]
    assert x is not None
    running = torch.linspace(-1, 1, x.shape[1]), torch.linspace(0.5, 2, x.shape[1])

    near_kink = _near_kink(case, options, running)
    deterministic = torch.are_deterministic_algorithms_enabled()
    results = []
    for call, double in ((function, False), (reference, True)):
        # The pooling of torch has no deterministic backward pass on CUDA.
        torch.use_deterministic_algorithms(deterministic and not double)
        tensors = {name: None if t is None else t.detach() for name, t in case.items()}
        if double:
            tensors = {name: None if t is None else t.double() for name, t in tensors.items()}
        learners = {name: t.requires_grad_() for name, t in tensors.items() if t is not None and name in learning}
        mean, var = (t.to(x.device, torch.float64 if double else torch.float32, copy=True) for t in running)
        named = {name: tensors[name] for name in ("residual", "gate") if tensors[name] is not None}
        y = call(tensors["x"], tensors["weight"], tensors["bias"], mean, var, **named, **options)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(x.device, x.dtype)
        dy = in_layout(dy.masked_fill(near_kink, 0), dy_layout)
        gradients = torch.autograd.grad(y, list(learners.values()), dy.double() if double else dy) if learners else ()
        outputs = {"y": y.detach(), "running_mean": mean, "running_var": var}
        results.append(outputs | dict(zip(learners, gradients, strict=True)))
        for name, gradient in zip(learners, gradients, strict=True):
            assert gradient.dtype == learners[name].dtype, name
    torch.use_deterministic_algorithms(deterministic)

    got, expected = results
    assert (got["y"].dtype, got["y"].device) == (x.dtype, x.device)
    steepness = _steepness(case, options, running)
    for name, tensor in got.items():
        dtypes = (tensor.dtype,) if name.startswith("running") else (tensor.dtype, x.dtype)
        tolerance = dict(max((TOLERANCES[dtype] for dtype in dtypes), key=lambda t: t["rtol"]))
        # What is rounded before the scale of weight / std multiplies it; sums hold many rounded terms.
        tolerance["atol"] *= steepness * (1 + expected[name].abs().max().item())
        torch.testing.assert_close(
            tensor.double(), expected[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
    return got["y"]


def check_at_kinks(activation: str) -> None:
    """Compares result and gradient with torch's at the ends of an activation's pieces, beside them and far out."""
    near = torch.tensor([0.0, 3.0, 6.0]).repeat_interleave(3)
    near = torch.nextafter(near, near + torch.tensor([-1.0, 0.0, 1.0]).repeat(3))
    far = torch.tensor([17.0, 80.0, 1e4])
    x = torch.cat([near, far, -near, -far]).repeat(2, 1).requires_grad_()
    y = batch_norm_act(x, None, None, torch.zeros(24), torch.ones(24), training=False, eps=0.0, activation=activation)
    expected = ACTIVATIONS[activation](x)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-12)
    for got, wanted in zip(torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-12)


# Where the slope of an activation jumps.
KINKS = {"relu": (0.0,), "relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0)}


def _near_kink(case: dict[str, Tensor | None], options: dict[str, Any], running: tuple[Tensor, Tensor]) -> Tensor:
    """Where the activation's argument is so near a kink that rounding may decide about a gradient; pooled, in any window."""
    x, weight, bias, residual = (None if t is None else t.detach().double() for t in list(case.values())[:4])
    assert x is not None
    mean, var = (t.double().to(x.device) for t in running)
    pooling = {name: options[name] for name in ("kernel_size", "stride", "padding") if name in options}
    plain = {name: value for name, value in options.items() if name not in pooling} | {"activation": "identity"}
    z = batch_norm_act_reference(x, weight, bias, mean, var, residual=residual, **plain)
    near = torch.zeros_like(z)
    for kink in KINKS.get(options.get("activation", "relu"), ()):
        near[(z - kink).abs() < 1e-4] = 1
    return (F.max_pool2d(near, **pooling) if pooling else near) > 0


def _steepness(case: dict[str, Tensor | None], options: dict[str, Any], running: tuple[Tensor, Tensor]) -> float:
    x, weight = case["x"], case["weight"]
    assert x is not None
    var = (
        x.double().movedim(1, 0).flatten(1).var(1, unbiased=False).cpu() if options["training"] else running[1].double()
    )
    scale = (var + 1e-5).rsqrt() * (1 if weight is None else weight.detach().double().cpu().abs())
    return max(1.0, scale.max().item())


def streams_of(tensors: Sequence[Tensor], place: str, layout: str) -> list[Tensor]:
    """Copies of tensors that lie in memory as told: anyhow, one behind the other, or as slices of one joined tensor."""
    if place == "apart":
        return [in_layout(tensor, layout) for tensor in tensors]
    if place == "slices":
        return list(in_layout(torch.cat(list(tensors), 1), layout).split(tensors[0].shape[1], 1))
    return list(in_layout(torch.cat(list(tensors)), layout).split(tensors[0].shape[0]))


def _plain_streams(
    xs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    residuals: Sequence[Tensor] | None = None,
    gate: Tensor | None = None,
    pool: tuple[int, int, int] | None = None,
    num_batches_tracked: Tensor | None = None,
    readers: int = 1,
    **options: Any,
) -> tuple[Tensor, ...]:
    """The reference, stream by stream."""
    outputs = []
    vectors = [v.chunk(len(xs)) for v in (weight, bias, mean, var)]
    for t, x in enumerate(xs):
        own: dict[str, Any] = {"gate": None if gate is None else gate.chunk(len(xs), 1)[t], **options}
        tensors = [vector[t] for vector in vectors]
        if pool is None:
            residual = None if residuals is None else residuals[t]
            outputs.append(batch_norm_act_reference(x, *tensors, residual=residual, **own))
        else:
            kernel_size, stride, padding = pool
            own |= {"kernel_size": kernel_size, "stride": stride, "padding": padding}
            outputs.append(batch_norm_act_pool_reference(x, *tensors, **own))
    if num_batches_tracked is not None:
        num_batches_tracked += 1
    return tuple(outputs) * readers


def check_streams(
    count: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    place: str = "apart",
    dy_place: str = "apart",
    layout: str = "channels-last",
    dy_layout: str | None = None,
    residual: bool = False,
    samples: int | None = None,
    readers: int = 2,
    silent: tuple[int, ...] = (),
    pool: tuple[int, int, int] | None = None,
    activation: str = "relu",
    device: str = "cpu",
) -> None:
    """Compares results, statistics, counters and all gradients; results in ``silent`` send no gradient back."""
    cases = [make(shape, torch.float32, samples=samples, residual=residual) for _ in range(count)]
    generator = torch.Generator().manual_seed(2)
    values = {
        "x": [case["x"] + torch.randn(shape, generator=generator) * (t + 1) for t, case in enumerate(cases)],
        "residual": [case["residual"] * (t + 1) for t, case in enumerate(cases)] if residual else [],
    }
    values = {
        k: streams_of([t.to(device, dtype) for t in tensors], place, layout) if tensors else []
        for k, tensors in values.items()
    }
    vectors = {
        "weight": torch.cat([case["weight"] + t for t, case in enumerate(cases)]).to(device),
        "bias": torch.cat([case["bias"] - t for t, case in enumerate(cases)]).to(device),
        "gate": None
        if samples is None
        else torch.rand(samples, count * shape[1], generator=generator).to(device, dtype),
    }
    outputs = []
    for function, double in ((batch_norm_act_streams, False), (_plain_streams, True)):
        flat = {
            **vectors,
            **{f"x{t}": x for t, x in enumerate(values["x"])},
            **{f"residual{t}": r for t, r in enumerate(values["residual"])},
        }
        flat = {k: t.detach().double() if double else t.detach() for k, t in flat.items() if t is not None}
        # In place, for a copy would lie elsewhere.
        learners = {name: tensor.requires_grad_() for name, tensor in flat.items()}
        running = [torch.linspace(low, 2, count * shape[1], dtype=torch.float64) for low in (-1, 0.5)]
        mean, var = (t.to(device, torch.float64 if double else torch.float32) for t in running)
        batches = torch.arange(count, device=device)
        ys = function(
            [learners[f"x{t}"] for t in range(count)],
            learners["weight"],
            learners["bias"],
            *(mean, var),
            training=True,
            momentum=0.3,
            activation=activation,
            residuals=[learners[f"residual{t}"] for t in range(count)] if residual else None,
            gate=learners.get("gate"),
            pool=pool,
            num_batches_tracked=batches,
            readers=readers,
        )
        assert len(ys) == readers * count
        generator = torch.Generator().manual_seed(1)
        dys = [torch.randn(y.shape, generator=generator).to(device, dtype) for y in ys]
        send = [t for t in range(len(ys)) if t not in silent]
        dys = [
            *streams_of(dys[:count], dy_place, dy_layout or layout),
            *streams_of(dys[count:] or dys, dy_place, layout),
        ]
        gradients = torch.autograd.grad(
            [ys[t] for t in send],
            list(learners.values()),
            [dys[t].double() if double else dys[t] for t in send],
            allow_unused=bool(silent),
        )
        found = {f"y{t}": y.detach() for t, y in enumerate(ys)} | {"mean": mean, "var": var, "batches": batches}
        outputs.append(found | dict(zip(learners, gradients, strict=True)))
    got, expected = outputs
    tolerance = TOLERANCES[dtype]
    for name, tensor in expected.items():
        if tensor is None or got[name] is None:
            assert not any(found is not None and found.any() for found in (tensor, got[name])), name
            continue
        atol = 4 * tolerance["atol"] * (1 + tensor.double().abs().max().item())
        torch.testing.assert_close(
            got[name].double(),
            tensor.double(),
            rtol=tolerance["rtol"],
            atol=atol,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@contextlib.contextmanager
def fused(direct: bool = True) -> Iterator[None]:
    """Sends the public functions through the kernels on the CPU too: straight, or by way of the custom operators."""
    # Functions instead of mocks, for torch.compile traces them.
    replaced = {"_holds_kernels": _yes} if direct else {"_holds_kernels": _yes, "runs_direct": _no}
    with mock.patch.multiple(act, **replaced):
        yield


def _yes(x: Tensor) -> bool:
    return True


def _no(x: Tensor) -> bool:
    return False


@contextlib.contextmanager
def small_cuts(tile: int = 64, programs: int = 4) -> Iterator[None]:
    """Cuts tensors as if they were large: several tiles to a program, several programs along N and P."""
    cut = {"programs": programs, "least": 1, "most": 3}
    with tiles.constants(_TILE=tile, _POOLING_TILE=tile, _LINE_BYTES=16, _SUMMING=cut, _WRITING=cut, _FEW_PROGRAMS=1):
        yield

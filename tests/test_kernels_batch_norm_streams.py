"""BatchNorm of several streams in one call, each result for one or two readers: against float64, in every way it can run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from fastmerge.kernels.batch_norm import batch_norm_act_streams, cpu, joined_of
from fastmerge.kernels.batch_norm.formulas import batch_norm_act_pool_reference, batch_norm_act_reference
from torch import Tensor

from batch_norm_checks import DTYPES, TOLERANCES, fused, in_layout, make, small_cuts
from gate_checks import poisoned_memory  # noqa: F401
from interpreter import INTERPRETING, interpreted

pytestmark = pytest.mark.usefixtures("poisoned_memory")

STEM = (3, 2, 1)
SHAPE = (3, 5, 7, 4)
SMALL = (2, 5, 3, 2)  # for the interpreter
needs_extension = pytest.mark.skipif(cpu._batch_norm is None, reason="the C++ extension is not built")
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def streams_of(tensors: Sequence[Tensor], place: str, layout: str) -> list[Tensor]:
    """Copies of tensors that lie in memory as told: anyhow, one behind the other, or as slices of one joined tensor."""
    if place == "apart":
        return [in_layout(tensor, layout) for tensor in tensors]
    if place == "slices":
        return list(in_layout(torch.cat(list(tensors), 1), layout).split(tensors[0].shape[1], 1))
    return list(in_layout(torch.cat(list(tensors)), layout).split(tensors[0].shape[0]))


def plain(
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


def check(
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
) -> None:
    """Compares results, statistics, counters and all gradients; results in ``silent`` send no gradient back."""
    cases = [make(shape, dtype, samples=samples, residual=residual) for _ in range(count)]
    generator = torch.Generator().manual_seed(2)
    values = {
        "x": streams_of([case["x"] + torch.randn(shape, generator=generator) * (t + 1) for t, case in enumerate(cases)],
                        place, layout),
        "weight": torch.cat([case["weight"] + t for t, case in enumerate(cases)]),
        "bias": torch.cat([case["bias"] - t for t, case in enumerate(cases)]),
        "residual": streams_of([case["residual"] * (t + 1) for t, case in enumerate(cases)], place, layout)
        if residual else [],
        "gate": None if samples is None else torch.rand(samples, count * shape[1], generator=generator).to(dtype),
    }  # fmt: skip
    outputs = []
    for function, double in ((batch_norm_act_streams, False), (plain, True)):
        flat = {
            "weight": values["weight"],
            "bias": values["bias"],
            "gate": values["gate"],
            **{f"x{t}": x for t, x in enumerate(values["x"])},
            **{f"residual{t}": r for t, r in enumerate(values["residual"])},
        }
        flat = {k: t.detach().double() if double else t.detach() for k, t in flat.items() if t is not None}
        # In place, for a copy would lie elsewhere.
        learners = {name: tensor.requires_grad_() for name, tensor in flat.items()}
        running = [torch.linspace(low, 2, count * shape[1], dtype=torch.float64) for low in (-1, 0.5)]
        mean, var = (t if double else t.float() for t in running)
        batches = torch.arange(count)
        ys = function(
            [learners[f"x{t}"] for t in range(count)],
            learners["weight"],
            learners["bias"],
            *(mean, var),
            training=True,
            momentum=0.3,
            residuals=[learners[f"residual{t}"] for t in range(count)] if residual else None,
            gate=learners.get("gate"),
            pool=pool,
            num_batches_tracked=batches,
            readers=readers,
        )
        assert len(ys) == readers * count
        generator = torch.Generator().manual_seed(1)
        dys = [torch.randn(y.shape, generator=generator).to(dtype) for y in ys]
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


@interpreted
@by_dtype
@pytest.mark.parametrize(
    "options",
    [
        {"residual": True, "samples": 2},
        {"readers": 1, "samples": 1},
        {"samples": 2, "pool": STEM, "place": "slices"},
        {"layout": "contiguous", "residual": True, "dy_layout": "slice"},
    ],
    ids=str,
)
def test_kernels_against_float64(dtype: torch.dtype, options: dict[str, Any]) -> None:
    # Several tiles to a program and several programs; those that pool are many anyway.
    with fused(), small_cuts(tile=16) if "pool" not in options else nullcontext():
        check(2, SMALL, dtype, **options)


@interpreted
@pytest.mark.parametrize("pool", [None, STEM], ids=["", "pool"])
@pytest.mark.parametrize(("place", "dy_place"), [("apart", "apart"), ("slices", "behind"), ("behind", "apart")])
def test_three_streams_that_lie_anyhow(place: str, dy_place: str, pool: tuple[int, int, int] | None) -> None:
    with fused():
        check(3, (2, 8, 3, 2), torch.float32, place=place, dy_place=dy_place, samples=2, residual=not pool, pool=pool)


SILENT = [(2, 3), (0, 1), (1,), (3,), (0, 2), (0, 1, 2)]


@interpreted
@pytest.mark.parametrize("pool", [None, STEM], ids=["", "pool"])
@pytest.mark.parametrize("silent", SILENT[1:4], ids=str)
def test_kernels_where_a_reader_sends_nothing_back(silent: tuple[int, ...], pool: tuple[int, int, int] | None) -> None:
    with fused():
        check(2, SMALL, torch.float32, samples=2, silent=silent, pool=pool)


@interpreted
def test_operators_hand_out_for_two_readers() -> None:
    for pool in (None, STEM):
        with fused(direct=False):
            check(2, SMALL, torch.float32, samples=2, pool=pool, residual=not pool)


@needs_extension
@pytest.mark.skipif(INTERPRETING, reason="says nothing about the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("samples", [None, 1, 3])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("place", ["apart", "slices", "behind"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_extension_against_float64(
    count: int, place: str, residual: bool, samples: int | None, dtype: torch.dtype
) -> None:
    for dy_place in ("apart", "slices"):
        check(count, SHAPE, dtype, place=place, dy_place=dy_place, residual=residual, samples=samples)


@pytest.mark.skipif(INTERPRETING, reason="says nothing about the interpreter")
@pytest.mark.parametrize("layout", ["channels-last", "contiguous"])
@pytest.mark.parametrize("silent", SILENT, ids=str)
def test_extension_where_a_reader_sends_nothing_back(silent: tuple[int, ...], layout: str) -> None:
    check(2, SHAPE, torch.float32, samples=3, silent=silent, layout=layout)
    check(2, SHAPE, torch.float32, samples=3, silent=silent, pool=STEM, layout=layout)


@pytest.mark.skipif(INTERPRETING, reason="says nothing about the interpreter")
def test_second_derivatives_of_two_readers() -> None:
    x = in_layout(torch.randn(SHAPE, dtype=torch.float32), "channels-last")
    found = []
    for readers, dtype in ((2, torch.float32), (1, torch.float64)):
        own = x.detach().to(dtype).requires_grad_()
        ys = batch_norm_act_streams((own,), None, None, None, None, training=True, readers=readers)
        (first,) = torch.autograd.grad((ys[0] * ys[-1].square()).sum(), own, create_graph=True)
        found.append([first.detach(), *torch.autograd.grad(first.square().sum(), own)])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3)


@interpreted
@pytest.mark.parametrize("pool", [None, STEM], ids=["", "pool"])
def test_gradients_of_slices_are_slices_of_one_tensor(pool: tuple[int, int, int] | None) -> None:
    for layout in ("channels-last", "contiguous"):
        xs = streams_of([torch.randn(2, 8, 4, 2) for _ in range(2)], "slices", layout)
        xs = [x.detach().requires_grad_() for x in xs]
        with fused():
            ys = batch_norm_act_streams(xs, None, None, None, None, training=True, pool=pool)
            gradients = torch.autograd.grad(ys, xs, [torch.randn(y.shape) for y in ys])
        joined = joined_of(gradients, 1)
        assert joined is not None
        assert torch.equal(joined, torch.cat(gradients, 1))
        assert joined.movedim(1, -1 if layout == "channels-last" else 1).is_contiguous()


@needs_extension
@pytest.mark.skipif(INTERPRETING, reason="says nothing about the interpreter")
def test_results_of_one_reader_may_change_in_place() -> None:
    xs = [in_layout(torch.randn(SHAPE), "channels-last").requires_grad_() for _ in range(2)]
    first, second = batch_norm_act_streams(xs, None, None, None, None, training=True)
    before = second.detach().clone()
    first.add_(1)
    assert torch.equal(second, before)
    (first.square().sum() + second.sum()).backward()
    with pytest.raises(ValueError, match="streams of one shape"):
        batch_norm_act_streams((xs[0], xs[1][:2]), None, None, None, None, training=True)

"""BatchNorm of several streams in one call, each result for one or two readers: against float64, in every way it can run."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from fastmerge.kernels.batch_norm import batch_norm_act_streams, cpu, joined_of

from batch_norm_checks import DTYPES, check_streams, fused, in_layout, small_cuts, streams_of
from interpreter import INTERPRETING, interpreted

pytestmark = pytest.mark.usefixtures("poisoned_memory")

STEM = (3, 2, 1)
SHAPE = (3, 5, 7, 4)
SMALL = (2, 5, 3, 2)  # for the interpreter
needs_extension = pytest.mark.skipif(cpu._batch_norm is None, reason="the C++ extension is not built")
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@interpreted
@by_dtype
@pytest.mark.parametrize(
    "options",
    [
        {"residual": True, "samples": 2},
        {"readers": 1, "samples": 1, "activation": "silu"},
        {"samples": 2, "pool": STEM, "place": "slices", "activation": "hardswish"},
        {"layout": "contiguous", "residual": True, "dy_layout": "slice", "activation": "relu6"},
    ],
    ids=str,
)
def test_kernels_against_float64(dtype: torch.dtype, options: dict[str, Any]) -> None:
    # Several tiles to a program and several programs; those that pool are many anyway.
    with fused(), small_cuts(tile=16) if "pool" not in options else nullcontext():
        check_streams(2, SMALL, dtype, **options)


@interpreted
@pytest.mark.parametrize("pool", [None, STEM], ids=["", "pool"])
@pytest.mark.parametrize(("place", "dy_place"), [("apart", "apart"), ("slices", "behind"), ("behind", "apart")])
def test_three_streams_that_lie_anyhow(place: str, dy_place: str, pool: tuple[int, int, int] | None) -> None:
    with fused():
        check_streams(
            3, (2, 8, 3, 2), torch.float32, place=place, dy_place=dy_place, samples=2, residual=not pool, pool=pool
        )


@interpreted
@pytest.mark.parametrize("pool", [None, STEM], ids=["", "pool"])
def test_views_of_larger_tensors_give_what_their_copies_give(pool: tuple[int, int, int] | None) -> None:
    torch.manual_seed(0)
    c = 2 * SMALL[1]
    views = [torch.rand(2 * c)[::2] for _ in range(4)] + [torch.rand(c, SMALL[0]).t()]
    views += [in_layout(torch.randn(SMALL), "cropped") for _ in range(4)]
    found = []
    for tensors in (views, [view.contiguous() for view in views]):
        leaves = [
            t.requires_grad_() if k not in (2, 3) else t.clone() for k, t in enumerate(t.detach() for t in tensors)
        ]
        weight, bias, mean, var, gate, *xs = leaves
        running = torch.empty(2, 2 * c)[:, ::2] if tensors is views else torch.empty(2, c)
        running.copy_(torch.stack([mean, var]))
        with fused(), small_cuts(tile=16):
            ys = batch_norm_act_streams(
                *(xs[:2], weight, bias, *running),
                training=True,
                gate=gate,
                pool=pool,
                residuals=None if pool else xs[2:],
            )
            learners = [weight, bias, gate, *xs[: 2 if pool else 4]]
            grads = torch.autograd.grad(sum(y.square().sum() for y in ys), learners)
        found.append([*ys, *running, *grads])
    for of_views, of_copies in zip(*found, strict=True):
        torch.testing.assert_close(of_views, of_copies)


SILENT = [(2, 3), (0, 1), (1,), (3,), (0, 2), (0, 1, 2)]


@interpreted
@pytest.mark.parametrize("pool", [None, STEM], ids=["", "pool"])
@pytest.mark.parametrize("silent", SILENT[1:4], ids=str)
def test_kernels_where_a_reader_sends_nothing_back(silent: tuple[int, ...], pool: tuple[int, int, int] | None) -> None:
    with fused():
        check_streams(2, SMALL, torch.float32, samples=2, silent=silent, pool=pool)


@interpreted
def test_operators_hand_out_for_two_readers() -> None:
    for pool in (None, STEM):
        with fused(direct=False):
            check_streams(2, SMALL, torch.float32, samples=2, pool=pool, residual=not pool)


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
    for dy_place, activation in (("apart", "relu"), ("slices", "silu")):
        more = {"residual": residual, "samples": samples, "activation": activation}
        check_streams(count, SHAPE, dtype, place=place, dy_place=dy_place, **more)


@pytest.mark.skipif(INTERPRETING, reason="says nothing about the interpreter")
@pytest.mark.parametrize("layout", ["channels-last", "contiguous"])
@pytest.mark.parametrize("silent", SILENT, ids=str)
def test_extension_where_a_reader_sends_nothing_back(silent: tuple[int, ...], layout: str) -> None:
    check_streams(2, SHAPE, torch.float32, samples=3, silent=silent, layout=layout)
    check_streams(2, SHAPE, torch.float32, samples=3, silent=silent, pool=STEM, layout=layout)


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

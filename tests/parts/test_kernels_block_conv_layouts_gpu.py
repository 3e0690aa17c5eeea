"""The block convolution's contiguous tensors, and float32 with and without TF32, on a GPU (``pytest -m gpu``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from fastmerge.kernels.block_conv import block_diagonal_conv2d, conv2d, grouped_conv2d, ops
from fastmerge.kernels.block_conv.choice import fixed_choice
from fastmerge.kernels.block_conv.formulas import fetches_boxes
from torch import Tensor

from block_conv_checks import Case, Operands, compare, contiguous, contiguous_slices, joined, operands
from block_conv_tiles import check_tiles

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(
        not (torch.cuda.is_available() and fetches_boxes(torch.device("cuda"))), reason="needs compute capability 9.0"
    ),
    pytest.mark.usefixtures("poisoned_memory", "own_choices"),
]

CASES = [Case(2, 4, 14, 14, 64, 128, 3, 2), Case(3, 5, 7, 9, 24, 40, 3, 1), Case(2, 3, 9, 7, 12, 20, 1, 1)]
SLACK = 50  # cuDNN may transform small kernels (Winograd), or sum in parts that it rounds


@pytest.fixture
def without_tf32() -> Iterator[None]:
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True


@pytest.mark.usefixtures("without_tf32")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_tile_of_float32_without_tf32(case: Case) -> None:
    given = operands(case, torch.float32, "cuda")
    check_tiles(case, given, given.xs, given.dys)


def differentiate(
    function: Callable[..., object], given: Operands, xs: list[Tensor], dys: list[Tensor], slack: float
) -> list[tuple[int, ...]]:
    leaves = [t.detach().requires_grad_() for t in (*xs, given.weight, given.bias)]
    ys = function(leaves[: len(xs)], leaves[-2], leaves[-1])
    *dxs, dw, db = torch.autograd.grad(ys, leaves, dys)
    for name, results in {"y": ys, "dx": dxs, "dw": [dw], "db": [db]}.items():
        compare(name, results, given, slack)
    return [t.stride() for t in (*ys, *dxs, dw)]


@pytest.mark.parametrize("layout", [contiguous, contiguous_slices])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("choice", ["triton", "split", "groups"])
def test_contiguous_tensors_through_autograd(
    choice: str, dtype: torch.dtype, layout: Callable[..., list[Tensor]]
) -> None:
    case = CASES[0]
    given, options = operands(case, dtype, "cuda"), {"stride": 2, "padding": 1}
    slack = 1 if choice == "triton" else SLACK

    def apart(xs: list[Tensor], *rest: Tensor) -> object:
        return block_diagonal_conv2d(xs, *rest, **options)

    def together(xs: list[Tensor], *rest: Tensor) -> object:
        return [grouped_conv2d(xs[0], *rest, groups=2, **options)]

    for function, way in ((apart, lambda tensors: tensors), (together, lambda tensors: contiguous(joined(tensors)))):
        xs, dys = layout(way(given.xs)), layout(way(given.dys))
        with mock.patch.object(conv2d, "worth_an_operation", return_value=False):
            plain = differentiate(function, given, xs, dys, SLACK)
        with fixed_choice(choice), mock.patch.object(conv2d, "worth_an_operation", return_value=True):
            assert differentiate(function, given, xs, dys, slack) == plain


@pytest.mark.parametrize("choice", ["triton", "split"])
def test_opcheck(choice: str) -> None:
    given = operands(Case(2, 2, 6, 6, 16, 16, 3, 1), torch.float32, "cuda")
    xs = [x.contiguous().requires_grad_() for x in given.xs]
    with fixed_choice(choice):
        arguments = (xs, given.weight.clone().requires_grad_(), given.bias, 2, [1, 1], [1, 1], [1, 1], [], False)
        torch.library.opcheck(ops.block_conv, arguments)

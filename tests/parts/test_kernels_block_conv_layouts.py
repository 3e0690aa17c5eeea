"""Layouts of the block convolution's tensors: what counts as channels-last, and contiguous ones through every pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from fastmerge.kernels.block_conv import (
    block_diagonal_conv2d,
    block_sparse_conv2d,
    cudnn,
    grouped_conv2d,
    live_blocks,
    ops,
    passes,
)
from fastmerge.kernels.block_conv.choice import choices, fixed_choice
from fastmerge.kernels.block_conv.layouts import empty_laid_out, laid_out, lies_channels_last, turned_weight
from fastmerge.kernels.block_conv.problem import Problem
from torch import Tensor
from torch._subclasses import FakeTensorMode

from block_conv_checks import Case, Operands, compare, contiguous, contiguous_slices, operands, random_mask
from block_conv_choices import measuring_at_once, through_the_operation
from interpreter import interpreted

pytest.importorskip("triton")
pytestmark = [
    # The interpreter's own: a loop whose bounds are not constant.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
    pytest.mark.usefixtures("as_on_a_gpu"),
]

CASE = Case(2, 2, 4, 5, 8, 16, 3, 1)
STRIDED = Case(2, 1, 5, 4, 8, 8, 3, 2)
BLOCKS = Case(1, 1, 4, 4, 32, 32, 3, 2)


def views(sizes: tuple[int, ...]) -> Iterator[Tensor]:
    """Tensors of these sizes in every order of dimensions, whole and cut out of larger ones, by channels or all round."""
    for order in itertools.permutations(range(4)):
        back = [order.index(dim) for dim in range(4)]
        yield torch.zeros([sizes[dim] for dim in order]).permute(back)
        wide = torch.zeros([sizes[dim] + 2 for dim in order]).permute(back)
        yield wide[:, : sizes[1]]
        yield wide[: sizes[0], : sizes[1], : sizes[2], : sizes[3]]
    yield torch.zeros(1).expand(sizes)


@pytest.mark.parametrize("sizes", [(2, 3, 4, 5), (2, 3, 1, 1), (1, 3, 4, 5), (2, 1, 4, 5), (2, 1, 1, 1), (1, 1, 1, 1)])
def test_what_pytorch_takes_for_channels_last(sizes: tuple[int, ...]) -> None:
    for tensor in views(sizes):
        # Operations on one tensor keep its layout, as suggest_memory_format sees it.
        expected = torch._prims_common.suggest_memory_format(tensor) == torch.channels_last
        assert lies_channels_last(tensor) == expected, tensor.stride()


@pytest.mark.parametrize("sizes", [(2, 3, 4, 5), (2, 3, 1, 1), (1, 3, 4, 5), (2, 1, 4, 5), (1, 1, 1, 1)])
def test_strides_are_those_of_the_layout(sizes: tuple[int, ...]) -> None:
    for tensor in views(sizes):
        tensor = tensor.clone(memory_format=torch.preserve_format).normal_()
        for channels_last in (True, False):
            found = laid_out(tensor, channels_last)
            assert torch.equal(found, tensor)
            assert found.stride() == empty_laid_out(tensor, tensor.shape, channels_last).stride()


def test_turned_weights() -> None:
    weight = torch.randn(6, 4, 3, 2)
    turned = turned_weight(weight, 2)
    assert turned.is_contiguous(memory_format=torch.channels_last)
    expected = torch.cat([part.transpose(0, 1) for part in weight.chunk(2)])
    assert torch.equal(turned, expected)


def joined(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.cat(tensors, 1).contiguous()]


Function = Callable[[list[Tensor], Tensor, Tensor], Any]


def differentiate(function: Function, given: Operands, xs: list[Tensor], dys: list[Tensor]) -> list[tuple[int, ...]]:
    """Compares result and gradients with float64; returns their strides."""
    leaves = [t.detach().requires_grad_() for t in (*xs, given.weight, given.bias)]
    ys = function(leaves[: len(xs)], leaves[-2], leaves[-1])
    *dxs, dw, db = torch.autograd.grad(ys, leaves, dys)
    for name, results in {"y": ys, "dx": dxs, "dw": [dw], "db": [db]}.items():
        compare(name, results, given)
    return [t.stride() for t in (*ys, *dxs, dw)]


def diagonal(case: Case) -> Function:
    stride, padding = case.geometry.stride, case.geometry.padding
    return lambda xs, weight, bias: block_diagonal_conv2d(xs, weight, bias, stride=stride, padding=padding)


def grouped(case: Case) -> Function:
    stride, padding = case.geometry.stride, case.geometry.padding
    return lambda xs, weight, bias: [
        grouped_conv2d(xs[0], weight, bias, groups=case.streams, stride=stride, padding=padding)
    ]


def sparse(case: Case, mask: Tensor) -> Function:
    stride, padding = case.geometry.stride, case.geometry.padding
    return lambda xs, weight, bias: [block_sparse_conv2d(xs[0], weight, mask, bias, stride=stride, padding=padding)]


def check(function: Function, given: Operands, xs: list[Tensor], dys: list[Tensor], choice: str) -> None:
    """Every gradient of a candidate, laid out as plain PyTorch lays it out."""
    with through_the_operation(False):
        plain = differentiate(function, given, xs, dys)
    with (
        fixed_choice(choice),
        through_the_operation(),
        mock.patch.object(passes, "forward", side_effect=passes.forward) as operation,
    ):
        assert differentiate(function, given, xs, dys) == plain
    assert operation.called


@interpreted
@pytest.mark.parametrize("layout", [contiguous, contiguous_slices], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize(
    ("case", "choice"), [(CASE, "triton"), (CASE, "split"), (CASE, "groups"), (STRIDED, "triton")], ids=str
)
def test_every_gradient_of_contiguous_tensors(case: Case, choice: str, layout: Callable[..., list[Tensor]]) -> None:
    given = operands(case, torch.float32)
    if choice != "groups":
        check(diagonal(case), given, layout(given.xs), layout(given.dys), choice)
    if case.stride == 1:
        check(grouped(case), given, layout(joined(given.xs)), layout(joined(given.dys)), choice)


@interpreted
@pytest.mark.parametrize("choice", ["triton", "split"])
def test_every_gradient_of_live_blocks(choice: str) -> None:
    mask = random_mask(2, 2, "empty row")
    given = operands(BLOCKS, torch.float32, mask=mask)
    check(sparse(BLOCKS, mask), given, contiguous(given.xs), contiguous(given.dys), choice)
    check(sparse(BLOCKS, mask), given, contiguous_slices(given.xs), contiguous(given.dys), choice)


@interpreted
def test_half_precision_of_contiguous_tensors() -> None:
    given = operands(CASE, torch.float16)
    with fixed_choice("triton"):
        strides = differentiate(diagonal(CASE), given, contiguous(given.xs), contiguous(given.dys))
        # What comes in for a gradient changes nothing.
        assert differentiate(diagonal(CASE), given, contiguous(given.xs), given.dys) == strides
    assert strides[0] == given.dys[0].contiguous().stride()


def promised(operation: Any, *arguments: Any) -> list[tuple[int, ...]]:
    """The strides of an operation's results as torch.compile is told them."""
    with FakeTensorMode() as mode:
        results = operation(*pytree.tree_map_only(Tensor, mode.from_tensor, arguments))
        return [result.stride() for result in pytree.tree_leaves(results)]


@interpreted
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("layout", [contiguous, contiguous_slices, joined, list], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("choice", ["triton", "split"])
def test_strides_are_those_promised(choice: str, layout: Callable[..., list[Tensor]], channels_last: bool) -> None:
    """Whatever comes in; opcheck doesn't look at the strides of custom operators."""
    # A kernel of one row and column, where contiguous() changes nothing.
    given = operands(Case(2, 2, 3, 4, 8, 16, 1, 1), torch.float32)
    xs, dys, weight = layout(given.xs), layout(given.dys), given.weight
    options = (2, [1, 1], [0, 0], [1, 1], [], channels_last)
    with fixed_choice(choice):
        for operation, *arguments in (
            (ops.block_conv, xs, weight, None),
            (ops.block_conv_input_gradient, dys, weight, list(xs[0].shape)),
            (ops.block_conv_weight_gradient, dys, xs, weight),
        ):
            results = pytree.tree_leaves(operation(*arguments, *options))
            strides = [result.stride() for result in results]
            assert strides == promised(operation, *arguments, *options)
            assert all(lies_channels_last(result) == channels_last for result in results)


@interpreted
@pytest.mark.parametrize("choice", ["triton", "split"])
def test_opcheck(choice: str) -> None:
    given = operands(Case(2, 2, 3, 4, 16, 16, 1, 1), torch.float32)
    options = (2, [1, 1], [0, 0], [1, 1], [], False)
    xs, dys, weight = contiguous(given.xs), contiguous(given.dys), given.weight
    learning = [x.clone().requires_grad_() for x in xs]
    with fixed_choice(choice):
        torch.library.opcheck(ops.block_conv, (learning, weight.clone().requires_grad_(), given.bias, *options))
        torch.library.opcheck(ops.block_conv, (contiguous_slices(xs), weight, None, *options))
        torch.library.opcheck(ops.block_conv, (joined(xs), weight, None, *options))
        torch.library.opcheck(ops.block_conv_input_gradient, (dys, weight, [2, 16, 3, 4], *options))
        torch.library.opcheck(ops.block_conv_weight_gradient, (dys, xs, weight, *options))


@interpreted
def test_opcheck_of_live_blocks() -> None:
    given = operands(Case(1, 1, 4, 4, 32, 32, 1, 1), torch.float32)
    live = list(live_blocks(random_mask(2, 2, "empty row")))
    weight = given.weight.requires_grad_()
    with fixed_choice("triton"):
        torch.library.opcheck(
            ops.block_conv, (contiguous(given.xs), weight, None, 1, [1, 1], [0, 0], [1, 1], live, False)
        )


def test_cudnn_is_given_contiguous_tensors_as_they_are() -> None:
    given = operands(CASE, torch.float32)
    seen: list[bool] = []

    def spy(name: str) -> Any:
        function = getattr(cudnn, name)

        def run(*args: Any) -> Tensor:
            tensors = [arg for arg in args if isinstance(arg, Tensor) and arg.dim() == 4]
            seen.extend(t.is_contiguous() for t in tensors if t.untyped_storage().nbytes() > t.element_size())
            return function(*args)

        return run

    xs, dys = contiguous(given.xs), contiguous(given.dys)
    names = ("_convolution", "_convolution_backward")
    with (
        mock.patch.multiple(cudnn, **{name: spy(name) for name in names}),
        through_the_operation(),
        fixed_choice("split"),
    ):
        differentiate(diagonal(CASE), given, xs, dys)
    # The input gradient is given no input.
    assert len(seen) == 2 * 2 + 2 * 2 + 2 * 3
    assert all(seen)


@pytest.mark.parametrize("channels_last", [True, False])
def test_changing_the_layout_is_part_of_what_is_timed(channels_last: bool) -> None:
    given = operands(CASE, torch.float32)
    xs = given.xs if channels_last else contiguous(given.xs)
    problem = Problem(2, CASE.geometry, channels_last=channels_last)
    tall = [torch.empty(2, 16, 4, 5).contiguous(memory_format=torch.channels_last) for _ in xs]
    with mock.patch.object(passes, "_triton_forward", return_value=tall):
        found = passes.forward_candidates(problem, xs, given.weight, given.bias)
        assert len(found) > 1
        for run in found.values():
            assert all(lies_channels_last(y) == channels_last for y in run())


def test_a_gradient_seen_everywhere_is_measured_as_a_whole_one() -> None:
    case = Case(2, 1, 4, 5, 64, 16, 1, 1)
    given = operands(case, torch.float32)
    dys = [torch.ones(()).expand(dy.shape) for dy in given.dys]
    stand_in = mock.patch.object(
        passes, "_triton_input_gradient", side_effect=lambda *args, tile: cudnn.split_input_gradient(*args)
    )
    with measuring_at_once(), stand_in:
        for channels_last in (True, False):
            problem = Problem(2, case.geometry, channels_last=channels_last)
            passes.input_gradient(problem, dys, given.weight, given.xs[0].shape)
    assert len(choices.table()) == 2


def test_compiled_gradients_of_contiguous_tensors() -> None:
    given = operands(CASE, torch.float32)
    leaves = [t.requires_grad_() for t in (*contiguous(given.xs), given.weight, given.bias)]
    function = diagonal(CASE)

    def step(*args: Tensor) -> Any:
        return function(list(args[:2]), args[2], args[3])

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    dys = contiguous(given.dys)
    results = [[*ys, *torch.autograd.grad(ys, leaves, dys)] for ys in (compiled(*leaves), step(*leaves))]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
        assert got.stride() == expected.stride()


def test_plain_pytorch_for_a_channels_last_weight_on_contiguous_inputs() -> None:
    given = operands(CASE, torch.float32)
    weight = given.weight.contiguous(memory_format=torch.channels_last)
    with fixed_choice("triton"), mock.patch.object(passes, "forward", side_effect=AssertionError):
        ys = block_diagonal_conv2d(contiguous(given.xs), weight, padding=1)
    torch.testing.assert_close(ys[0], F.conv2d(given.xs[0], weight[:16], padding=1))

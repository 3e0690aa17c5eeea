"""The block convolution as operations: gradients, autocast, torch.compile, torch.func, and the choice of each pass."""

from __future__ import annotations

import warnings
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from fastmerge.kernels.block_conv import (
    block_diagonal_conv2d,
    block_sparse_conv2d,
    conv2d,
    cudnn,
    grouped_conv2d,
    live_blocks,
    ops,
    passes,
)
from fastmerge.kernels.block_conv.choice import Measurement, choices, fixed_choice
from fastmerge.kernels.block_conv.problem import Problem
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from block_conv_checks import Case, Operands, compare, joined, operands, random_mask
from block_conv_choices import measuring_at_once, through_the_operation
from interpreter import INTERPRETING, interpreted

pytest.importorskip("triton")
pytestmark = [
    # The interpreter's own: a loop whose bounds are not constant.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
    pytest.mark.usefixtures("as_on_a_gpu"),
]

CASE = Case(2, 2, 5, 6, 16, 32, 3, 1)
# Channels enough for tiles that race.
WIDE = Case(2, 1, 5, 6, 64, 64, 3, 1)
BLOCKS = Case(1, 1, 5, 6, 32, 32, 3, 2)
STEPS = ("forward", "input_gradient", "weight_gradient")
# On a CPU, PyTorch sums convolutions of float16 in float16.
DTYPES = {"triton": torch.float16, "split": torch.bfloat16, "groups": torch.bfloat16}


def differentiate(function: Any, given: Operands, xs: list[Tensor], dys: list[Tensor]) -> None:
    leaves = [t.detach().requires_grad_() for t in (*xs, given.weight, given.bias)]
    ys = function(leaves[: len(xs)], leaves[-2], leaves[-1])
    *dxs, dw, db = torch.autograd.grad(ys, leaves, dys)
    for name, results in {"y": ys, "dx": dxs, "dw": [dw]}.items():
        compare(name, results, given)
        assert all(result.is_contiguous(memory_format=torch.channels_last) for result in results)
    compare("db", [db], given)


def diagonal(xs: list[Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return block_diagonal_conv2d(xs, weight, bias, padding=1)


def grouped(xs: list[Tensor], weight: Tensor, bias: Tensor) -> list[Tensor]:
    return [grouped_conv2d(xs[0], weight, bias, groups=2, padding=1)]


@interpreted
@pytest.mark.parametrize("choice", ["triton", "split", "groups"])
def test_every_gradient_of_each_candidate(choice: str) -> None:
    given = operands(CASE, DTYPES[choice])
    with fixed_choice(choice), through_the_operation():
        differentiate(diagonal, given, given.xs, given.dys)
        differentiate(grouped, given, joined(given.xs), joined(given.dys))


def live(mask: Tensor) -> Any:
    return lambda xs, weight, bias: [block_sparse_conv2d(xs[0], weight, mask, bias, stride=2, padding=1)]


@interpreted
@pytest.mark.parametrize("choice", ["triton", "split"])
def test_every_gradient_of_live_blocks(choice: str) -> None:
    mask = random_mask(2, 2, "empty row")
    given = operands(BLOCKS, DTYPES[choice], mask=mask)
    with fixed_choice(choice), through_the_operation():
        differentiate(live(mask), given, given.xs, given.dys)


@interpreted
def test_gradients_in_other_layouts() -> None:
    given = operands(CASE, torch.float16)
    with fixed_choice("triton"):
        differentiate(diagonal, given, given.xs, [dy.contiguous() for dy in given.dys])
        memory = torch.zeros(2 * 5 * 6 * 32 + 1, dtype=torch.float16)
        unaligned = memory[1:].view(2, 5, 6, 32).permute(0, 3, 1, 2).copy_(given.dys[0])
        differentiate(diagonal, given, given.xs, [unaligned, given.dys[1]])
        # What sum() hands back: one number, seen everywhere.
        xs = [x.detach().requires_grad_() for x in given.xs]
        ys = diagonal(xs, given.weight, given.bias)
        expanded = torch.autograd.grad([y.sum() for y in ys], xs)
        ys = diagonal(xs, given.weight, given.bias)
        assert all(map(torch.equal, expanded, torch.autograd.grad(ys, xs, [torch.ones_like(y) for y in ys])))


@interpreted
def test_only_what_is_asked_for() -> None:
    given = operands(CASE, torch.float16)
    first, second, weight = given.xs[0].clone().requires_grad_(), given.xs[1], given.weight.clone()
    with fixed_choice("triton"):
        ys = block_diagonal_conv2d([first, second], weight, padding=1)
        with mock.patch.object(passes, "weight_gradient") as weight_gradient:
            (dx,) = torch.autograd.grad(ys[0], first, given.dys[0])
        assert not weight_gradient.called
        torch.testing.assert_close(dx.double(), given.expected["dx"][0], rtol=2e-3, atol=2e-2)
        weight.requires_grad_()
        ys = block_diagonal_conv2d([x.detach() for x in given.xs], weight, padding=1)
        with mock.patch.object(passes, "input_gradient") as input_gradient:
            (dw,) = torch.autograd.grad(ys[1], weight, given.dys[1])
        assert not input_gradient.called
        assert (dw[:32] == 0).all()
        torch.testing.assert_close(dw[32:].double(), given.expected["dw"][0][32:], rtol=2e-3, atol=2e-2)


def test_differentiable_once() -> None:
    given = operands(CASE, torch.float16)
    weight = given.weight.requires_grad_()
    with through_the_operation():
        (y, _) = block_diagonal_conv2d([x.requires_grad_() for x in given.xs], weight, padding=1)
    (dw,) = torch.autograd.grad(y.float().pow(2).sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dw.sum().backward()


@pytest.mark.parametrize("sparse", [False, True], ids=["diagonal", "sparse"])
def test_a_settled_choice_is_one_look_into_a_dictionary(sparse: bool) -> None:
    """No key is written and no candidate listed, in any pass; another choice is found out anew."""
    mask = random_mask(2, 2, "diagonal")
    given = operands(BLOCKS, torch.bfloat16, mask=mask) if sparse else operands(WIDE, torch.bfloat16)
    function = live(mask) if sparse else diagonal
    with through_the_operation(), measuring_at_once(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no kernel can run here
        differentiate(function, given, given.xs, given.dys)
    choices.learn("another layer", Measurement("split"))
    with through_the_operation():
        differentiate(function, given, given.xs, given.dys)
        forbidden = mock.Mock(side_effect=AssertionError)
        with (
            mock.patch.object(Problem, "key", forbidden),
            mock.patch.multiple(passes, tiles=forbidden, weight_tiles=forbidden),
            mock.patch.object(conv2d, "refusal", forbidden),
        ):
            differentiate(function, given, given.xs, given.dys)
            with fixed_choice("split"), pytest.raises(AssertionError):
                function(given.xs, given.weight, given.bias)


def test_a_forward_pass_that_runs_plain_says_nothing_of_a_backward_pass() -> None:
    """Frozen weights first, with inputs that need no gradient; then weights that learn, whose gradient a kernel computes."""
    given = operands(WIDE, torch.bfloat16)
    problem = Problem(2, WIDE.geometry)
    sizes = passes.Sizes(False, given.xs[0].shape, given.weight.shape, torch.bfloat16, given.weight.device)
    for step in (passes._FORWARD, passes._INPUT_GRADIENT, passes._WEIGHT_GRADIENT):
        winner = "groups" if step is passes._WEIGHT_GRADIENT else "split"
        choices.learn(step.key(problem, sizes), Measurement(winner))
    with mock.patch.object(passes, "forward", side_effect=passes.forward) as forward:
        for weight, calls in ((given.weight, 0), (given.weight.clone().requires_grad_(), 1)):
            for _ in range(2):
                forward.reset_mock()
                block_diagonal_conv2d(given.xs, weight, padding=1, parts=(weight.chunk(2), None))
                assert forward.call_count == calls


def test_activations_computed_again_are_no_second_step() -> None:
    """An epoch's last batch, with checkpoints: its layers run forward twice, with backward passes in between."""
    given = operands(WIDE, torch.bfloat16)
    weight = given.weight.clone().requires_grad_()
    x = torch.cat(given.xs, 1).requires_grad_()

    def layer(x: Tensor) -> Tensor:
        return torch.cat(block_diagonal_conv2d(x.chunk(2, 1), weight, padding=1), 1)

    with (
        mock.patch.multiple(choices, _measuring=True, _stored=False),
        mock.patch.object(choices, "_measure") as measure,
    ):
        for expected in (False, True):
            y = checkpoint(layer, checkpoint(layer, x, use_reentrant=False), use_reentrant=False)
            y.float().sum().backward()
            assert measure.called == expected


def test_operators_are_for_tracers_alone() -> None:
    given = operands(CASE, torch.bfloat16)

    def ran() -> list[str]:
        names: list[str] = []

        def spy(name: str) -> Any:
            function = getattr(ops, name)
            return lambda *args: names.append(name) or function(*args)

        operators = ("block_conv", "block_conv_input_gradient", "block_conv_weight_gradient")
        with through_the_operation(), mock.patch.multiple(ops, **{name: spy(name) for name in operators}):
            differentiate(diagonal, given, given.xs, given.dys)
        return names

    assert not ran()
    with FlopCounterMode(display=False):  # anything that looks at operations
        assert len(ran()) == 3


def test_traced_with_open_sizes() -> None:
    given = operands(CASE, torch.bfloat16)
    with fixed_choice("split"):
        graph = make_fx(diagonal, tracing_mode="symbolic")(given.xs, given.weight, given.bias)
        ys = graph([torch.cat([x, x]) for x in given.xs], given.weight, given.bias)
    assert torch.equal(ys[0][2:], diagonal(given.xs, given.weight, given.bias)[0])
    assert "fastmerge.block_conv" in graph.code


def test_traced_with_open_sizes_where_there_is_nothing_to_choose() -> None:
    given = operands(CASE, torch.bfloat16)

    def function(xs: list[Tensor], weights: list[Tensor], biases: list[Tensor]) -> tuple[Tensor, ...]:
        parts = (weights, biases)
        return block_diagonal_conv2d(xs, torch.cat(weights), torch.cat(biases), padding=1, parts=parts)

    parts = [*given.weight.chunk(2)], [*given.bias.chunk(2)]
    graph = make_fx(function, tracing_mode="symbolic")(given.xs, *parts)
    for got, expected in zip(graph(given.xs, *parts), diagonal(given.xs, given.weight, given.bias), strict=True):
        assert torch.equal(got, expected)


def test_cudnns_input_gradient_needs_no_input() -> None:
    """Neither memory of its size nor its values; only shape and layout are looked at."""
    seen = []

    def convolution_backward(dy: Tensor, x: Tensor, weight: Tensor, *options: Any) -> Any:
        seen.append(x.untyped_storage().nbytes())
        return torch.ops.aten.convolution_backward(dy, x, weight, *options)

    for channels_last in (True, False):
        given = operands(CASE, torch.bfloat16)
        problem = Problem(2, CASE.geometry, channels_last=channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        dys = [dy.contiguous(memory_format=layout) for dy in given.dys]
        with mock.patch.object(cudnn, "_convolution_backward", convolution_backward):
            dxs = cudnn.split_input_gradient(problem, dys, given.weight, given.xs[0].shape)
            joined_dx = cudnn.grouped_input_gradient(problem, torch.cat(dys, 1), given.weight, (2, 32, 5, 6))
        compare("dx", dxs, given)
        compare("dx", [joined_dx], given)
        assert all(dx.is_contiguous(memory_format=layout) for dx in dxs)
    assert max(seen) <= 8


@interpreted
@pytest.mark.parametrize("choice", ["triton", "split"])
def test_opcheck(choice: str) -> None:
    given = operands(Case(2, 1, 4, 4, 16, 16, 1, 1), torch.float16)
    options = (2, [1, 1], [0, 0], [1, 1], [], True)
    xs, weight, bias = (
        [x.requires_grad_() for x in given.xs],
        given.weight.requires_grad_(),
        given.bias.requires_grad_(),
    )
    with fixed_choice(choice):
        torch.library.opcheck(ops.block_conv, (xs, weight, bias, *options))
        torch.library.opcheck(ops.block_conv, (joined([x.detach() for x in xs]), weight, None, *options))
        xs, weight = [x.detach() for x in xs], weight.detach()
        torch.library.opcheck(ops.block_conv_input_gradient, (given.dys, weight, [1, 16, 4, 4], *options))
        torch.library.opcheck(ops.block_conv_weight_gradient, (given.dys, xs, weight, *options))


@interpreted
def test_opcheck_of_live_blocks() -> None:
    given = operands(Case(1, 1, 4, 4, 32, 32, 1, 1), torch.float16)
    weight = given.weight.requires_grad_()
    options = (1, [1, 1], [0, 0], [1, 1], list(live_blocks(random_mask(2, 2, "empty row"))), True)
    with fixed_choice("triton"):
        torch.library.opcheck(ops.block_conv, (given.xs, weight, None, *options))


def test_nothing_measured_is_plain_pytorch() -> None:
    given = operands(CASE, torch.float16)
    with mock.patch.object(passes, "forward", side_effect=AssertionError):
        ys = diagonal(given.xs, given.weight, given.bias)
    assert torch.equal(ys[1], F.conv2d(given.xs[1], given.weight[32:], given.bias[32:], padding=1))


@pytest.mark.parametrize("sparse", [False, True], ids=["diagonal", "sparse"])
@pytest.mark.parametrize("winner", ["forward", "input gradient", "weight gradient"])
def test_each_pass_runs_its_own_winner(winner: str, sparse: bool) -> None:
    """cuDNN stands in for the kernels, and the timer prefers those of one pass; of live blocks cuDNN's is the masked weight."""
    ran: list[str] = []

    def stand_in(name: str, twin: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            ran.append(name)
            return twin(*args, **options)

        return run

    def timer(run: Any) -> float:
        before = len(ran)
        run()
        return 1.0 if ran[before:] == [winner] else 2.0

    mask = random_mask(2, 2, "diagonal")
    given = operands(BLOCKS, torch.bfloat16, mask=mask) if sparse else operands(WIDE, torch.bfloat16)
    function = live(mask) if sparse else diagonal
    stand_ins = {
        "_triton_forward": stand_in("forward", lambda *args, tile: cudnn.split_forward(*args)),
        "_triton_input_gradient": stand_in("input gradient", lambda *args, tile: cudnn.split_input_gradient(*args)),
        "_triton_weight_gradient": stand_in(
            "weight gradient", lambda *args, tile: [cudnn.split_weight_gradient(*args)]
        ),
    }
    with (
        mock.patch.multiple(passes, **stand_ins),
        measuring_at_once(timer),
    ):
        differentiate(function, given, given.xs, given.dys)
        choices.set_measuring(False)
        ran.clear()
        differentiate(function, given, given.xs, given.dys)
    assert ran == [winner]
    winners = {row["key"].split(" | ")[1].rpartition(" ")[0]: row["winner"] for row in choices.table()}
    assert len(winners) == 3
    assert {name for name, chosen in winners.items() if chosen != "split"} == {winner}


def passes_of_cudnn(given: Operands) -> list[str]:
    """Which of cuDNN's functions run in both passes of joined streams."""
    ran: list[str] = []

    def spy(name: str) -> Any:
        function = getattr(cudnn, name)

        def run(*args: Any) -> Any:
            ran.append(name)
            return function(*args)

        return run

    names = [f"{way}_{step}" for way in ("split", "grouped") for step in STEPS]
    leaves = [t.detach().requires_grad_() for t in (*joined(given.xs), given.weight)]
    with mock.patch.multiple(cudnn, **{name: spy(name) for name in names}):
        y = grouped_conv2d(*leaves, groups=len(given.xs), padding=1)
        torch.autograd.grad(y, leaves, joined(given.dys))
    return ran


@pytest.mark.parametrize(("groups", "way"), [(2, "split"), (4, "split"), (5, "grouped"), (16, "grouped")])
def test_a_pass_that_was_never_measured_runs_groups_where_there_are_many(groups: int, way: str) -> None:
    given = operands(Case(groups, 1, 4, 4, 8, 8, 3, 1), torch.bfloat16)
    choices.learn("another layer", Measurement("triton"))
    with through_the_operation():
        assert passes_of_cudnn(given) == [f"{way}_{step}" for step in STEPS]


@pytest.mark.parametrize(("winner", "expected"), [("split", [f"split_{step}" for step in STEPS]), ("groups", [])])
def test_the_winner_runs_for_joined_streams_too(winner: str, expected: list[str]) -> None:
    """Plain PyTorch is cuDNN's groups there, so where these win no operation is needed."""
    given = operands(Case(2, 1, 4, 4, 16, 16, 3, 1), torch.bfloat16)
    with (
        measuring_at_once(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # no kernel can run here
        passes_of_cudnn(given)
    measured = choices.table()
    assert len(measured) == 3
    assert all({"split", "groups"} <= row["milliseconds"].keys() for row in measured)
    for row in measured:
        choices.learn(row["key"], Measurement(winner))
    assert passes_of_cudnn(given) == expected


def test_a_fixed_choice_holds_for_joined_streams() -> None:
    given = operands(Case(2, 1, 4, 4, 16, 16, 3, 1), torch.bfloat16)
    with fixed_choice("split"):
        assert passes_of_cudnn(given) == [f"split_{step}" for step in STEPS]


@pytest.mark.skipif(INTERPRETING, reason="the kernels run there")
def test_measuring_leaves_the_random_numbers_alone() -> None:
    given = operands(WIDE, torch.float16)
    state = torch.get_rng_state()
    with (
        measuring_at_once(),
        # There is no GPU here that ran the kernels.
        pytest.warns(RuntimeWarning, match="is not used"),
    ):
        diagonal(given.xs, given.weight, given.bias)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_casts_as_conv2d_does(dtype: torch.dtype) -> None:
    given = operands(CASE, dtype)
    leaves = [t.requires_grad_() for t in (*given.xs, given.weight, given.bias)]
    results = []
    for worth in (True, False):
        with (
            through_the_operation(worth),
            torch.autocast("cpu", dtype=torch.bfloat16),
        ):
            ys = diagonal(leaves[:2], leaves[2], leaves[3])
        assert all(y.dtype == torch.bfloat16 for y in ys)
        results.append([*ys, *torch.autograd.grad(ys, leaves, [dy.bfloat16() for dy in given.dys])])
    for through_operation, plain in zip(*results, strict=True):
        assert through_operation.dtype == plain.dtype
        torch.testing.assert_close(through_operation, plain, rtol=2e-2, atol=2e-2)


def test_mixed_dtypes_are_pytorchs_own_error() -> None:
    given = operands(CASE, torch.float16)
    with pytest.raises(RuntimeError, match="type"):
        diagonal(given.xs, given.weight.float(), given.bias)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic: bool) -> None:
    given, mask = operands(CASE, torch.float16), live_blocks(random_mask(2, 1, "full"))
    graphs = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    def step(first: Tensor, second: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y, z = block_diagonal_conv2d([first.relu(), second], weight, bias, padding=1)
        return y + z + block_sparse_conv2d(first, weight[:32], mask, padding=1)

    leaves = [t.requires_grad_() for t in (*given.xs, given.weight, given.bias)]
    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=dynamic)
    y = compiled(*leaves)
    torch.testing.assert_close(y, step(*leaves), rtol=1e-2, atol=1e-2)
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("fastmerge.block_conv" in target for target in targets) == 2


def test_compiled_gradients() -> None:
    given = operands(CASE, torch.float16)
    leaves = [t.requires_grad_() for t in (*given.xs, given.weight, given.bias)]
    compiled = torch.compile(lambda *args: diagonal(args[:2], *args[2:]), backend="aot_eager", fullgraph=True)
    results = [
        torch.autograd.grad(function(*leaves), leaves, given.dys)
        for function in (compiled, lambda *args: diagonal(args[:2], *args[2:]))
    ]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=3e-2)


def test_transformations_take_plain_pytorch() -> None:
    given = operands(CASE, torch.float16)
    with (
        fixed_choice("triton"),
        mock.patch.object(passes, "forward", side_effect=AssertionError),
    ):
        gradient = torch.func.grad(lambda w: diagonal(given.xs, w, given.bias)[0].float().sum())(given.weight)
        assert gradient.shape == given.weight.shape
        batch = torch.stack(given.xs)
        assert torch.func.vmap(lambda x: diagonal([x, x], given.weight, given.bias)[0])(batch).shape == (2, 2, 32, 5, 6)

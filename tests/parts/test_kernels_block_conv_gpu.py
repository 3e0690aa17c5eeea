"""The block convolution on a CUDA device of compute capability 9.0 or newer (``pytest -m gpu``)."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastmerge.kernels.block_conv import block_diagonal_conv2d, block_sparse_conv2d, grouped_conv2d, live_blocks, ops
from fastmerge.kernels.block_conv.arithmetic import arithmetic
from fastmerge.kernels.block_conv.choice import (
    SPLIT,
    choice_table,
    choices,
    device_milliseconds,
    fixed_choice,
    set_measuring,
)
from fastmerge.kernels.block_conv.formulas import fetches_boxes
from fastmerge.kernels.block_conv.tiles import tiles, weight_tiles
from torch import Tensor

from block_conv_checks import ODD, Case, Operands, compare, joined, operands, random_mask, slices
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

# Two ResNet-18s at 224 pixels, batch 32: every convolution but the stem; and ResNet-20's, batch 64.
LAYERS = [
    Case(2, 32, 56, 56, 64, 64, 3, 1),
    Case(2, 32, 56, 56, 64, 128, 3, 2),
    Case(2, 32, 56, 56, 64, 128, 1, 2),
    Case(2, 32, 28, 28, 128, 128, 3, 1),
    Case(2, 32, 28, 28, 128, 256, 3, 2),
    Case(2, 32, 28, 28, 128, 256, 1, 2),
    Case(2, 32, 14, 14, 256, 256, 3, 1),
    Case(2, 32, 14, 14, 256, 512, 3, 2),
    Case(2, 32, 14, 14, 256, 512, 1, 2),
    Case(2, 32, 7, 7, 512, 512, 3, 1),
    Case(2, 64, 32, 32, 16, 16, 3, 1),
    Case(2, 64, 32, 32, 16, 32, 3, 2),
    Case(2, 64, 8, 8, 64, 64, 3, 1),
    # Samples enough to fill the tiles that hold one position of many.
    Case(2, 256, 7, 7, 256, 512, 3, 1),
    Case(2, 256, 9, 10, 64, 128, 3, 2),
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16", "fp32"])


@functools.lru_cache(maxsize=1)
def given_for(case: Case, dtype: torch.dtype) -> Operands:
    return operands(case, dtype, "cuda")


def tiles_by_pass(case: Case, dtype: torch.dtype) -> dict[str, list[Any]]:
    """Of each pass the first tile of boxes and of samples, of one tap and of three."""
    kind = arithmetic(dtype)
    found = {
        "y": tiles(case.c, case.k, case.n, None, kind),
        "dx": tiles(case.k, case.c, case.n, None, kind),
        "dw": weight_tiles(case.c, case.k, case.kernel, None, kind),
    }
    return {
        step: [*{getattr(t, "samples", None) or getattr(t, "row_of_taps", None): t for t in reversed(all_of)}.values()]
        for step, all_of in found.items()
    }


@pytest.mark.parametrize(
    ("dtype", "case", "step", "tile"),
    [
        pytest.param(dtype, case, step, tile, id=f"{name}-{step}-{tile.name}-k{case.kernel}s{case.stride}")
        for name, dtype in zip(("bf16", "fp16", "fp32"), (DTYPES[1], DTYPES[0], DTYPES[2]), strict=True)
        for case in (LAYERS[-2], Case(2, 32, 14, 14, 64, 128, 3, 2), Case(2, 32, 14, 14, 64, 128, 1, 2))
        for step, found in tiles_by_pass(case, dtype).items()
        for tile in found
    ],
)
def test_one_tile_by_itself(dtype: torch.dtype, case: Case, step: str, tile: Any) -> None:
    """Nothing else is compiled or launched beside it: a card that none of it has run on begins with these."""
    from fastmerge.kernels.block_conv import launch_triton

    given = given_for(case, dtype)
    size = (case.height, case.width)
    if step == "y":
        result = launch_triton.forward(given.xs, given.weight, given.bias, 2, case.geometry, tile)
    elif step == "dx":
        result = launch_triton.input_gradient(given.dys, given.weight, size, 2, case.geometry, tile)
    else:
        result = [launch_triton.weight_gradient(given.dys, given.xs, 2, case.geometry, tile)]
    compare(step, result, given)


@by_dtype
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_every_tile_against_float64(case: Case, dtype: torch.dtype) -> None:
    given = given_for(case, dtype)
    check_tiles(case, given, given.xs, given.dys)


@by_dtype
@pytest.mark.parametrize("case", ODD, ids=str)
def test_odd_shapes_against_float64(case: Case, dtype: torch.dtype) -> None:
    given = given_for(case, dtype)
    check_tiles(case, given, given.xs, given.dys, most=2)


@pytest.mark.parametrize("layout", [slices, joined])
@pytest.mark.parametrize("case", [ODD[0], ODD[1], LAYERS[-1]], ids=str)
def test_other_layouts_against_float64(case: Case, layout: Callable[[list[Tensor]], list[Tensor]]) -> None:
    given = given_for(case, torch.float16)
    check_tiles(case, given, layout(given.xs), layout(given.dys), most=1)


@pytest.mark.parametrize("kind", ["random", "full", "none", "empty row", "empty column"])
@pytest.mark.parametrize(("block", "kernel", "stride"), [(128, 3, 1), (64, 3, 2), (32, 1, 1), (16, 1, 2)])
def test_live_blocks_against_float64(block: int, kernel: int, stride: int, kind: str) -> None:
    mask = random_mask(3, 4, kind).cuda()
    case = Case(1, 4, 10, 9, 4 * block, 3 * block, kernel, stride)
    given = operands(case, torch.float16, "cuda", mask)
    check_tiles(case, given, given.xs, given.dys, live=live_blocks(mask), most=2)


@pytest.mark.parametrize(("block", "kernel", "stride"), [(64, 3, 2), (16, 1, 1)])
def test_live_blocks_of_float32(block: int, kernel: int, stride: int) -> None:
    mask = random_mask(3, 4, "random").cuda()
    case = Case(1, 4, 10, 9, 4 * block, 3 * block, kernel, stride)
    given = operands(case, torch.float32, "cuda", mask)
    check_tiles(case, given, given.xs, given.dys, live=live_blocks(mask), most=2)


def test_streams_far_apart_share_a_launch() -> None:
    from fastmerge.kernels.block_conv import launch_triton
    from fastmerge.kernels.block_conv.boxes_triton import launches

    case = Case(2, 4, 8, 8, 64, 64, 3, 1)
    given = given_for(case, torch.float16)
    between = torch.empty(2**28, device="cuda", dtype=torch.uint8)
    xs = [given.xs[0].clone(), torch.cat([given.xs[1], given.xs[1]])[:4]]
    for order in (1, -1):
        assert len(launches(2, xs[::order], given.dys)) == 1
    ys = launch_triton.forward(xs, given.weight, given.bias, 2, case.geometry, tiles(64, 64, 4)[0])
    compare("y", ys, given)
    assert between.numel()


def test_gradients_repeat_bit_by_bit() -> None:
    from fastmerge.kernels.block_conv import launch_triton

    case = LAYERS[3]
    given = given_for(case, torch.bfloat16)
    for tile in weight_tiles(case.c, case.k, case.kernel):
        results = [launch_triton.weight_gradient(given.dys, given.xs, 2, case.geometry, tile) for _ in range(5)]
        assert all(torch.equal(results[0], result) for result in results[1:]), tile.name


def differentiate(
    function: Callable[..., object], given: Operands, xs: list[Tensor], dys: list[Tensor], slack: float = 1
) -> None:
    leaves = [t.detach().requires_grad_() for t in (*xs, given.weight, given.bias)]
    ys = function(leaves[: len(xs)], leaves[-2], leaves[-1])
    *dxs, dw, db = torch.autograd.grad(ys, leaves, dys)
    for name, results in {"y": ys, "dx": dxs, "dw": [dw], "db": [db]}.items():
        compare(name, results, given, slack)


# cuDNN may transform small kernels (Winograd), or sum in parts that it rounds.
CUDNN_SLACK = 50


@by_dtype
@pytest.mark.parametrize("choice", ["triton", "split", "groups"])
def test_every_gradient_through_autograd(choice: str, dtype: torch.dtype) -> None:
    case = Case(2, 4, 14, 14, 64, 128, 3, 2)
    given = given_for(case, dtype)
    options, slack = {"stride": 2, "padding": 1}, 1 if choice == "triton" else CUDNN_SLACK
    with fixed_choice(choice):
        differentiate(lambda xs, *rest: block_diagonal_conv2d(xs, *rest, **options), given, given.xs, given.dys, slack)
        differentiate(
            lambda xs, *rest: [grouped_conv2d(xs[0], *rest, groups=2, **options)],
            given,
            joined(given.xs),
            joined(given.dys),
            slack,
        )


@pytest.fixture
def forgetful(request: pytest.FixtureRequest) -> None:
    """For what must not be filled with NaN or forbidden what is nondeterministic: cuDNN's choice of an algorithm."""
    request.getfixturevalue("poisoned_memory")  # whose turn would come after this one's
    torch.use_deterministic_algorithms(False)


def test_what_the_cpu_takes_is_not_timed() -> None:
    x = torch.ones(2**20, device="cuda")

    def run() -> list[Tensor]:
        time.sleep(0.005)
        return [x + 1]

    assert 0 < device_milliseconds(run) < 1


@by_dtype
@pytest.mark.parametrize("case", [LAYERS[0], LAYERS[5], LAYERS[9]], ids=str)
@pytest.mark.usefixtures("forgetful")
def test_measured_choices_are_fast_and_right(case: Case, dtype: torch.dtype) -> None:
    given = given_for(case, dtype)
    set_measuring(True)

    def function(xs: list[Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return block_diagonal_conv2d(xs, weight, bias, stride=case.stride, padding=case.kernel // 2)

    differentiate(function, given, given.xs, given.dys, CUDNN_SLACK)
    assert not choice_table()
    differentiate(function, given, given.xs, given.dys, CUDNN_SLACK)
    table = choice_table()
    assert len(table) == 3
    for row in table:
        milliseconds = row["milliseconds"]
        assert len(milliseconds) > 1
        fastest = min(milliseconds, key=milliseconds.__getitem__)
        assert milliseconds[fastest] > 0
        assert row["winner"] in (fastest, SPLIT)
    # What was measured holds without measuring, and in another memory that reads the file.
    set_measuring(False)
    choices.forget()
    choices._memory.read = False
    assert choice_table() == table
    differentiate(function, given, given.xs, given.dys, CUDNN_SLACK)


@pytest.mark.parametrize("choice", ["triton", None])
@pytest.mark.usefixtures("forgetful")
def test_captured_in_a_cuda_graph(choice: str | None) -> None:
    case = Case(2, 8, 14, 14, 64, 64, 3, 1)
    given = given_for(case, torch.float16)
    leaves = [t.clone().requires_grad_() for t in (*given.xs, given.weight)]

    def step() -> list[Tensor]:
        ys = block_diagonal_conv2d(leaves[:2], leaves[2], padding=1)
        return [*ys, *torch.autograd.grad(ys, leaves, given.dys)]

    with fixed_choice(choice) if choice else contextlib.nullcontext():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        # While a graph is captured, nothing is measured even where it is asked for.
        set_measuring(True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()
        set_measuring(False)
        assert not choice_table()
        with torch.no_grad():
            for leaf in leaves:
                leaf.mul_(0.5)
        graph.replay()
        torch.cuda.synchronize()
        for got, expected in zip(results, step(), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize("choice", ["triton", "split"])
@pytest.mark.usefixtures("forgetful")
def test_autocast_and_compile(choice: str) -> None:
    case = Case(2, 4, 14, 14, 64, 64, 3, 1)
    given = given_for(case, torch.bfloat16)
    leaves = [t.float().requires_grad_() for t in (*given.xs, given.weight, given.bias)]

    def step(first: Tensor, second: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return block_diagonal_conv2d([first.relu(), second], weight, bias, padding=1)

    with fixed_choice(choice):
        results = [
            [*ys, *torch.autograd.grad(ys, leaves, given.dys)]
            for ys in (step(*leaves), torch.compile(step, fullgraph=True)(*leaves))
        ]
    for eager, compiled in zip(*results, strict=True):
        assert eager.dtype == compiled.dtype
        torch.testing.assert_close(eager, compiled, rtol=2e-2, atol=2e-2 * float(eager.abs().max()))
    assert results[0][0].dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in results[0][2:])


@pytest.mark.parametrize("choice", ["triton", "split"])
def test_opcheck(choice: str) -> None:
    case = Case(2, 2, 6, 6, 16, 16, 3, 1)
    given = given_for(case, torch.float16)
    options = (2, [1, 1], [1, 1], [1, 1], [], True)
    xs = [x.clone().requires_grad_() for x in given.xs]
    with fixed_choice(choice):
        torch.library.opcheck(ops.block_conv, (xs, given.weight.clone().requires_grad_(), given.bias, *options))


def test_small_inputs_take_plain_pytorch() -> None:
    x, weight = torch.randn(1, 3, 5, 5, device="cuda").half(), torch.randn(8, 3, 3, 3, device="cuda").half()
    with fixed_choice("triton"):
        ys = block_diagonal_conv2d([x, x], weight)
    torch.testing.assert_close(ys[1], F.conv2d(x, weight[4:]))


def test_masks_on_the_device() -> None:
    mask = random_mask(4, 4, "random").cuda()
    x = torch.randn(2, 64, 7, 7, device="cuda").half().contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 64, 3, 3, device="cuda").half().requires_grad_()
    results = []
    for choice in ("triton", "split"):
        with fixed_choice(choice):
            y = block_sparse_conv2d(x, weight, mask, padding=1)
        results.append([y, torch.autograd.grad(y.sum(), weight)[0]])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-1)
    dead = ~mask.repeat_interleave(16, 0).repeat_interleave(16, 1)
    assert (results[0][1][dead] == 0).all()


def test_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    case = Case(2, 2, 6, 6, 16, 16, 3, 1)
    given = operands(case, torch.float16, "cuda:1")
    with fixed_choice("triton"):
        differentiate(lambda xs, *rest: block_diagonal_conv2d(xs, *rest, padding=1), given, given.xs, given.dys)

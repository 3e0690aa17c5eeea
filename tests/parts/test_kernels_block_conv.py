"""The block-diagonal convolution's kernels against float64, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from fastmerge.kernels.block_conv.tiles import Tile, WeightTile
from torch import Tensor

from block_conv_checks import Case, Operands, compare, joined, operands, slices
from interpreter import interpreted

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # The interpreter's own: a loop whose bounds are not constant.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]

# Kernel, stride; for each the smallest shape, odd ones with several blocks of channels, typical ones, and one just past a tile.
KINDS = [(1, 1), (1, 2), (3, 1), (3, 2)]
CASES = [
    case
    for kernel, stride in KINDS
    for case in (
        Case(2, 1, stride, stride, 8, 8, kernel, stride),
        Case(2, 2, 5, 7, 24, 40, kernel, stride),
        Case(3, 2, 8, 8, 32, 16, kernel, stride),
        Case(2, 1, 8 * stride + 1, 8 * stride, 16, 32, kernel, stride),
    )
]
TILE = Tile(positions=64, written=32, read=16, warps=4, stages=2)
# With 64 channels and more, the product is computed transposed.
TRANSPOSED = Tile(positions=32, written=64, read=32, warps=4, stages=2)
SAMPLES = Tile(positions=16, written=32, read=32, warps=4, stages=2, samples=True)
WEIGHT_TILE = WeightTile(rows=16, columns=16, row_of_taps=False, programs=1, warps=4, stages=2)

ODD = [case for case in CASES if case.width == 7]
LAST = CASES[3::4]
# Samples enough that the sum over all positions takes them together.
MANY = [Case(2, 17, 3, 4, 8, 8, 3, 1), Case(2, 17, 3, 4, 8, 8, 3, 2)]

by_case = pytest.mark.parametrize("case", CASES, ids=str)


def check_every_pass(case: Case, given: Operands, xs: list[Tensor], dys: list[Tensor], tile: Tile = TILE) -> None:
    from fastmerge.kernels.block_conv import launch_triton

    options = (case.streams, case.geometry)
    compare("y", launch_triton.forward(xs, given.weight, given.bias, *options, tile), given)
    size = (case.height, case.width)
    compare("dx", launch_triton.input_gradient(dys, given.weight, size, *options, tile), given)
    compare("dw", [launch_triton.weight_gradient(dys, xs, *options, WEIGHT_TILE)], given)


@interpreted
@by_case
def test_against_float64(case: Case) -> None:
    given = operands(case, torch.float16)
    check_every_pass(case, given, given.xs, given.dys)


@interpreted
@pytest.mark.parametrize("tile", [TRANSPOSED, SAMPLES], ids=lambda tile: tile.name)
@pytest.mark.parametrize("case", [ODD[0], ODD[3], *MANY], ids=str)
def test_other_tiles(case: Case, tile: Tile) -> None:
    given = operands(case, torch.float16)
    check_every_pass(case, given, given.xs, given.dys, tile)


@interpreted
@pytest.mark.parametrize("case", LAST, ids=str)
def test_bfloat16(case: Case) -> None:
    given = operands(case, torch.bfloat16)
    check_every_pass(case, given, given.xs, given.dys)


# Multiples of 4 channels are 16 bytes of float32.
FEW = Case(2, 1, 5, 6, 12, 20, 3, 2)


@interpreted
@pytest.mark.parametrize(
    ("case", "tile"), [(ODD[3], TILE), (LAST[2], TRANSPOSED), (MANY[1], TILE), (FEW, TRANSPOSED)], ids=str
)
def test_float32(case: Case, tile: Tile) -> None:
    given = operands(case, torch.float32)
    check_every_pass(case, given, given.xs, given.dys, tile)


@interpreted
@pytest.mark.parametrize("layout", [slices, joined])
def test_float32_in_other_layouts(layout: Callable[[list[Tensor]], list[Tensor]]) -> None:
    given = operands(FEW, torch.float32)
    check_every_pass(FEW, given, layout(given.xs), layout(given.dys))


@interpreted
@pytest.mark.parametrize("case", [ODD[1], ODD[3]], ids=str)
def test_slices_of_wider_tensors(case: Case) -> None:
    given = operands(case, torch.float16)
    check_every_pass(case, given, slices(given.xs), slices(given.dys))


@interpreted
@pytest.mark.parametrize("case", [ODD[0], ODD[3]], ids=str)
def test_streams_joined_in_one_tensor(case: Case) -> None:
    given = operands(case, torch.float16)
    check_every_pass(case, given, joined(given.xs), joined(given.dys))


@interpreted
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 1, 9, 6, 16, 16, 3, 1, padding=2, dilation=2),
        Case(2, 1, 7, 8, 16, 16, 3, 1, padding=0),
        Case(2, 1, 7, 8, 16, 16, 3, 2, padding=0),
        Case(2, 1, 6, 7, 16, 16, 5, 2, padding=3),
        Case(1, 1, 5, 4, 8, 8, 1, 2, padding=1),
        Case(1, 1, 5, 6, 8, 8, 3, 2, columns=1),
        Case(1, 1, 5, 6, 8, 8, 1, 2, columns=3),
        Case(1, 1, 5, 6, 8, 8, 2, 1, columns=3),
    ],
    ids=str,
)
def test_padding_dilation_and_other_kernels(case: Case) -> None:
    given = operands(case, torch.float16)
    check_every_pass(case, given, given.xs, given.dys)


@interpreted
@pytest.mark.parametrize("programs", [1, 40])
@pytest.mark.parametrize("case", [ODD[2], ODD[3], MANY[1]], ids=str)
def test_weight_gradient_of_a_row_of_taps(case: Case, programs: int) -> None:
    from fastmerge.kernels.block_conv import launch_triton

    given = operands(case, torch.float16)
    tile = WeightTile(64, 32, row_of_taps=True, programs=programs, warps=4, stages=2)
    dw = launch_triton.weight_gradient(given.dys, given.xs, case.streams, case.geometry, tile)
    compare("dw", [dw], given)


@interpreted
def test_split_sums_are_right_and_repeat() -> None:
    from fastmerge.kernels.block_conv import launch_triton

    case = Case(2, 3, 6, 6, 16, 16, 1, 1)
    given = operands(case, torch.float16)
    seen = []
    for programs in (1, 7, 1000):
        tile = WeightTile(16, 16, row_of_taps=False, programs=programs, warps=4, stages=2)
        run = [launch_triton.weight_gradient(given.dys, given.xs, 2, case.geometry, tile) for _ in range(2)]
        compare("dw", run[:1], given)
        assert torch.equal(*run)
        seen.append(launch_triton.split(18, 2, programs)[1])
    assert seen == [1, 3, 18]


@interpreted
def test_three_streams_anywhere_in_memory() -> None:
    case = Case(3, 1, 4, 5, 8, 16, 3, 1)
    given = operands(case, torch.float16)
    memory = torch.full((40, 1, 4, 5, 8), float("nan"), dtype=torch.float16)
    for place, x in zip((30, 2, 5), given.xs, strict=True):
        memory[place] = x.permute(0, 2, 3, 1)
    xs = [memory[place].permute(0, 3, 1, 2) for place in (30, 2, 5)]
    check_every_pass(case, given, xs, given.dys)


@interpreted
def test_results_allocated_backwards() -> None:
    from fastmerge.kernels.block_conv import launch_triton

    case = Case(2, 1, 4, 5, 8, 16, 3, 1)
    given = operands(case, torch.float16)
    places = list(torch.full((2, 1, 4, 5, 16), float("nan"), dtype=torch.float16).permute(0, 1, 4, 2, 3))
    with mock.patch.object(launch_triton, "empty_channels_last", side_effect=places[::-1]):
        compare("y", launch_triton.forward(given.xs, given.weight, given.bias, 2, case.geometry, TILE), given)


@interpreted
def test_weights_of_other_layouts() -> None:
    from fastmerge.kernels.block_conv import launch_triton

    case = Case(2, 1, 4, 5, 16, 16, 3, 1)
    given = operands(case, torch.float16)
    wide = torch.full((2 * 16 + 1, 24, 3, 3), float("nan"), dtype=torch.float16)
    wide[1:, 3:19] = given.weight
    for weight in (given.weight.contiguous(memory_format=torch.channels_last), wide[1:, 3:19]):
        compare("y", launch_triton.forward(given.xs, weight, given.bias, 2, case.geometry, TILE), given)


@interpreted
def test_no_bias() -> None:
    from fastmerge.kernels.block_conv import launch_triton

    case = Case(2, 1, 4, 5, 16, 16, 1, 1)
    given = operands(case, torch.float16)
    (with_bias, _), (without, _) = (
        launch_triton.forward(given.xs, given.weight, bias, 2, case.geometry, TILE)
        for bias in (torch.zeros_like(given.bias), None)
    )
    assert torch.equal(with_bias, without)

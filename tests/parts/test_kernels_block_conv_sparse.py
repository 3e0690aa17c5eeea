"""The block-sparse convolution's kernels against float64, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from fastmerge.kernels.block_conv.formulas import live_blocks
from fastmerge.kernels.block_conv.tiles import Tile, WeightTile

from block_conv_checks import Case, Operands, compare, operands, random_mask
from interpreter import interpreted

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # The interpreter's own: a loop whose bounds are not constant.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]

# Three block rows of 32 channels, two block columns of 16 or 48.
MASKS = ["random", "full", "none", "empty row", "empty column"]
CASES = [
    Case(1, 1, 5, 4, 32, 96, 3, 1),
    Case(1, 1, 5, 4, 96, 96, 1, 1),
    Case(1, 2, 5, 6, 32, 96, 3, 2),
    Case(1, 1, 5, 6, 96, 96, 1, 2),
]
TILE = Tile(positions=64, written=16, read=16, warps=4, stages=2)


def poison_dead_blocks(given: Operands, mask: torch.Tensor) -> torch.Tensor:
    """The weight with NaN wherever no block is live: whoever reads it is found out."""
    live = mask.repeat_interleave(32, 0).repeat_interleave(given.weight.shape[1] // 2, 1)[:, :, None, None]
    return torch.where(live, given.weight, float("nan"))


def check_every_pass(case: Case, kind: str, weight_tile: WeightTile, dtype: torch.dtype = torch.float16) -> None:
    from fastmerge.kernels.block_conv import launch_triton

    mask = random_mask(3, 2, kind)
    given = operands(case, dtype, mask=mask)
    weight, live = poison_dead_blocks(given, mask), live_blocks(mask)
    compare("y", launch_triton.forward(given.xs, weight, given.bias, 1, case.geometry, TILE, live), given)
    size = (case.height, case.width)
    compare("dx", launch_triton.input_gradient(given.dys, weight, size, 1, case.geometry, TILE, live), given)
    dw = launch_triton.weight_gradient(given.dys, given.xs, 1, case.geometry, weight_tile, live)
    compare("dw", [dw], given)
    assert (dw[given.expected["dw"][0] == 0] == 0).all()


@interpreted
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_masks(case: Case, kind: str) -> None:
    # Rows of a tile beyond its block must not be written: blocks have 32.
    tile = WeightTile(rows=64, columns=16, row_of_taps=False, programs=1, warps=4, stages=2)
    check_every_pass(case, kind, tile)


@interpreted
@pytest.mark.parametrize("case", CASES[2:], ids=str)
def test_stride_2(case: Case) -> None:
    tile = WeightTile(rows=16, columns=64, row_of_taps=False, programs=1, warps=4, stages=2)
    # Here too, columns beyond the block: the next one in the row is not live.
    check_every_pass(case, "diagonal", tile)


@interpreted
@pytest.mark.parametrize("kind", ["random", "none"])
@pytest.mark.parametrize("row_of_taps", [False, True])
def test_split_sums(row_of_taps: bool, kind: str) -> None:
    tile = WeightTile(rows=32, columns=16, row_of_taps=row_of_taps, programs=40, warps=4, stages=2)
    check_every_pass(CASES[0], kind, tile)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    tile = WeightTile(rows=32, columns=16, row_of_taps=False, programs=1, warps=4, stages=2)
    check_every_pass(CASES[0], "random", tile, dtype)


@interpreted
def test_a_diagonal_mask_is_the_block_diagonal() -> None:
    from fastmerge.kernels.block_conv import launch_triton

    case = Case(1, 1, 4, 4, 32, 32, 3, 1)
    given = operands(case, torch.float16)
    x, weight, bias = given.xs[0], given.weight, given.bias
    (y,) = launch_triton.forward([x], weight, bias, 1, case.geometry, TILE, live_blocks(torch.eye(2).bool()))
    blocks = torch.cat([weight[:16, :16], weight[16:, 16:]])
    (grouped,) = launch_triton.forward([x], blocks, bias, 2, case.geometry, TILE)
    assert torch.equal(y, grouped)

"""Block convolutions in plain PyTorch, and what decides whether and how the Triton kernels run."""

from __future__ import annotations

import gc
import re
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastmerge.kernels.block_conv import block_diagonal_conv2d, block_sparse_conv2d, formulas, grouped_conv2d, passes
from fastmerge.kernels.block_conv.formulas import Geometry, live_blocks, refusal
from fastmerge.kernels.block_conv.problem import Problem
from fastmerge.kernels.block_conv.tiles import box_of, by_traffic, line_of, tiles, weight_tiles, weights_by_traffic
from torch import Tensor


def random(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, dtype=dtype)


GEOMETRIES: list[dict[str, Any]] = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": (1, 2), "padding": (0, 1), "dilation": 2},
    {"padding": "same"},
    {"padding": "valid"},
]


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_block_diagonal_is_each_convolution(bias: bool, options: dict[str, Any]) -> None:
    xs, weight, b = [random(2, 3, 9, 8) for _ in range(3)], random(12, 3, 3, 3), random(12) if bias else None
    ys = block_diagonal_conv2d(xs, weight, b, **options)
    for t, (x, y) in enumerate(zip(xs, ys, strict=True)):
        part = slice(4 * t, 4 * t + 4)
        assert torch.equal(y, F.conv2d(x, weight[part], None if b is None else b[part], **options))
    joined = grouped_conv2d(torch.cat(xs, 1), weight, b, groups=3, **options)
    torch.testing.assert_close(joined, torch.cat(ys, 1))


@pytest.mark.parametrize("options", GEOMETRIES[:2], ids=str)
def test_block_sparse_is_a_masked_convolution(options: dict[str, Any]) -> None:
    x, weight, bias = random(2, 6, 9, 8), random(8, 6, 3, 3).requires_grad_(), random(8)
    mask = torch.tensor([[True, False, False], [False, False, True]])
    zeroed = weight.detach().clone()
    zeroed[:4, 2:] = 0
    zeroed[4:, :4] = 0
    y = block_sparse_conv2d(x, weight, mask, bias, **options)
    assert torch.equal(y, F.conv2d(x, zeroed, bias, **options))
    (dweight,) = torch.autograd.grad(y.sum(), weight)
    assert torch.equal(dweight == 0, zeroed == 0)
    assert torch.equal(y, block_sparse_conv2d(x, weight, live_blocks(mask), bias, **options))


def test_dead_blocks_may_hold_anything() -> None:
    weight = random(4, 4, 1, 1)
    weight[:2, 2:] = torch.nan
    y = block_sparse_conv2d(random(1, 4, 3, 3), weight, torch.tensor([[True, False], [True, True]]))
    assert y.isfinite().all()


def test_transformations_and_double_backward_take_plain_pytorch() -> None:
    x, weight = random(5, 2, 3, 4, 4), random(4, 3, 3, 3)
    batched = torch.func.vmap(lambda x: block_diagonal_conv2d((x, x), weight, padding=1)[0])(x)
    torch.testing.assert_close(batched[1], F.conv2d(x[1], weight[:2], padding=1))
    assert torch.autograd.gradgradcheck(
        lambda x, w: block_diagonal_conv2d((x, x), w)[0], (x[0].requires_grad_(), weight.requires_grad_())
    )


def refused(function: Any, *args: Any, match: str, **kwargs: Any) -> None:
    with pytest.raises(ValueError, match=match):
        function(*args, **kwargs)


def test_refusals_of_shapes() -> None:
    x, weight = random(1, 4, 5, 5), random(6, 4, 3, 3)
    refused(block_diagonal_conv2d, [], weight, match="inputs .* of one shape; got none")
    refused(block_diagonal_conv2d, [x, x[:, :3]], weight, match=r"of one shape; got \(1, 4, 5, 5\), \(1, 3, 5, 5\)")
    refused(block_diagonal_conv2d, [x[0]], weight, match=r"got \(4, 5, 5\)")
    refused(block_diagonal_conv2d, [x] * 4, weight, match=r"weight \(4·K, 4, R, S\).*got \(6, 4, 3, 3\)")
    refused(block_diagonal_conv2d, [x] * 2, weight[:, :3], match=r"got \(6, 3, 3, 3\)")
    refused(block_diagonal_conv2d, [x] * 2, weight, random(3), match=r"bias of shape \(6,\); got \(3,\)")
    refused(block_diagonal_conv2d, [x] * 2, weight, stride=2, padding="same", match="'same' needs stride 1")
    refused(grouped_conv2d, x, weight, groups=3, match=r"\(N, 3·C, H, W\); got \(1, 4, 5, 5\)")
    refused(grouped_conv2d, x, weight, groups=2, match=r"weight \(2·K, 2, R, S\)")
    refused(block_sparse_conv2d, x[0], weight, torch.ones(2, 2).bool(), match=r"got \(4, 5, 5\)")
    refused(block_sparse_conv2d, x, weight, torch.ones(4, 2).bool(), match=r"equal blocks; got \(4, 2\)")
    refused(block_sparse_conv2d, x, weight, torch.ones(2, 2), match="bool mask .* got torch.float32")
    refused(block_sparse_conv2d, x, weight, torch.ones(2).bool(), match=r"of shape \(2,\)")


def test_live_blocks_are_listed_both_ways() -> None:
    lists = live_blocks(torch.tensor([[True, False, True], [False, False, False], [True, True, False]]))
    assert lists.rows.tolist() == [0, 0, 2, 2]
    assert lists.columns.tolist() == [0, 2, 0, 1]
    assert lists.row_starts.tolist() == [0, 2, 2, 4]
    assert lists.column_starts.tolist() == [0, 2, 3, 4]
    assert lists.column_rows.tolist() == [0, 2, 2, 0]
    assert all(field.dtype == torch.int32 for field in lists[:-1])
    assert lists.block((48, 96, 3, 3)) == (16, 32)


def test_live_blocks_are_made_once_per_mask() -> None:
    mask = torch.eye(3).bool()
    first = live_blocks(mask)
    assert live_blocks(mask) is first
    assert live_blocks(mask.clone()) is not first
    mask[0, 0] = False
    assert live_blocks(mask).rows.tolist() == [1, 2]
    assert first.mask[0, 0]


def test_live_blocks_keep_no_mask_alive() -> None:
    mask = torch.eye(3).bool()
    live_blocks(mask)
    gone = weakref.ref(mask)
    del mask
    gc.collect()
    assert gone() is None


def channels_last(*size: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.zeros(size, dtype=dtype).contiguous(memory_format=torch.channels_last)


THREE = Geometry((3, 3), (1, 1), (1, 1))
STRIDED = Geometry((3, 3), (2, 2), (1, 1))
X, WEIGHT = channels_last(2, 16, 6, 6), channels_last(32, 16, 3, 3)


@pytest.mark.parametrize(
    ("x", "weight", "geometry", "options", "reason"),
    [
        (X, WEIGHT, THREE, {}, None),
        (X, WEIGHT, STRIDED, {}, None),
        (X, WEIGHT, THREE, {"blocks": (32, 16)}, None),
        (channels_last(2, 64, 6, 6)[:, 8:24], WEIGHT, THREE, {}, None),
        (X.float(), WEIGHT.float(), THREE, {}, None),
        (X.float(), WEIGHT.float(), THREE, {"dtype": torch.float32}, None),
        (X.double(), WEIGHT.double(), THREE, {"dtype": torch.float64}, "float16 or bfloat16; got torch.float64"),
        (X, WEIGHT, Geometry((3, 3), (3, 3)), {}, "stride 1, or stride 2"),
        (X, WEIGHT, Geometry((3, 3), (1, 2)), {}, "stride 1, or stride 2"),
        (X, WEIGHT, Geometry((3, 3), (2, 2), dilation=(2, 2)), {}, "without dilation"),
        (X, WEIGHT, Geometry((9, 9)), {}, "isn't empty"),
        (X[:0], WEIGHT, THREE, {}, "isn't empty"),
        (X[:, :, :1], WEIGHT, STRIDED, {}, "two rows and two columns"),
        (channels_last(2, 12, 6, 6), channels_last(32, 12, 3, 3), THREE, {}, "multiples of 8 channels.*got 12 and 16"),
        (X, channels_last(24, 16, 3, 3), THREE, {}, "multiples of 8 channels.*got 16 and 12"),
        (X, WEIGHT, THREE, {"blocks": (32, 8)}, "multiples of 16 channels; got 32 × 8"),
        (channels_last(2, 12, 6, 6), channels_last(32, 12, 3, 3), THREE, {"dtype": torch.float32}, None),
        (channels_last(2, 6, 6, 6), channels_last(32, 6, 3, 3), THREE, {"dtype": torch.float32}, "multiples of 4"),
        (X.contiguous(), WEIGHT.contiguous(), THREE, {}, None),
        (channels_last(2, 64, 6, 6).contiguous()[:, 8:24], WEIGHT.contiguous(), THREE, {}, None),
        (X.contiguous(), WEIGHT, THREE, {}, "channels-last inputs for a channels-last weight"),
        (channels_last(2, 128, 6, 6)[:, ::8], WEIGHT, THREE, {}, "channels next to each other"),
        (channels_last(2, 20, 6, 6)[:, :16], WEIGHT, THREE, {}, "multiples of 16 bytes"),
    ],
)
def test_what_the_kernels_refuse(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    options: dict[str, Any],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"dtype": torch.float16, "groups": 2, **options}
    told = refusal([x, x], weight, geometry, **options)
    assert told is not None
    assert "CUDA device" in told
    monkeypatch.setattr(formulas, "fetches_boxes", lambda device: True)
    told = refusal([x, x], weight, geometry, **options)
    if reason is None:
        assert told is None
    else:
        assert told is not None
        assert re.search(reason, told)


def test_streams_of_two_layouts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formulas, "fetches_boxes", lambda device: True)
    told = refusal([X, X.contiguous()], WEIGHT, THREE, torch.float16, 2)
    assert told is not None
    assert "one layout" in told


@pytest.mark.parametrize(
    ("positions", "shape", "box"),
    [
        (128, (32, 56, 56), (2, 8, 8)),
        (128, (256, 28, 28), (8, 4, 4)),
        (128, (256, 7, 7), (128, 1, 1)),
        (64, (1, 1, 1), (1, 8, 8)),
        (64, (1, 1, 64), (1, 1, 64)),
        (256, (1, 16, 16), (1, 16, 16)),
    ],
)
def test_boxes_cover_with_the_fewest(positions: int, shape: tuple[int, int, int], box: tuple[int, int, int]) -> None:
    assert box_of(positions, *shape) == box


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((256, 7, 7), (64, 1, 1)),
        ((32, 7, 7), (32, 1, 1)),
        ((32, 56, 56), (1, 1, 64)),
        ((1, 56, 56), (1, 1, 64)),
        ((17, 3, 4), (32, 1, 1)),
    ],
)
def test_sums_take_the_cheapest_line(shape: tuple[int, int, int], box: tuple[int, int, int]) -> None:
    assert line_of(*shape) == box


def test_float32_sums_over_shorter_lines() -> None:
    assert line_of(256, 7, 7, "tf32") == (32, 1, 1)
    assert line_of(256, 7, 7, "float32") == (16, 1, 1)


def test_samples_fill_their_tiles() -> None:
    assert all(tile.positions <= 128 for tile in tiles(64, 64, 128) if tile.samples)
    assert any(tile.samples for tile in tiles(64, 64, 128))
    assert not any(tile.samples for tile in tiles(64, 64, 32))


ARITHMETIC = ["bfloat16", "tf32", "float32"]


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("channels", [4, 8, 16, 24, 32, 48, 64, 96, 512])
def test_there_are_tiles_for_any_channels(channels: int, arithmetic: str) -> None:
    for read, written in ((channels, 16), (16, channels), (channels, channels)):
        assert tiles(read, written, 1, None, arithmetic)
        assert weight_tiles(read, written, 1, None, arithmetic)
        rows_of_taps = [tile.row_of_taps for tile in weight_tiles(read, written, 3, None, arithmetic)]
        assert any(rows_of_taps) == (arithmetic != "float32")
        assert not any(tile.row_of_taps for tile in weight_tiles(read, written, 5, None, arithmetic))
        for found in (tiles(read, written, 256, None, arithmetic), weight_tiles(read, written, 3, None, arithmetic)):
            assert len({tile.name for tile in found}) == len(found)


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("blocks", [(16, 16), (48, 32), (128, 96)])
def test_tiles_divide_live_blocks(blocks: tuple[int, int], arithmetic: str) -> None:
    found = tiles(512, 512, 32, blocks, arithmetic)
    assert found
    assert all(blocks[0] % tile.written == 0 and blocks[1] % tile.read == 0 for tile in found)
    assert weight_tiles(512, 512, 3, blocks, arithmetic)


@pytest.mark.parametrize(
    ("channels", "side", "positions", "samples"), [(64, 56, 128, False), (128, 28, 128, False), (512, 7, 128, True)]
)
def test_the_first_tile_is_the_one_that_fetches_least(channels: int, side: int, positions: int, samples: bool) -> None:
    """Two programs fit on a multiprocessor, and on images of 7 pixels nothing is computed in vain."""
    first = by_traffic(tiles(channels, channels, 256), 256, side, side, channels)[0]
    assert (first.positions, first.samples) == (positions, samples)
    assert 2 * (first.positions + first.written) * 128 * first.stages <= 227 * 1024
    weight = weights_by_traffic(weight_tiles(channels, channels, 3), channels, channels)
    assert weight[0].columns >= 64
    assert weight[0].traffic == min(tile.traffic for tile in weight if tile.columns >= 64)


@pytest.mark.parametrize("channels", [16, 32, 64, 128])
def test_tiles_of_few_channels_race_for_live_blocks_alone(channels: int) -> None:
    weight = (2 * channels, channels, 3, 3)
    sizes = passes.Sizes(False, (128, channels, 8, 8), weight, torch.float16, torch.device("cuda"))
    problem = Problem(2, THREE)
    live = Problem(1, THREE, live_blocks(torch.eye(2).bool()))
    for candidates in (passes._of_forward, passes._of_input_gradient, passes._of_weight_gradient):
        found = candidates(problem, sizes)
        assert any(candidate.races for name, candidate in found.items() if name != "split") == (channels >= 64)
        assert len(found) > 1
        halves = sizes._replace(weight=(channels, channels, 3, 3))
        assert all(candidate.races for candidate in candidates(live, halves).values())


def test_the_compiler_takes_the_device_for_a_constant():
    """As ``torch.compiler.assume_constant_result`` would mark it, which imports the compiler."""

    @torch.compiler.assume_constant_result
    def marked():
        return True

    assert vars(marked)
    assert vars(marked).items() <= vars(formulas.fetches_boxes).items()

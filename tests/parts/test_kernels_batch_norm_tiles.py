"""The cut of the fused BatchNorm: every position once, powers of 2, little beyond the end, sums on few parts."""

from __future__ import annotations

import pytest
import torch
from fastmerge.kernels.batch_norm.tiles import Tiles, patches, strides_of, tiles, walk, walkable
from hypothesis import given
from hypothesis import strategies as st

from batch_norm_checks import in_layout

# N, P and C of layers of ResNet-18, ResNet-50 and ResNet-20 of two teachers, a linear layer's, and unusual ones.
SIZES = [
    (256, 56 * 56, 128), (256, 28 * 28, 256), (256, 14 * 14, 512), (256, 49, 1024), (256, 49, 4096), (128, 32 * 32, 32),
    (128, 64, 128), (1, 256 * 56 * 56, 128), (512, 1, 200), (1, 1, 1), (3, 7, 5), (1, 2**33, 1), (7, 11, 4095), (2**20, 1, 3),
]  # fmt: skip


def shares(cut: Tiles) -> tuple[int, int]:
    """The sizes of N and P that the programs take together, as the kernels compute it."""
    held_p = sum(max(min(cut.p - part * cut.pixels, cut.pixels), 0) for part in range(cut.parts_p))
    parts_n = cut.parts // cut.parts_p
    return sum(max(min(cut.n - part * cut.samples, cut.samples), 0) for part in range(parts_n)), held_p


@given(
    st.integers(1, 600),
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.sampled_from([2, 4]),
    st.booleans(),
    st.booleans(),
)
def test_every_position_is_in_one_share(n: int, p: int, c: int, itemsize: int, last: bool, summing: bool) -> None:
    cut = tiles(n, p, c, itemsize, last, summing)
    assert shares(cut) == (n, p)
    assert cut.parts % cut.parts_p == 0
    # No program is left without a position: the mean of nothing would be NaN.
    assert (cut.parts_p - 1) * cut.pixels < p
    assert (cut.parts // cut.parts_p - 1) * cut.samples < n
    assert (cut.blocks_c - 1) * cut.block_c < c <= cut.blocks_c * cut.block_c
    for block in cut.blocks.values():
        assert block & (block - 1) == 0
    assert cut.block_n * cut.block_p * cut.block_c <= 1024
    assert cut.samples % cut.block_n == cut.pixels % cut.block_p == 0


@pytest.mark.parametrize("summing", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_programs_fill_the_card_and_no_more(size: tuple[int, int, int], summing: bool) -> None:
    n, p, c = size
    for itemsize in (2, 4):
        cut = tiles(*size, itemsize, True, summing)
        elements = n * p * c
        programs = cut.parts * cut.blocks_c
        assert programs <= (16384 if summing and elements < 2**33 else elements / 4096 + 32768)
        if elements > 2**22:
            assert programs >= 512
            # What summing programs leave, three numbers a channel, is little beside the tensor.
            assert not summing or cut.parts * c * 12 <= 0.1 * elements * itemsize


@pytest.mark.parametrize("size", SIZES[:7], ids=str)
def test_little_is_beyond_the_end(size: tuple[int, int, int]) -> None:
    n, p, c = size
    cut = tiles(*size, 2, True, True)
    tiled = -(-n // cut.block_n) * cut.block_n * -(-p // cut.block_p) * cut.block_p * cut.blocks_c * cut.block_c
    assert tiled <= 1.15 * n * p * c
    assert cut.block_c == min(64, c)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 5000), st.booleans(), st.booleans())
def test_patches(h: int, w: int, c: int, last: bool, pooling: bool) -> None:
    blocks = patches(h, w, c, 2, last, pooling)
    assert all(block >= 1 and block & (block - 1) == 0 for block in blocks)
    assert blocks[0] * blocks[1] * blocks[2] <= (2048 if pooling else 1024)


def strides(x: torch.Tensor) -> tuple[int, int, int]:
    return strides_of(x.shape, x.stride())


def test_strides() -> None:
    x = torch.randn(3, 5, 4, 6)
    assert strides(x) == (120, 1, 24)
    assert strides(in_layout(x, "channels-last")) == (120, 5, 1)
    assert strides(in_layout(x, "slice")) == (24 * 13, 13, 1)
    assert strides(x[:, :, :1]) == (120, 1, 24)
    assert strides(x[:, :, :, 2:3]) == (120, 6, 24)
    assert strides(torch.ones(()).expand(3, 5, 4, 6)) == (0, 0, 0)
    assert strides(x[:, :, 0, 0]) == (120, 120, 24)
    kept, cropped = walkable([x, in_layout(x, "cropped")])
    assert kept is x
    assert cropped.is_contiguous()
    assert torch.equal(cropped, x)


def test_samples_are_joined_where_nothing_tells_them_apart() -> None:
    x = in_layout(torch.randn(3, 5, 4, 6), "slice")
    joined = walk((x,), by_sample=False, summing=True).tiles
    assert (joined.n, joined.p) == (1, 72)
    apart = walk((x,), by_sample=True, summing=True).tiles
    assert (apart.n, apart.p) == (3, 24)
    contiguous = x.contiguous()
    for tensors in ((x, contiguous), (contiguous,)):
        assert walk(tensors, by_sample=False, summing=True).tiles.n == 3


def test_what_can_be_read_at_once() -> None:
    """A power of 2 that divides all sizes and distances, but for the 1 between what lies side by side."""

    def found(*tensors: torch.Tensor) -> tuple[bool, int]:
        way = walk(tensors, by_sample=True, summing=False)
        return way.last, way.vector

    def image(channels: int, layout: str) -> torch.Tensor:
        return in_layout(torch.zeros(3, channels, 4, 6), layout)

    assert found(image(64, "channels-last")) == (True, 8)
    assert found(image(24, "channels-last"), image(24, "slice")) == (True, 8)
    assert found(image(20, "channels-last")) == (True, 4)
    assert found(image(5, "channels-last")) == (True, 1)
    assert found(image(64, "channels-last"), image(64, "contiguous")) == (False, 1)
    assert found(image(5, "contiguous")) == (False, 8)
    assert found(image(5, "contiguous")[..., :3].contiguous()) == (False, 4)
    expanded = torch.ones(3, 64, 1, 1).to(memory_format=torch.channels_last).expand(3, 64, 4, 6)
    assert found(image(64, "channels-last"), expanded.movedim(1, -1).contiguous().movedim(-1, 1)) == (True, 8)

"""How the fused BatchNorm cuts a tensor into tiles: from shape, layout and dtype alone, never from the card.

So a sum is the same bits on every card and in every run. A kernel walks tensors of shape (N, C, P) tile by tile; a
program takes the tiles of ``samples`` x ``pixels`` positions and ``block_c`` channels.

Dims: N batch, C channels, P positions of a sample.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from fastmerge.kernels.launch import forget, remembered
from torch import Tensor

# Elements of a tile, 8 in each of 128 threads: one or two vector loads of each tensor. Larger ones take so many registers in
# the passes that sum, with residual and gate, that only few programs fit.
_TILE = 1024
# Outputs of a tile in the pooling pass over channels-last tensors, whose neighbouring windows share what they read.
_POOLING_TILE = 2048
# The bytes of a position that a tile takes at a time, in channels-last: one cache line.
_LINE_BYTES = 128
# Positions that a tile takes at a time where the positions of a channel lie side by side.
_RUN = 256
# A pass is cut into this many programs while a tensor is large enough: several waves of them, so that the last is a short
# tail. No program takes more tiles than MOST; but for a tensor too small to fill the card it takes LEAST before there are
# more of them, since the passes that sum leave a partial sum per program.
_FEW_PROGRAMS = 512
# Of the passes that sum, four or eight programs fit on a multiprocessor: 1056 are two or one full waves of 132 of them.
_SUMMING = {"programs": 1056, "least": 4, "most": 256}
_WRITING = {"programs": 8192, "least": 1, "most": 8}
# Tiles whose loads are in flight at a time: 1, or more for the price of registers and shared memory.
STAGES = 1
# Elements that no load of a thread exceeds.
MOST_AT_ONCE = 8


class Tiles(NamedTuple):
    """The cut of one pass.

    Attributes:
        n, p: samples and positions as the kernels see them; all positions are one sample's where no gate tells samples apart.
        c: channels.
        block_n, block_p, block_c: the tile, powers of 2.
        samples, pixels: what a program takes of N and P.
        parts_p: programs along P.
        parts: programs along N and P.
        blocks_c: programs along C.
    """

    n: int
    p: int
    c: int
    block_n: int
    block_p: int
    block_c: int
    samples: int
    pixels: int
    parts_p: int
    parts: int
    blocks_c: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """The run-time arguments that every kernel takes."""
        return self.n, self.p, self.c, self.samples, self.pixels, self.parts_p

    @property
    def blocks(self) -> dict[str, int]:
        """The tile as constexpr arguments."""
        return {"BLOCK_N": self.block_n, "BLOCK_P": self.block_p, "BLOCK_C": self.block_c}


class Walk(NamedTuple):
    """How a pass goes through its tensors.

    Attributes:
        tiles: the cut.
        grid: programs, without those of further streams.
        integers: run-time arguments: ``Tiles.sizes``, then the strides along N, P and C of each tensor.
        last: whether channels lie side by side in all tensors; else it is positions that may.
        vector: sizes and strides, but for that of what lies side by side, are multiples of it: so much can be read at once.
    """

    tiles: Tiles
    grid: tuple[int, int]
    integers: tuple[int, ...]
    last: bool
    vector: int

    @property
    def constants(self) -> dict[str, int]:
        """The constexpr arguments that every kernel takes."""
        return {**self.tiles.blocks, "LAST": self.last, "VECTOR": self.vector, "STAGES": STAGES}


@contextmanager
def constants(**others: Any) -> Iterator[None]:
    """Within it the named constants of this module have other values: to measure them, and to test small tensors."""
    before = {name: globals()[name] for name in others}
    try:
        _set_constants(others)
        yield
    finally:
        _set_constants(before)


def _set_constants(values: dict[str, Any]) -> None:
    globals().update(values)
    forget()


@remembered
def tiles(n: int, p: int, c: int, itemsize: int, channels_last: bool, summing: bool) -> Tiles:
    """Cuts a tensor of shape (N, C, P).

    Args:
        n, p, c: its sizes.
        itemsize: bytes of an element.
        channels_last: whether channels lie side by side; otherwise positions do.
        summing: for a pass that leaves partial sums, rather than one that only writes.
    """
    if channels_last:
        block_c = _least_waste(c, _LINE_BYTES // itemsize)
        block_p = _least_waste(p, _TILE // block_c)
    else:
        block_p = _least_waste(p, _RUN)
        block_c = min(_power_of_2(c), max(_TILE // block_p, 2))
    block_n = min(_power_of_2(n), max(_TILE // (block_p * block_c), 1))
    tiles_n, tiles_p, blocks_c = _ceil(n, block_n), _ceil(p, block_p), _ceil(c, block_c)

    cut, total = _SUMMING if summing else _WRITING, tiles_n * tiles_p * blocks_c
    steps = min(max(total // cut["programs"], min(cut["least"], total // _FEW_PROGRAMS), 1), cut["most"])
    parts_p = _ceil(tiles_p, steps)
    pixels = _ceil(tiles_p, parts_p) * block_p
    samples = (max(steps // tiles_p, 1) if parts_p == 1 else 1) * block_n
    # Rounding up may have left the last programs without a position.
    parts_p = _ceil(p, pixels)
    return Tiles(n, p, c, block_n, block_p, block_c, samples, pixels, parts_p, _ceil(n, samples) * parts_p, blocks_c)


@remembered
def patches(h: int, w: int, c: int, itemsize: int, channels_last: bool, pooling: bool) -> tuple[int, int, int]:
    """Rows, columns and channels of the patches of a plane, powers of 2; ``patch_warps`` walk each.

    Args:
        h, w, c: sizes of the plane.
        itemsize, channels_last: see ``tiles``.
        pooling: for the pass that pools, rather than the one back.
    """
    most = _POOLING_TILE if pooling and channels_last else _TILE
    if not channels_last:
        # In one piece along a row, for that is what lies side by side; channels fill up what a small plane leaves.
        block_w = min(_power_of_2(w), 64)
        block_h = min(_power_of_2(h), most // block_w)
        return block_h, block_w, min(_power_of_2(c), most // (block_w * block_h))
    # Nearly square, for neighbouring windows overlap.
    block_c = _least_waste(c, _LINE_BYTES // itemsize)
    positions = most // block_c
    block_w = min(_power_of_2(w), 1 << (positions.bit_length() // 2))
    return min(_power_of_2(h), positions // block_w), block_w, block_c


def patch_warps(channels_last: bool, pooling: bool) -> int:
    """Warps of a program that walks a patch: no thread may hold more of the windows that it reads than its registers take.

    A tap is one vector load of a thread in channels-last, one load for each position where these lie side by side.
    """
    return 8 if pooling or not channels_last else 4


def walk(tensors: Sequence[Tensor], by_sample: bool, summing: bool) -> Walk:
    """Cuts tensors of one shape, as one long sample if nothing tells samples apart and all strides allow it.

    Args:
        tensors: shape (N, C, ...), not empty; the first decides what lies side by side.
        by_sample: whether a program must know whose positions it holds.
        summing: see ``tiles``.

    Raises:
        NotWalkableError: for a tensor that isn't ``walkable``.
    """
    x = tensors[0]
    return _walk(x.shape, x.element_size(), tuple([t.stride() for t in tensors]), by_sample, summing)


@remembered
def _walk(
    shape: tuple[int, ...],
    itemsize: int,
    all_strides: tuple[tuple[int, ...], ...],
    by_sample: bool,
    summing: bool,
) -> Walk:
    strides = [strides_of(shape, own) for own in all_strides]
    cut = tiles_of(shape, itemsize, strides, by_sample, summing)
    integers = (*cut.sizes, *[stride for own in strides for stride in own])
    last = all(own[2] == 1 for own in strides)
    vector, size = 1, cut.c if last else cut.p
    if last or all(own[1] == 1 for own in strides):
        vector = math.gcd(MOST_AT_ONCE, size, *[step for own in strides for step in (own[0], own[1 if last else 2])])
    return Walk(cut, (cut.parts, cut.blocks_c), integers, last, vector)


def tiles_of(
    shape: Sequence[int], itemsize: int, strides: Iterable[tuple[int, int, int]], by_sample: bool, summing: bool
) -> Tiles:
    """The cut of tensors of one shape with these ``strides_of``; see ``walk``."""
    strides = list(strides)
    n, c = shape[:2]
    p = math.prod(shape[2:])
    channels_last = strides[0][2] == 1 or c == 1 or p == 1
    if not by_sample and all(stride_n == p * stride_p or n == 1 for stride_n, stride_p, _ in strides):
        n, p = 1, n * p
    return tiles(n, p, c, itemsize, channels_last, summing)


class NotWalkableError(ValueError):
    """No one pair of strides leads through a tensor's samples and their positions."""


def walkable(streams: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, copied where no one pair of strides leads through samples and their positions."""
    return [x if _position_stride(x.shape, x.stride()) is not None else x.contiguous() for x in streams]


def strides_of(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int, int]:
    """Strides of a ``walkable`` tensor along N, P and C.

    A single position gets the stride that makes one long sample of all of them.
    """
    stride_p = _position_stride(tuple(shape), tuple(strides))
    if stride_p is None:
        raise NotWalkableError(f"strides {strides} of shape {shape} don't merge")
    return strides[0], (stride_p if stride_p >= 0 else strides[0]), strides[1]


@functools.lru_cache(maxsize=4096)
def _position_stride(shape: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """The stride from position to position; -1 if a sample has one position, None if there is no such stride."""
    expected, innermost = -1, -1
    for dim in range(len(shape) - 1, 1, -1):
        size, stride = shape[dim], strides[dim]
        if size == 1:
            continue
        if innermost < 0:
            innermost = stride
        elif stride != expected:
            return None
        expected = stride * size
    return innermost


def _least_waste(size: int, most: int) -> int:
    """The largest power of 2 up to ``most`` that reaches beyond the end of ``size`` hardly more than the best one does."""
    blocks = [block for block in (most, most // 2, most // 4, most // 8) if 1 <= block <= _power_of_2(size)]
    blocks = blocks or [_power_of_2(size)]
    least = min(_ceil(size, block) * block for block in blocks)
    return next(block for block in blocks if _ceil(size, block) * block <= 1.125 * least)


def _power_of_2(size: int) -> int:
    """The least power of 2 that is at least ``size``."""
    return 1 << (size - 1).bit_length()


def _ceil(size: int, block: int) -> int:
    return -(-size // block)

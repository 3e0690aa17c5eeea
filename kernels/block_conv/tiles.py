"""Tile shapes of the block convolution's kernels: which ones are worth timing for a layer.

Every tile here compiles for sm_90 without spills, within the 227 KB of shared memory, and to wgmma except for float32 without
TF32, which tensor cores don't multiply; the tests hold it to that. Names of arithmetic are those of ``arithmetic``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fastmerge.kernels.block_conv.arithmetic import IEEE, TF32


@dataclass(frozen=True)
class Tile:
    """A tile of the forward pass or the input gradient.

    Attributes:
        positions: positions of the written tensor in a tile, a power of 2.
        written: its channels.
        read: channels read in a step.
        warps: warps of a program.
        stages: steps in flight.
        samples: whether a tile holds one position of many samples, rather than a box of neighbours.
    """

    positions: int
    written: int
    read: int
    warps: int
    stages: int
    samples: bool = False

    @property
    def narrow(self) -> bool:
        """Whether most of tensor cores' work is in vain, so that it wins no race."""
        return self.written < _LEAST_RACED

    @property
    def traffic(self) -> float:
        """Elements fetched per product, see :func:`_traffic`."""
        return _traffic(self.positions, self.written, self.stages, self.positions * self.written)

    @property
    def name(self) -> str:
        samples = " samples" if self.samples else ""
        return f"triton {self.positions}x{self.written}x{self.read}{samples} w{self.warps} s{self.stages}"


@dataclass(frozen=True)
class WeightTile:
    """A tile of the weight gradient.

    Attributes:
        rows: output channels in a tile.
        columns: input channels.
        row_of_taps: whether a program computes three taps of a row instead of one; kernels three columns wide only.
        programs: how many programs to split the sum for. A constant, not the card's number of multiprocessors: the same
            tile gives the same bits on any card.
        warps: warps of a program.
        stages: steps in flight.
    """

    rows: int
    columns: int
    row_of_taps: bool
    programs: int
    warps: int
    stages: int

    @property
    def narrow(self) -> bool:
        """As for :class:`Tile`."""
        return self.columns < _LEAST_RACED

    @property
    def traffic(self) -> float:
        """Elements fetched per product, see :func:`_traffic`."""
        taps = 3 if self.row_of_taps else 1
        return _traffic(self.rows, taps * self.columns, self.stages, self.rows * taps * self.columns)

    @property
    def name(self) -> str:
        taps = "x3" if self.row_of_taps else ""
        return f"triton {self.rows}x{self.columns}{taps} p{self.programs} w{self.warps} s{self.stages}"


def _traffic(left: int, right: int, stages: int, products: int) -> float:
    """Elements of a step's two operands per product: what a kernel costs that waits for the L2 cache.

    40 % more where a single program fits on a multiprocessor, whose first fetches and last writes nothing hides.
    """
    alone = 2 * (left + right) * _ROW_BYTES * stages > _SHARED_BYTES
    return (left + right) / products * (1.4 if alone else 1.0)


_SHARED_BYTES, _ROW_BYTES = 227 * 1024, 128
# Narrower tiles are there for live blocks, and for whoever fixes the choice.
_LEAST_RACED = 64
# positions, written channels, warps, stages
_TILES = (
    (128, 256, 8, 3),
    (256, 128, 8, 3),
    (128, 128, 8, 4),
    (128, 128, 4, 3),
    (64, 128, 4, 3),
    (256, 64, 8, 4),
    (128, 64, 4, 3),
    (64, 64, 4, 4),
    (256, 32, 8, 4),
    (128, 32, 4, 4),
    (256, 16, 8, 4),
    (128, 16, 4, 4),
)
# rows, columns, row of taps, warps, stages
_WEIGHT_TILES = (
    (128, 256, False, 8, 3),
    (128, 128, False, 8, 4),
    (128, 64, True, 8, 4),
    (128, 64, False, 4, 4),
    (64, 128, False, 4, 4),
    (64, 64, True, 4, 4),
    (64, 64, False, 4, 4),
    (64, 32, True, 4, 4),
    (64, 32, False, 4, 4),
    (64, 16, True, 4, 4),
    (64, 16, False, 4, 4),
)
_PROGRAMS = (264, 1056)
# The same without tensor cores: operands and sums share the registers.
_IEEE_TILES = ((128, 64, 8, 3), (64, 64, 4, 3), (128, 32, 8, 3), (64, 32, 4, 3), (128, 16, 4, 3), (64, 16, 4, 3))
_IEEE_WEIGHT_TILES = ((64, 64, False, 8, 3), (64, 32, False, 4, 3), (64, 16, False, 4, 3))
# Channels read in a step, positions summed over in one: elements of 128 bytes for tensor cores, and what registers hold.
_MOST_READ = {TF32: 32, IEEE: 16}
_LONGEST_LINE = {TF32: 32, IEEE: 16}


def tiles(
    read_channels: int,
    written_channels: int,
    batch: int,
    blocks: tuple[int, int] | None = None,
    arithmetic: str = "bfloat16",
) -> tuple[Tile, ...]:
    """The tiles to time for a forward pass or an input gradient.

    Args:
        read_channels: channels of the read tensor, in one stream.
        written_channels: channels of the written tensor, in one stream.
        batch: N.
        blocks: written and read channels of a block, of a block-sparse weight: tiles must divide them.
        arithmetic: what it multiplies in.
    """
    read = min(
        _MOST_READ.get(arithmetic, 64), _power_above(read_channels) if blocks is None else _power_within(blocks[1])
    )
    choice = _IEEE_TILES if arithmetic == IEEE else _TILES
    most = max(written for _, written, _, _ in choice)
    widest = min(most, _power_above(written_channels) if blocks is None else _power_within(blocks[0]))
    return tuple(
        Tile(positions, written, read, warps, stages, samples)
        for positions, written, warps, stages in choice
        for samples in (True, False)
        if widest // 2 <= written <= widest
        # Samples must fill a tile. Where they do, boxes of neighbours are left out if too few channels are written for
        # them to be wgmma's right operand.
        and (positions <= batch if samples else written >= 64 or positions > batch)
    )


def weight_tiles(
    read_channels: int,
    written_channels: int,
    kernel_columns: int,
    blocks: tuple[int, int] | None = None,
    arithmetic: str = "bfloat16",
) -> tuple[WeightTile, ...]:
    """The tiles to time for a weight gradient; arguments as for :func:`tiles`, with the forward pass's sides."""
    columns_most = _power_above(read_channels) if blocks is None else _power_within(blocks[1])
    choice = _IEEE_WEIGHT_TILES if arithmetic == IEEE else _WEIGHT_TILES
    most = min(128, max(columns for _, columns, _, _, _ in choice))
    rows_most = max(64, _power_above(written_channels) if blocks is None else blocks[0])
    return tuple(
        WeightTile(rows, columns, row_of_taps, programs, warps, stages)
        for rows, columns, row_of_taps, warps, stages in choice
        for programs in _PROGRAMS
        if rows <= rows_most
        and min(columns_most, most) // 2 <= columns <= columns_most
        and (kernel_columns == 3 or not row_of_taps)
    )


def by_traffic(found: Iterable[Tile], batch: int, height: int, width: int, channels: int) -> list[Tile]:
    """Tiles with the one that is likely to be the fastest first: the least traffic, what is computed in vain included.

    Args:
        found: to be sorted.
        batch: N of the tensor that is written.
        height: its H.
        width: its W.
        channels: its channels, in one stream.
    """

    def cost(tile: Tile) -> tuple[bool, float, bool]:
        neighbours = box_of(tile.positions, batch, height, width)
        n, h, w = (tile.positions, 1, 1) if tile.samples else neighbours
        boxes = -(-batch // n) * -(-height // h) * -(-width // w)
        products = boxes * tile.positions * _multiple_of(tile.written, channels)
        # Of the same samples as a box of neighbours, the compiler would copy them through registers.
        return tile.narrow, products * tile.traffic, tile.samples != (neighbours[1:] == (1, 1))

    return sorted(found, key=cost)


def weights_by_traffic(found: Iterable[WeightTile], read_channels: int, written_channels: int) -> list[WeightTile]:
    """Likewise of the weight gradient's tiles; channels as for :func:`weight_tiles`."""

    def cost(tile: WeightTile) -> tuple[bool, float]:
        rows, columns = _multiple_of(tile.rows, written_channels), _multiple_of(tile.columns, read_channels)
        return tile.narrow, rows * columns * tile.traffic

    return sorted(found, key=cost)


def _multiple_of(step: int, size: int) -> int:
    return -(-size // step) * step


def box_of(positions: int, batch: int, height: int, width: int) -> tuple[int, int, int]:
    """The box of N × H × W positions, powers of 2 with this product, that covers a tensor with the fewest boxes.

    Among equals, the one with the most rows and columns, whose taps overlap most, and of those the squarest.
    """

    def cost(box: tuple[int, int, int]) -> tuple[int, int, int]:
        n, h, w = box
        return -(-batch // n) * -(-height // h) * -(-width // w), n, abs(h - w)

    return min(_boxes(positions), key=cost)


def line_of(batch: int, height: int, width: int, arithmetic: str = "bfloat16") -> tuple[int, int, int]:
    """The box of N × H × W positions for a sum over all of them: 16 to 64 samples at one position, or positions of a row.

    Of float32 32 at the most, and 16 without TF32.

    The one that takes the least time, if a box costs as much as its positions and 16 more.
    """
    lengths = [length for length in (64, 32, 16) if length <= _LONGEST_LINE.get(arithmetic, 64)]
    lines = [line for length in lengths for line in ((length, 1, 1), (1, 1, length))]

    def cost(box: tuple[int, int, int]) -> int:
        n, _, w = box
        return -(-batch // n) * height * -(-width // w) * (n * w + 16)

    return min(lines, key=cost)


def _boxes(positions: int) -> Iterator[tuple[int, int, int]]:
    h = 1
    while h <= positions:
        w = 1
        while h * w <= positions:
            yield positions // (h * w), h, w
            w *= 2
        h *= 2


def _power_above(n: int) -> int:
    """The least power of 2 of at least n, and 16 at least: what tensor cores take."""
    return max(16, 1 << (n - 1).bit_length())


def _power_within(n: int) -> int:
    """The largest power of 2 that divides n."""
    return n & -n

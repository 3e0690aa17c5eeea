"""Triton kernels of the block convolution's weight gradient. Formulas: ``formulas``.

For each tap a GEMM over all positions, ``dw[k, tap, c] = Σ dy[position, k] x[position moved by the tap, c]``: boxes of
positions of dy and, moved by the tap, of x. A box holds one position of many samples, or many of one row, which wgmma takes
from shared memory as they are, but for float32: of that the positions summed over would have to lie next to each other, so
the compiler turns both boxes round in shared memory. A program takes one tap, or one row of three taps, which then share
each box of dy. At stride 2 a tap reads one lattice of x (``correlate_triton``).

The positions are dealt out to ``splits`` programs (split-K). Each writes its sum to a workspace of its own, and a second
kernel adds them up in one order: no atomics, so a gradient is the same bits each time.

Dims: T streams, N batch, H W positions, C channels of x, K of dy; BM channels of dy and BN of x in a program's tile.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from fastmerge.kernels.block_conv.boxes_triton import load_box, shared_constants
from fastmerge.kernels.block_conv.formulas import Geometry
from fastmerge.kernels.block_conv.tiles import WeightTile

REDUCE_BLOCK = 256  # elements of a program that adds up
_REDUCE_ROWS = 8  # partial sums that it has on their way at a time


@triton.jit
def _dot(dy_tile, x_tile, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:
        dy_tile = dy_tile.to(tl.float32)
        x_tile = x_tile.to(tl.float32)
    return tl.dot(dy_tile.T, x_tile, acc, input_precision=PRECISION)


@triton.jit
def _next_box(n, h, w, h_boxes, w_boxes, NB: tl.constexpr, HB: tl.constexpr, WB: tl.constexpr):
    """Where the next box lies, without a division: rows and columns carry over as in an odometer."""
    w += WB
    over = w >= w_boxes * WB
    w = tl.where(over, 0, w)
    h += tl.where(over, HB, 0)
    over = h >= h_boxes * HB
    h = tl.where(over, 0, h)
    n += tl.where(over, NB, 0)
    return n, h, w


@triton.jit
def _store(dw_ptr, acc, k, c, rows, columns, row_stride):
    inside = (k < rows) & (c < columns)
    tl.store(dw_ptr + k.to(tl.int64) * row_stride + c, acc.to(dw_ptr.dtype.element_ty), inside)


# Their values matter little, and each variant would be compiled by itself. What the compiler should know of sizes is that
# they are multiples of VECTOR, 16 bytes of the weight, and so they come in units of it.
_UNSPECIALIZED = [
    *("split_vectors", "row_vectors", "channel_vectors"),
    *("write_channels", "k_tiles", "c_tiles", "parts", "boxes", "boxes_per_split", "h_boxes", "w_boxes"),
    *("x_reversed", "dy_reversed"),
]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def wgrad_kernel(
    x0,
    x1,
    x2,
    x3,
    dy,
    dw_ptr,
    rows_ptr,
    columns_ptr,
    split_vectors,
    row_vectors,
    channel_vectors,
    write_channels,
    k_tiles,
    c_tiles,
    parts,
    boxes,
    boxes_per_split,
    h_boxes,
    w_boxes,
    x_reversed,
    dy_reversed,
    NB: tl.constexpr,
    HB: tl.constexpr,
    WB: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    SAMPLES: tl.constexpr,
    ROW_OF_TAPS: tl.constexpr,
    WRITE_BLOCK: tl.constexpr,
    READ_BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    PIXELS: tl.constexpr = NB * HB * WB
    row_stride = row_vectors * VECTOR
    read_channels = channel_vectors * VECTOR
    # Programs that read the same boxes lie side by side in the launch.
    pid = tl.program_id(0)
    c = pid % c_tiles * BN
    pid = pid // c_tiles
    k = pid % k_tiles * BM
    pid = pid // k_tiles
    tap_columns: tl.constexpr = 1 if ROW_OF_TAPS else KERNEL_W
    tap_column = pid % tap_columns
    pid = pid // tap_columns
    tap_row = pid % KERNEL_H
    pid = pid // KERNEL_H
    part = pid % parts
    split = pid // parts

    # A part is a stream, or a live block of one stream's weight.
    stream = part
    k_end = write_channels
    c_end = read_channels
    dw_ptr += split.to(tl.int64) * split_vectors * VECTOR
    if WRITE_BLOCK:
        stream = 0
        k += tl.load(rows_ptr + part) * WRITE_BLOCK
        c += tl.load(columns_ptr + part) * READ_BLOCK
        # A tile may be wider than a block; what lies beyond it may not be live.
        k_end = (tl.load(rows_ptr + part) + 1) * WRITE_BLOCK
        c_end = (tl.load(columns_ptr + part) + 1) * READ_BLOCK
    else:
        dw_ptr += (part * write_channels).to(tl.int64) * row_stride
    x_stream = tl.where(x_reversed != 0, parts - 1 - stream, stream)
    dy_stream = tl.where(dy_reversed != 0, parts - 1 - stream, stream)

    acc0 = tl.zeros((BM, BN), tl.float32)
    acc1 = acc0
    acc2 = acc0
    first = split * boxes_per_split
    last = tl.minimum(first + boxes_per_split, boxes)
    w = first % w_boxes * WB
    h = first // w_boxes % h_boxes * HB
    n = first // w_boxes // h_boxes * NB
    row_parity = (tap_row + PADDING_H) % STRIDE
    shift_h = (tap_row * DILATION_H - PADDING_H - row_parity) // STRIDE
    if ROW_OF_TAPS:
        for parity in tl.static_range(STRIDE):
            if row_parity == parity:
                for _ in tl.range(first, last):
                    dy_tile = load_box(dy, dy_stream, n, h, w, k, PIXELS, BM, SAMPLES)
                    even = x0 if parity == 0 else x2
                    odd = even if STRIDE == 1 else x1 if parity == 0 else x3
                    parity0: tl.constexpr = PADDING_W % STRIDE
                    parity1: tl.constexpr = (1 + PADDING_W) % STRIDE
                    x_h = h + shift_h
                    w0 = w + (0 * DILATION_W - PADDING_W - parity0) // STRIDE
                    w1 = w + (1 * DILATION_W - PADDING_W - parity1) // STRIDE
                    w2 = w + (2 * DILATION_W - PADDING_W - parity0) // STRIDE
                    x_tile = load_box(odd if parity0 else even, x_stream, n, x_h, w0, c, PIXELS, BN, SAMPLES)
                    acc0 = _dot(dy_tile, x_tile, acc0, PRECISION, UPCAST)
                    x_tile = load_box(odd if parity1 else even, x_stream, n, x_h, w1, c, PIXELS, BN, SAMPLES)
                    acc1 = _dot(dy_tile, x_tile, acc1, PRECISION, UPCAST)
                    x_tile = load_box(odd if parity0 else even, x_stream, n, x_h, w2, c, PIXELS, BN, SAMPLES)
                    acc2 = _dot(dy_tile, x_tile, acc2, PRECISION, UPCAST)
                    n, h, w = _next_box(n, h, w, h_boxes, w_boxes, NB, HB, WB)
    else:
        column_parity = (tap_column + PADDING_W) % STRIDE
        shift_w = (tap_column * DILATION_W - PADDING_W - column_parity) // STRIDE
        for lattice in tl.static_range(STRIDE * STRIDE):
            if row_parity * STRIDE + column_parity == lattice:
                for _ in tl.range(first, last):
                    dy_tile = load_box(dy, dy_stream, n, h, w, k, PIXELS, BM, SAMPLES)
                    x = x0 if lattice == 0 else x1 if lattice == 1 else x2 if lattice == 2 else x3
                    x_tile = load_box(x, x_stream, n, h + shift_h, w + shift_w, c, PIXELS, BN, SAMPLES)
                    acc0 = _dot(dy_tile, x_tile, acc0, PRECISION, UPCAST)
                    n, h, w = _next_box(n, h, w, h_boxes, w_boxes, NB, HB, WB)

    taps = tap_row * KERNEL_W + tap_column
    k_offsets = k + tl.arange(0, BM)[:, None]
    c_offsets = c + tl.arange(0, BN)[None, :]
    dw_ptr += taps * read_channels
    _store(dw_ptr, acc0, k_offsets, c_offsets, k_end, c_end, row_stride)
    if ROW_OF_TAPS:
        _store(dw_ptr + read_channels, acc1, k_offsets, c_offsets, k_end, c_end, row_stride)
        _store(dw_ptr + 2 * read_channels, acc2, k_offsets, c_offsets, k_end, c_end, row_stride)


_REDUCE_UNSPECIALIZED = ["splits", "split_vectors", "row_vectors", "channel_vectors", "block_vectors"]


@triton.jit(do_not_specialize=_REDUCE_UNSPECIALIZED)
def reduce_kernel(
    sums_ptr,
    dw_ptr,
    rows_ptr,
    columns_ptr,
    splits,
    split_vectors,
    row_vectors,
    channel_vectors,
    block_vectors,
    TAPS: tl.constexpr,
    WRITE_BLOCK: tl.constexpr,
    READ_BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < block_vectors * VECTOR
    offset = element.to(tl.int64)
    if WRITE_BLOCK:
        # Elements of a live block in the order (row, tap, column) of the weight.
        row = element // (TAPS * READ_BLOCK)
        tap = element % (TAPS * READ_BLOCK) // READ_BLOCK
        column = element % READ_BLOCK
        row += tl.load(rows_ptr + tl.program_id(1)) * WRITE_BLOCK
        column += tl.load(columns_ptr + tl.program_id(1)) * READ_BLOCK
        offset = row.to(tl.int64) * row_vectors * VECTOR + tap * channel_vectors * VECTOR + column
    rows = tl.arange(0, ROWS)
    partial_ptrs = sums_ptr + rows[:, None].to(tl.int64) * split_vectors * VECTOR + offset[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, splits, ROWS):
        total += tl.load(partial_ptrs, (first + rows < splits)[:, None] & inside[None, :], other=0.0)
        partial_ptrs += split_vectors.to(tl.int64) * ROWS * VECTOR
    tl.store(dw_ptr + offset, tl.sum(total, 0).to(dw_ptr.dtype.element_ty), inside)


def wgrad_constants(
    geometry: Geometry,
    tile: WeightTile,
    box: tuple[int, int, int],
    block: tuple[int, int] = (0, 0),
    arithmetic: str = "bfloat16",
    vector: int = 8,
) -> dict[str, Any]:
    """The constexpr arguments of ``wgrad_kernel``; ``block`` is output and input channels of a live block, or 0."""
    return shared_constants(geometry, box, arithmetic) | {
        "BM": tile.rows,
        "BN": tile.columns,
        "SAMPLES": box[0] > 1,
        "ROW_OF_TAPS": tile.row_of_taps,
        "WRITE_BLOCK": block[0],
        "READ_BLOCK": block[1],
        "VECTOR": vector,
    }


def reduce_constants(geometry: Geometry, block: tuple[int, int], vector: int) -> dict[str, Any]:
    """The constexpr arguments of ``reduce_kernel``, likewise."""
    return {
        "TAPS": geometry.kernel[0] * geometry.kernel[1],
        "WRITE_BLOCK": block[0],
        "READ_BLOCK": block[1],
        "VECTOR": vector,
        "ROWS": _REDUCE_ROWS,
        "BLOCK": REDUCE_BLOCK,
    }

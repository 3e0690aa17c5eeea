"""Triton kernels of the block convolution's weight gradient. Formulas: ``block_conv_formulas``.

For each tap a GEMM over all positions, ``dw[k, tap, c] = Σ dy[position, k] x[position moved by the tap, c]``: boxes of
positions of dy and, moved by the tap, of x. A box holds one position of many samples, or many of one row, which wgmma takes
from shared memory as they are. A program takes one tap, or one row of three taps, which then share
each box of dy. At stride 2 a tap reads one lattice of x (``block_conv_triton``).

The positions are dealt out to ``splits`` programs (split-K). Each writes its sum to a workspace of its own, and a second
kernel adds them up in one order: no atomics, so a gradient is the same bits each time.

Dims: T streams, N batch, H W positions, C channels of x, K of dy; BM channels of dy and BN of x in a program's tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from fastmerge.kernels.block_conv_boxes_triton import launches
from fastmerge.kernels.block_conv_formulas import Geometry, LiveBlocks, empty_channels_last
from fastmerge.kernels.block_conv_tiles import WeightTile, line_of
from torch import Tensor

# Bits of bfloat16 mean nothing to the interpreter's dot product.
UPCAST = triton.knobs.runtime.interpret
_REDUCE_BLOCK = 1024


@triton.jit
def _dot(dy_tile, x_tile, acc, UPCAST: tl.constexpr):
    if UPCAST:
        dy_tile = dy_tile.to(tl.float32)
        x_tile = x_tile.to(tl.float32)
    return tl.dot(dy_tile.T, x_tile, acc)


@triton.jit
def _store(dw_ptr, acc, k, c, rows, columns, row_stride):
    inside = (k < rows) & (c < columns)
    tl.store(dw_ptr + k.to(tl.int64) * row_stride + c, acc.to(dw_ptr.dtype.element_ty), inside)


# Their values matter little, and each variant would be compiled by itself.
_UNSPECIALIZED = [
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
    split_stride,
    row_stride,
    read_channels,
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
    UPCAST: tl.constexpr,
):
    PIXELS: tl.constexpr = NB * HB * WB
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
    dw_ptr += split.to(tl.int64) * split_stride
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
    row_parity = (tap_row + PADDING_H) % STRIDE
    shift_h = (tap_row * DILATION_H - PADDING_H - row_parity) // STRIDE
    if ROW_OF_TAPS:
        for parity in tl.static_range(STRIDE):
            if row_parity == parity:
                for step in tl.range(first, last):
                    w = step % w_boxes * WB
                    h = step // w_boxes % h_boxes * HB
                    n = step // w_boxes // h_boxes * NB
                    dy_tile = dy.load([dy_stream, h, w, n, k] if SAMPLES else [dy_stream, n, h, w, k]).reshape(
                        PIXELS, BM
                    )
                    even = x0 if parity == 0 else x2
                    odd = even if STRIDE == 1 else x1 if parity == 0 else x3
                    parity0: tl.constexpr = PADDING_W % STRIDE
                    parity1: tl.constexpr = (1 + PADDING_W) % STRIDE
                    x_h = h + shift_h
                    w0 = w + (0 * DILATION_W - PADDING_W - parity0) // STRIDE
                    w1 = w + (1 * DILATION_W - PADDING_W - parity1) // STRIDE
                    w2 = w + (2 * DILATION_W - PADDING_W - parity0) // STRIDE
                    x_tile = (
                        (odd if parity0 else even)
                        .load([x_stream, x_h, w0, n, c] if SAMPLES else [x_stream, n, x_h, w0, c])
                        .reshape(PIXELS, BN)
                    )
                    acc0 = _dot(dy_tile, x_tile, acc0, UPCAST)
                    x_tile = (
                        (odd if parity1 else even)
                        .load([x_stream, x_h, w1, n, c] if SAMPLES else [x_stream, n, x_h, w1, c])
                        .reshape(PIXELS, BN)
                    )
                    acc1 = _dot(dy_tile, x_tile, acc1, UPCAST)
                    x_tile = (
                        (odd if parity0 else even)
                        .load([x_stream, x_h, w2, n, c] if SAMPLES else [x_stream, n, x_h, w2, c])
                        .reshape(PIXELS, BN)
                    )
                    acc2 = _dot(dy_tile, x_tile, acc2, UPCAST)
    else:
        column_parity = (tap_column + PADDING_W) % STRIDE
        shift_w = (tap_column * DILATION_W - PADDING_W - column_parity) // STRIDE
        for lattice in tl.static_range(STRIDE * STRIDE):
            if row_parity * STRIDE + column_parity == lattice:
                for step in tl.range(first, last):
                    w = step % w_boxes * WB
                    h = step // w_boxes % h_boxes * HB
                    n = step // w_boxes // h_boxes * NB
                    dy_tile = dy.load([dy_stream, h, w, n, k] if SAMPLES else [dy_stream, n, h, w, k]).reshape(
                        PIXELS, BM
                    )
                    x = x0 if lattice == 0 else x1 if lattice == 1 else x2 if lattice == 2 else x3
                    x_tile = x.load(
                        [x_stream, h + shift_h, w + shift_w, n, c]
                        if SAMPLES
                        else [x_stream, n, h + shift_h, w + shift_w, c]
                    ).reshape(PIXELS, BN)
                    acc0 = _dot(dy_tile, x_tile, acc0, UPCAST)

    taps = tap_row * KERNEL_W + tap_column
    k_offsets = k + tl.arange(0, BM)[:, None]
    c_offsets = c + tl.arange(0, BN)[None, :]
    dw_ptr += taps * read_channels
    _store(dw_ptr, acc0, k_offsets, c_offsets, k_end, c_end, row_stride)
    if ROW_OF_TAPS:
        _store(dw_ptr + read_channels, acc1, k_offsets, c_offsets, k_end, c_end, row_stride)
        _store(dw_ptr + 2 * read_channels, acc2, k_offsets, c_offsets, k_end, c_end, row_stride)


@triton.jit(do_not_specialize=["splits"])
def reduce_kernel(
    sums_ptr,
    dw_ptr,
    rows_ptr,
    columns_ptr,
    splits,
    split_stride,
    row_stride,
    read_channels,
    row_elements,
    block_elements,
    WRITE_BLOCK: tl.constexpr,
    READ_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < block_elements
    offset = element.to(tl.int64)
    if WRITE_BLOCK:
        # Elements of a live block in the order (row, tap, column) of the weight.
        row = element // row_elements
        tap = element % row_elements // READ_BLOCK
        column = element % READ_BLOCK
        row += tl.load(rows_ptr + tl.program_id(1)) * WRITE_BLOCK
        column += tl.load(columns_ptr + tl.program_id(1)) * READ_BLOCK
        offset = row.to(tl.int64) * row_stride + tap * read_channels + column
    total = tl.zeros((BLOCK,), tl.float32)
    sums_ptr += offset
    for _ in range(splits):
        total += tl.load(sums_ptr, inside, other=0.0)
        sums_ptr += split_stride
    tl.store(dw_ptr + offset, total.to(dw_ptr.dtype.element_ty), inside)


def weight_gradient(
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    groups: int,
    geometry: Geometry,
    tile: WeightTile,
    live: LiveBlocks | None = None,
) -> Tensor:
    """Launches ``wgrad_kernel``, and ``reduce_kernel`` where the sum was split.

    Args:
        dys: T gradients (N, K, H', W') of which TMA can fetch boxes, or one joined one.
        xs: T inputs (N, C, H, W) likewise.
        groups: T.
        geometry: of the convolution.
        tile: of the kernel.
        live: the live blocks of a block-sparse weight, T being 1.

    Returns:
        Gradient of the weight, (T·K, C, R, S) in channels-last order and the dtype of dy: exact zeros where no block is
        live, and the same bits each time for the same tile.
    """
    streams = groups // len(dys)
    outputs, channels = dys[0].shape[1] // streams, xs[0].shape[1] // streams
    kernel_h, kernel_w = geometry.kernel
    size = (groups * outputs, channels, kernel_h, kernel_w)
    dw = empty_channels_last(dys[0], size)
    block = (0, 0)
    if live is not None:
        block = live.block(dw.shape)
        # Only live blocks are written.
        dw.zero_()
    n, _, height, width = dys[0].shape
    box = line_of(n, height, width)
    counts = [-(-extent // edge) for extent, edge in zip((n, height, width), box, strict=True)]
    boxes = counts[0] * counts[1] * counts[2]
    k_tiles, c_tiles = triton.cdiv(block[0] or outputs, tile.rows), triton.cdiv(block[1] or channels, tile.columns)
    taps = kernel_h * (1 if tile.row_of_taps else kernel_w)
    constants = wgrad_constants(geometry, tile, box, block)
    row_stride = kernel_h * kernel_w * channels
    lists = (None, None) if live is None else (live.rows, live.columns)
    for part, (x, dy) in launches(groups, xs, dys):
        parts = x.count if live is None else len(live.rows)
        if parts == 0:
            continue
        per_split, splits = split(boxes, k_tiles * c_tiles * taps * parts, tile.programs)
        out = dw[part.start * outputs : part.stop * outputs]
        sums = out if splits == 1 else torch.empty((splits, out.numel()), dtype=torch.float32, device=dw.device)
        with torch.cuda.device_of(dw):
            wgrad_kernel[(k_tiles * c_tiles * taps * parts * splits,)](
                *x.boxes(box, tile.columns, box[0] > 1, geometry.stride[0]),
                *dy.boxes(box, tile.rows, box[0] > 1)[:1],
                sums,
                *lists,
                out.numel(),
                row_stride,
                channels,
                outputs,
                k_tiles,
                c_tiles,
                parts,
                boxes,
                per_split,
                *counts[1:],
                int(x.backwards),
                int(dy.backwards),
                num_warps=tile.warps,
                num_stages=tile.stages,
                **constants,
            )
            if splits > 1:
                elements = out.numel() if live is None else block[0] * block[1] * kernel_h * kernel_w
                reduce_kernel[(triton.cdiv(elements, _REDUCE_BLOCK), 1 if live is None else parts)](
                    sums,
                    out,
                    *lists,
                    splits,
                    out.numel(),
                    row_stride,
                    channels,
                    block[1] * kernel_h * kernel_w,
                    elements,
                    WRITE_BLOCK=block[0],
                    READ_BLOCK=block[1],
                    BLOCK=_REDUCE_BLOCK,
                )
    return dw


def split(boxes: int, programs: int, wanted: int) -> tuple[int, int]:
    """How to deal out a sum: boxes of positions for each program, and into how many parts that splits it.

    Args:
        boxes: to sum over.
        programs: without splitting.
        wanted: programs in all; a little more or fewer is fine.
    """
    splits = max(1, min(boxes, wanted // programs))
    per_split = -(-boxes // splits)
    return per_split, -(-boxes // per_split)


def wgrad_constants(
    geometry: Geometry, tile: WeightTile, box: tuple[int, int, int], block: tuple[int, int] = (0, 0)
) -> dict[str, Any]:
    """The constexpr arguments of ``wgrad_kernel``; ``block`` is output and input channels of a live block, or 0."""
    return {
        "NB": box[0],
        "HB": box[1],
        "WB": box[2],
        "BM": tile.rows,
        "BN": tile.columns,
        "KERNEL_H": geometry.kernel[0],
        "KERNEL_W": geometry.kernel[1],
        "STRIDE": geometry.stride[0],
        "PADDING_H": geometry.padding[0],
        "PADDING_W": geometry.padding[1],
        "DILATION_H": geometry.dilation[0],
        "DILATION_W": geometry.dilation[1],
        "SAMPLES": box[0] > 1,
        "ROW_OF_TAPS": tile.row_of_taps,
        "WRITE_BLOCK": block[0],
        "READ_BLOCK": block[1],
        "UPCAST": UPCAST,
    }

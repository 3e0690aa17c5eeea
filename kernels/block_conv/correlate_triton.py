"""Triton kernel of the block convolution's forward pass and input gradient. Formulas: ``formulas``.

Both are one implicit GEMM that never builds its left operand: a tile of NB × HB × WB positions of the written tensor needs,
for each tap and each block of channels, one dense box of the read tensor, shifted by the tap. TMA fetches it, writes zeros
where it lies outside, and ``tl.dot`` becomes wgmma. The loop runs over (channel block, tap), the taps innermost, so that
what neighbouring taps share is still in the L2 cache.

Stride 2 stays dense boxes too, for both passes, on *lattices*, the rows and columns of one parity:

* the forward pass reads, for the taps of one parity, the lattice of x of that parity at stride 1: four loops, one for each
  lattice, into one accumulator;
* the input gradient writes each lattice of dx by itself: the taps that reach it are those of one parity, and dy is read at
  stride 1. A program writes one tile of one lattice, so the four share a launch and no position is computed in vain.

wgmma reads float32, as TF32, only where the channels summed over lie next to each other. So they do in the read tensor's boxes
and in the forward pass's weight; the input gradient is given a copy of the weight with its channels exchanged (``TURNED``).

For GPUs before sm_90, the compiler turns the boxes into masked loads by pointer: the same kernel, without TMA and wgmma.

Dims: T streams, N batch, H W positions, C channels; BN channels written by a tile, BK channels read in a step.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from fastmerge.kernels.block_conv.arithmetic import IEEE, TF32
from fastmerge.kernels.block_conv.boxes_triton import load_box, shared_constants, store_box
from fastmerge.kernels.block_conv.formulas import Geometry
from fastmerge.kernels.block_conv.tiles import Tile


@triton.jit
def _accumulate(
    acc,
    x,
    w,
    live_ptr,
    blocks,
    x_stream,
    stream,
    n,
    h,
    w_position,
    channel,
    row_parity,
    column_parity,
    NB: tl.constexpr,
    HB: tl.constexpr,
    WB: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    LIVE_BLOCK: tl.constexpr,
    GRADIENT: tl.constexpr,
    SAMPLES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # The taps of this lattice are first, first + STRIDE, ...: all of them at stride 1.
    first_row = (row_parity + PADDING_H) % STRIDE
    first_column = (column_parity + PADDING_W) % STRIDE
    rows = (KERNEL_H - first_row + STRIDE - 1) // STRIDE
    columns = (KERNEL_W - first_column + STRIDE - 1) // STRIDE
    taps = rows * columns
    read = 0
    if LIVE_BLOCK:
        # Loaded a step ahead: a box whose place the same step must look up first would not be fetched in advance.
        per_block: tl.constexpr = LIVE_BLOCK // BK
        live = tl.load(live_ptr, blocks > 0, other=0)
    for step in tl.range(0, blocks * taps):
        tap = step % taps
        block = step // taps
        row = tap // columns
        column = tap % columns
        if LIVE_BLOCK:
            read = live * LIVE_BLOCK + block % per_block * BK
            following = (step + 1) // taps
            live = tl.load(live_ptr + following // per_block, following < blocks, other=0)
        else:
            read = block * BK
        weight_tap = (first_row + STRIDE * row) * KERNEL_W + first_column + STRIDE * column
        # Divisions by STRIDE are exact.
        if GRADIENT:
            shift_h = (row_parity + PADDING_H - first_row) // STRIDE - row * DILATION_H
            shift_w = (column_parity + PADDING_W - first_column) // STRIDE - column * DILATION_W
        else:
            shift_h = row * DILATION_H - (row_parity + PADDING_H - first_row) // STRIDE
            shift_w = column * DILATION_W - (column_parity + PADDING_W - first_column) // STRIDE
        if GRADIENT and not TURNED:
            w_tile = w.load([stream, weight_tap, read, channel]).reshape(BK, BN).T
        else:
            w_tile = w.load([stream, weight_tap, channel, read]).reshape(BN, BK)
        x_tile = load_box(x, x_stream, n, h + shift_h, w_position + shift_w, read, NB * HB * WB, BK, SAMPLES)
        if UPCAST:
            x_tile = x_tile.to(tl.float32)
            w_tile = w_tile.to(tl.float32)
        # wgmma takes any box from shared memory as its right operand. As its left one, Triton copies boxes of more than
        # one dimension through registers, so these stand on the right wherever there are channels enough for the left.
        if TRANSPOSED:
            acc = tl.dot(w_tile, x_tile.T, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x_tile, w_tile.T, acc, input_precision=PRECISION)
    return acc


# Their values matter little, and each variant would be compiled by itself.
_UNSPECIALIZED = [
    *("blocks", "channel_tiles", "n_tiles", "h_tiles", "w_tiles"),
    *("write_channels", "streams", "x_reversed", "y_reversed"),
]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def correlate_kernel(
    x0,
    x1,
    x2,
    x3,
    w,
    y0,
    y1,
    y2,
    y3,
    bias_ptr,
    starts_ptr,
    live_ptr,
    blocks,
    channel_tiles,
    n_tiles,
    h_tiles,
    w_tiles,
    write_channels,
    streams,
    x_reversed,
    y_reversed,
    NB: tl.constexpr,
    HB: tl.constexpr,
    WB: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    LIVE_BLOCK: tl.constexpr,
    WRITE_BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
    GRADIENT: tl.constexpr,
    SAMPLES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    LATTICES: tl.constexpr = STRIDE * STRIDE
    # Tiles that read the same box lie side by side in the launch: those of other channels, and dx's of other lattices.
    pid = tl.program_id(0)
    channel = pid % channel_tiles * BN
    pid = pid // channel_tiles
    lattice = 0
    if GRADIENT:
        lattice = pid % LATTICES
        pid = pid // LATTICES
    w_position = pid % w_tiles * WB
    pid = pid // w_tiles
    h = pid % h_tiles * HB
    pid = pid // h_tiles
    n = pid % n_tiles * NB
    stream = pid // n_tiles
    x_stream = tl.where(x_reversed != 0, streams - 1 - stream, stream)
    y_stream = tl.where(y_reversed != 0, streams - 1 - stream, stream)

    if LIVE_BLOCK:
        row = channel // WRITE_BLOCK
        start = tl.load(starts_ptr + row)
        blocks = (tl.load(starts_ptr + row + 1) - start) * (LIVE_BLOCK // BK)
        live_ptr += start

    POSITIONS: tl.constexpr = NB * HB * WB
    acc = tl.zeros((BN, POSITIONS) if TRANSPOSED else (POSITIONS, BN), tl.float32)
    if GRADIENT:
        acc = _accumulate(
            acc, x0, w, live_ptr, blocks, x_stream, stream, n, h, w_position, channel,
            lattice // STRIDE, lattice % STRIDE,
            NB, HB, WB, BN, BK, KERNEL_H, KERNEL_W, STRIDE, PADDING_H, PADDING_W, DILATION_H, DILATION_W,
            LIVE_BLOCK, GRADIENT, SAMPLES, TRANSPOSED, TURNED, PRECISION, UPCAST,
        )  # fmt: skip
    else:
        for read_lattice in tl.static_range(LATTICES):
            # A kernel of one row or column reads no position of the other parity.
            if (read_lattice // STRIDE + PADDING_H) % STRIDE < KERNEL_H and (
                read_lattice % STRIDE + PADDING_W
            ) % STRIDE < KERNEL_W:
                acc = _accumulate(
                    acc, x0 if read_lattice == 0 else x1 if read_lattice == 1 else x2 if read_lattice == 2 else x3,
                    w, live_ptr, blocks, x_stream, stream, n, h, w_position, channel,
                    read_lattice // STRIDE, read_lattice % STRIDE,
                    NB, HB, WB, BN, BK, KERNEL_H, KERNEL_W, STRIDE, PADDING_H, PADDING_W, DILATION_H, DILATION_W,
                    LIVE_BLOCK, GRADIENT, SAMPLES, TRANSPOSED, TURNED, PRECISION, UPCAST,
                )  # fmt: skip

    if BIAS:
        written = channel + tl.arange(0, BN)
        bias = tl.load(bias_ptr + stream * write_channels + written, written < write_channels, other=0.0)
        bias = bias.to(tl.float32)
        acc += bias[:, None] if TRANSPOSED else bias[None, :]
    y_tile = acc.to(y0.dtype)
    if TRANSPOSED:
        y_tile = y_tile.T
    if lattice == 0:
        store_box(y0, y_tile, y_stream, n, h, w_position, channel, NB, HB, WB, BN, SAMPLES)
    if GRADIENT and LATTICES == 4:
        if lattice == 1:
            store_box(y1, y_tile, y_stream, n, h, w_position, channel, NB, HB, WB, BN, SAMPLES)
        if lattice == 2:
            store_box(y2, y_tile, y_stream, n, h, w_position, channel, NB, HB, WB, BN, SAMPLES)
        if lattice == 3:
            store_box(y3, y_tile, y_stream, n, h, w_position, channel, NB, HB, WB, BN, SAMPLES)


def correlate_constants(
    geometry: Geometry,
    tile: Tile,
    box: tuple[int, int, int],
    gradient: bool,
    bias: bool,
    blocks: tuple[int, int] = (0, 0),
    arithmetic: str = "bfloat16",
) -> dict[str, Any]:
    """The constexpr arguments of ``correlate_kernel``; ``blocks`` are output and input channels of a live block, or 0."""
    return shared_constants(geometry, box, arithmetic) | {
        "BN": tile.written,
        "BK": tile.read,
        "LIVE_BLOCK": blocks[0 if gradient else 1],
        "WRITE_BLOCK": blocks[1 if gradient else 0],
        "BIAS": bias,
        "GRADIENT": gradient,
        "SAMPLES": tile.samples,
        "TRANSPOSED": tile.written >= 64 and not tile.samples,
        "TURNED": gradient and arithmetic in (TF32, IEEE),
    }

"""Launches of the block convolution's kernels: the forward pass, the input gradient, the weight gradient.

Each takes tensors of which TMA can fetch boxes (``boxes_triton``) and cuts what it writes, or in the weight
gradient what it sums over, into boxes of a tile's positions.

Dims: T streams, N batch, C input channels, K output channels (of one stream), H W positions, R S kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from fastmerge.kernels.block_conv.arithmetic import arithmetic
from fastmerge.kernels.block_conv.boxes_triton import launches, weight_box
from fastmerge.kernels.block_conv.choice import only_compiles
from fastmerge.kernels.block_conv.correlate_triton import correlate_constants, correlate_kernel
from fastmerge.kernels.block_conv.formulas import Geometry, LiveBlocks
from fastmerge.kernels.block_conv.layouts import dense_weight, empty_channels_last, turned_weight
from fastmerge.kernels.block_conv.tiles import Tile, WeightTile, box_of, line_of
from fastmerge.kernels.block_conv.wgrad_triton import (
    REDUCE_BLOCK,
    reduce_constants,
    reduce_kernel,
    wgrad_constants,
    wgrad_kernel,
)
from torch import Tensor


def forward(
    xs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    geometry: Geometry,
    tile: Tile,
    live: LiveBlocks | None = None,
) -> list[Tensor]:
    """Launches ``correlate_kernel`` for the forward pass.

    Args:
        xs: T tensors (N, C, H, W) of which TMA can fetch boxes, or one joined one (N, T·C, H, W).
        weight: (T·K, C, R, S).
        bias: (T·K,), or None.
        groups: T.
        geometry: of the convolution.
        tile: of the kernel.
        live: the live blocks of a block-sparse weight, T being 1.

    Returns:
        T tensors (N, K, H', W') in channels-last order, or one joined one.
    """
    n, _, height, width = xs[0].shape
    outputs = weight.shape[0] // len(xs)
    ys = [empty_channels_last(x, (n, outputs, *geometry.output_size(height, width))) for x in xs]
    _correlate(xs, ys, weight, bias, groups, geometry, tile, live, gradient=False)
    return ys


def input_gradient(
    dys: Sequence[Tensor],
    weight: Tensor,
    size: tuple[int, int],
    groups: int,
    geometry: Geometry,
    tile: Tile,
    live: LiveBlocks | None = None,
) -> list[Tensor]:
    """Launches ``correlate_kernel`` for the gradient of the inputs; ``size`` is theirs, (H, W)."""
    channels = weight.shape[1] * groups // len(dys)
    dxs = [empty_channels_last(dy, (dy.shape[0], channels, *size)) for dy in dys]
    _correlate(dys, dxs, weight, None, groups, geometry, tile, live, gradient=True)
    return dxs


def _correlate(
    reads: Sequence[Tensor],
    writes: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    geometry: Geometry,
    tile: Tile,
    live: LiveBlocks | None,
    gradient: bool,
) -> None:
    outputs, channels = weight.shape[0] // groups, weight.shape[1]
    written, read = (channels, outputs) if gradient else (outputs, channels)
    stride = geometry.stride[0]
    n, _, height, width = writes[0].shape
    if gradient:
        # A tile lies within one lattice; the first is the largest.
        height, width = -(-height // stride), -(-width // stride)
    box = (tile.positions, 1, 1) if tile.samples else box_of(tile.positions, n, height, width)
    counts = [-(-size // edge) for size, edge in zip((n, height, width), box, strict=True)]
    channel_tiles = triton.cdiv(written, tile.written)
    blocks, lists = (0, 0), (None, None)
    if live is not None:
        blocks = live.block(weight.shape)
        lists = (live.column_starts, live.column_rows) if gradient else (live.row_starts, live.columns)
    kind = arithmetic(weight.dtype)
    constants = correlate_constants(geometry, tile, box, gradient, bias is not None, blocks, kind)
    weight = turned_weight(weight, groups) if constants["TURNED"] else dense_weight(weight)
    weight_rows = weight.shape[0] // groups
    read_in_rows = gradient and not constants["TURNED"]
    weight_channels = (tile.read, tile.written) if read_in_rows else (tile.written, tile.read)
    for part, (x, y) in launches(groups, reads, writes):
        rows = slice(part.start * weight_rows, part.stop * weight_rows)
        programs = channel_tiles * counts[0] * counts[1] * counts[2] * x.count * (stride**2 if gradient else 1)
        with torch.cuda.device_of(reads[0]):
            _launch(
                correlate_kernel,
                (programs,),
                *x.boxes(box, tile.read, tile.samples, 1 if gradient else stride),
                weight_box(weight[rows], x.count, *weight_channels),
                *y.boxes(box, tile.written, tile.samples, stride if gradient else 1),
                None if bias is None else bias[rows].contiguous(),
                *lists,
                triton.cdiv(read, tile.read),
                channel_tiles,
                *counts,
                written,
                x.count,
                int(x.backwards),
                int(y.backwards),
                num_warps=tile.warps,
                num_stages=tile.stages,
                **constants,
            )


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
    kind = arithmetic(dw.dtype)
    box = line_of(n, height, width, kind)
    counts = [-(-extent // edge) for extent, edge in zip((n, height, width), box, strict=True)]
    boxes = counts[0] * counts[1] * counts[2]
    k_tiles, c_tiles = triton.cdiv(block[0] or outputs, tile.rows), triton.cdiv(block[1] or channels, tile.columns)
    taps = kernel_h * (1 if tile.row_of_taps else kernel_w)
    vector = 16 // dw.element_size()
    constants = wgrad_constants(geometry, tile, box, block, kind, vector)
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
            _launch(
                wgrad_kernel,
                (k_tiles * c_tiles * taps * parts * splits,),
                *x.boxes(box, tile.columns, box[0] > 1, geometry.stride[0]),
                *dy.boxes(box, tile.rows, box[0] > 1)[:1],
                sums,
                *lists,
                out.numel() // vector,
                row_stride // vector,
                channels // vector,
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
                _launch(
                    reduce_kernel,
                    (triton.cdiv(elements, REDUCE_BLOCK), 1 if live is None else parts),
                    sums,
                    out,
                    *lists,
                    splits,
                    out.numel() // vector,
                    row_stride // vector,
                    channels // vector,
                    elements // vector,
                    **reduce_constants(geometry, block, vector),
                )
    return dw


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launches a kernel, or compiles it only where that is all that is wanted."""
    kernel.run(*arguments, grid=grid, warmup=only_compiles(), **constants)


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

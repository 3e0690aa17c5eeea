"""Triton kernels of BatchNorm + activation + max-pooling + gate, imported at the first launch.

Normalisation and activation never decrease along x, or never increase where the scale is negative. So the largest
activation of a window is the activation of its largest or smallest x, and the window is searched before anything is
computed. Kept for the backward pass (``unpool_triton``), all in the pooled size: that x, and its place in the
window as int8.

Dims: N batch, C channels, H W of x, OH OW of the pooled y.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from fastmerge.kernels.batch_norm.formulas import empty_in_layout, is_channels_last, pooled_shape
from fastmerge.kernels.batch_norm.tiles import patch_warps, patches
from fastmerge.kernels.batch_norm.walk_triton import contiguous, gate_stride, per_channel, rows_of
from torch import Tensor

_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def patch(high, wide, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's sample, its patch of rows and columns, and its channels; ``high`` x ``wide`` patches are a sample."""
    index = tl.program_id(0)
    place = tl.arange(0, BLOCK_H * BLOCK_W)[:, None]
    row = (index // wide) % high * BLOCK_H + place // BLOCK_W
    column = index % wide * BLOCK_W + place % BLOCK_W
    channel = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    return (index // (wide * high)).to(tl.int64), row, column, channel


@triton.jit
def pool_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    gate_ptr,
    y_ptr,
    peak_ptr,
    place_ptr,
    c,
    height,
    width,
    pooled_height,
    pooled_width,
    high,
    wide,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    y_stride_n,
    y_stride_c,
    y_stride_h,
    y_stride_w,
    gate_stride,
    eps,
    RELU: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    sample, row, column, channel = patch(high, wide, BLOCK_H, BLOCK_W, BLOCK_C)
    inside_c = channel < c
    mean = per_channel(mean_ptr, channel, c, 0.0)
    scale = per_channel(weight_ptr, channel, c, 1.0) / tl.sqrt(per_channel(var_ptr, channel, c, 1.0) + eps)
    bias = per_channel(bias_ptr, channel, c, 0.0)
    sign = tl.where(scale < 0, -1.0, tl.where(scale > 0, 1.0, 0.0))

    # Where a window leaves x, its nearest position is read again: that changes neither the largest value nor, but for the
    # places in the padding corrected below, which of equal ones comes first. So nothing but channels needs a mask.
    x_ptr += sample * x_stride_n + channel.to(tl.int64) * x_stride_c
    top, left = row * STRIDE_H - PADDING_H, column * STRIDE_W - PADDING_W
    best = tl.full((BLOCK_H * BLOCK_W, BLOCK_C), -_INFINITY, tl.float32)
    place = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_C), tl.int32)
    first = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_C), tl.float32)
    for i in tl.static_range(KERNEL_H):
        h = tl.minimum(tl.maximum(top + i, 0), height - 1).to(tl.int64)
        for j in tl.static_range(KERNEL_W):
            w = tl.minimum(tl.maximum(left + j, 0), width - 1).to(tl.int64)
            x = tl.load(x_ptr + h * x_stride_h + w * x_stride_w, inside_c, other=0.0).to(tl.float32)
            if i + j == 0:
                first = x
            value = x * sign
            place = tl.where(value > best, i * KERNEL_W + j, place)
            best = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
    peak = tl.where(sign == 0, first, best * sign)

    y = (peak - mean) * scale + bias
    if RELU:
        y = tl.where(y < 0, 0.0, y)
    if gate_ptr is not None:
        y *= tl.load(gate_ptr + sample * gate_stride + channel, inside_c, other=0.0).to(tl.float32)
    offset = sample * y_stride_n + row.to(tl.int64) * y_stride_h + column.to(tl.int64) * y_stride_w
    offset += channel.to(tl.int64) * y_stride_c
    inside = (row < pooled_height) & (column < pooled_width) & inside_c
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), inside)
    if place_ptr is not None:
        place = tl.maximum(place // KERNEL_W, -top) * KERNEL_W + tl.maximum(place % KERNEL_W, -left)
        tl.store(place_ptr + offset, place.to(tl.int8), inside)
        tl.store(peak_ptr + offset, peak.to(peak_ptr.dtype.element_ty), inside)


def pool(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gate: Tensor | None,
    eps: float,
    activation: str,
    window: Sequence[int],
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``max_pool(act((x - mean) / sqrt(var + eps) * weight + bias)) * gate``.

    Args:
        x: shape (N, C, H, W), any strides.
        weight, bias, mean, var: shape (C,).
        gate: shape (1 or N, C).
        eps: added to the variance.
        activation: "relu" or "identity".
        window: see ``pooling_window``.
        keep: whether the backward pass will need ``peak`` and ``place``.

    Returns:
        y; the x that each element of it came from; that x's place in the window, int8, row by row. All of them dense, in the
        layout of ``x``, shape (N, C, OH, OW).
    """
    shape = pooled_shape(x, window)
    y = empty_in_layout(x, shape)
    peak = empty_in_layout(x, shape) if keep else None
    place = empty_in_layout(x, shape, torch.int8) if keep else None
    grid, sizes, blocks = cut(x, shape, shape[2:], pooling=True)
    with torch.cuda.device_of(x):
        pool_kernel[grid](
            x,
            *contiguous(weight, bias, mean, var),
            rows_of(gate),
            y,
            peak,
            place,
            *sizes,
            *x.stride(),
            *y.stride(),
            gate_stride(gate),
            eps,
            RELU=activation == "relu",
            **window_constants(window),
            **blocks,
        )
    return y, peak, place


def window_constants(window: Sequence[int]) -> dict[str, int]:
    """The constexpr arguments of both kernels that say how x is pooled."""
    names = ("KERNEL_H", "KERNEL_W", "STRIDE_H", "STRIDE_W", "PADDING_H", "PADDING_W")
    return dict(zip(names, window, strict=True))


def cut(
    x: Tensor, pooled: Sequence[int], walked: Sequence[int], pooling: bool
) -> tuple[tuple[int, int], tuple[int, ...], dict[str, Any]]:
    """Grid, sizes and constexpr blocks for walking a plane of ``walked`` cells of each sample."""
    n, c, height, width = x.shape
    channels_last = is_channels_last(x)
    block_h, block_w, block_c = patches(*walked, c, x.element_size(), channels_last, pooling)
    high, wide = triton.cdiv(walked[0], block_h), triton.cdiv(walked[1], block_w)
    blocks = {"BLOCK_H": block_h, "BLOCK_W": block_w, "BLOCK_C": block_c}
    blocks["num_warps"] = patch_warps(channels_last, pooling)
    return (n * high * wide, triton.cdiv(c, block_c)), (c, height, width, *pooled[2:], high, wide), blocks

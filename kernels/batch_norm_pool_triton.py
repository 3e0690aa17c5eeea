"""Triton kernels of BatchNorm + activation + max-pooling + gate, imported at the first launch.

Normalisation and activation never decrease along x, or never increase where the scale is negative. So the largest
activation of a window is the activation of its largest or smallest x, and the window is searched before anything is
computed. Kept for the backward pass, all in the pooled size: that x, and its place in the window as int8.

Backward, the sums over all positions are sums over the pooled ones, for no other position has a gradient: the kernel of
the operation without pooling takes them. The second pass walks cells of ``stride`` x ``stride`` positions: in a cell it is
known at compile time which place each position has in each window that reaches it.

Dims: N batch, C channels, H W of x, OH OW of the pooled y.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from fastmerge.kernels.batch_norm_formulas import empty_in_layout, is_channels_last, pooled_shape
from fastmerge.kernels.batch_norm_sums_triton import sum_gradients
from fastmerge.kernels.batch_norm_tiles import patches, walkable
from fastmerge.kernels.batch_norm_walk_triton import contiguous, gate_stride, per_channel, rows_of
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


@triton.jit
def unpool_kernel(
    dy_ptr,
    place_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    gate_ptr,
    dbias_ptr,
    dweight_ptr,
    dx_ptr,
    c,
    height,
    width,
    pooled_height,
    pooled_width,
    high,
    wide,
    dy_stride_n,
    dy_stride_c,
    dy_stride_h,
    dy_stride_w,
    place_stride_n,
    place_stride_c,
    place_stride_h,
    place_stride_w,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    dx_stride_n,
    dx_stride_c,
    dx_stride_h,
    dx_stride_w,
    gate_stride,
    count,
    eps,
    RELU: tl.constexpr,
    TRAINING: tl.constexpr,
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
    inverse_std = 1 / tl.sqrt(per_channel(var_ptr, channel, c, 1.0) + eps)
    scale = per_channel(weight_ptr, channel, c, 1.0) * inverse_std
    bias = per_channel(bias_ptr, channel, c, 0.0)
    if TRAINING:
        center = per_channel(dbias_ptr, channel, c, 0.0) / count
        slope = per_channel(dweight_ptr, channel, c, 0.0) * inverse_std / count
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + sample * gate_stride + channel, inside_c, other=0.0).to(tl.float32)

    across = channel.to(tl.int64)
    dy_ptr += sample * dy_stride_n + across * dy_stride_c
    place_ptr += sample * place_stride_n + across * place_stride_c
    x_ptr += sample * x_stride_n + across * x_stride_c
    dx_ptr += sample * dx_stride_n + across * dx_stride_c
    for a in tl.static_range(STRIDE_H):
        h = row * STRIDE_H + a - PADDING_H
        for b in tl.static_range(STRIDE_W):
            w = column * STRIDE_W + b - PADDING_W
            dz = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_C), tl.float32)
            # Place (i, j) of window (row - i // stride, column - j // stride) is this position.
            for i in tl.static_range(a, KERNEL_H, STRIDE_H):
                oh = row - i // STRIDE_H
                for j in tl.static_range(b, KERNEL_W, STRIDE_W):
                    ow = column - j // STRIDE_W
                    reached = (oh >= 0) & (oh < pooled_height) & (ow >= 0) & (ow < pooled_width) & inside_c
                    oh_, ow_ = oh.to(tl.int64), ow.to(tl.int64)
                    place = tl.load(place_ptr + oh_ * place_stride_h + ow_ * place_stride_w, reached, other=-1)
                    dy = tl.load(dy_ptr + oh_ * dy_stride_h + ow_ * dy_stride_w, reached, other=0.0)
                    dz += tl.where(place == i * KERNEL_W + j, dy.to(tl.float32), 0.0)
            inside = (h >= 0) & (h < height) & (w >= 0) & (w < width) & inside_c
            h_, w_ = h.to(tl.int64), w.to(tl.int64)
            if RELU or TRAINING:
                x = tl.load(x_ptr + h_ * x_stride_h + w_ * x_stride_w, inside, other=0.0)
                distance = x.to(tl.float32) - mean
            if RELU:
                dz = tl.where(distance * scale + bias <= 0, 0.0, dz)
            if gate_ptr is not None:
                dz *= gate
            if TRAINING:
                dz -= center + distance * slope
            tl.store(dx_ptr + h_ * dx_stride_h + w_ * dx_stride_w, (dz * scale).to(dx_ptr.dtype.element_ty), inside)


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
    grid, sizes, blocks = _cut(x, shape, shape[2:], pooling=True)
    with torch.cuda.device_of(x):
        pool_kernel[grid](
            x,
            contiguous(weight),
            contiguous(bias),
            contiguous(mean),
            contiguous(var),
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


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gate: Tensor | None,
    peak: Tensor,
    place: Tensor,
    training: bool,
    eps: float,
    activation: str,
    window: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of ``pool``, in training through mean and variance too.

    Args:
        dy: gradient of the result, any strides.
        needs: which of dx, dweight, dbias and dgate are wanted.

    Returns:
        Those gradients in the dtypes of what they belong to, None where not wanted.
    """
    needs_dx, needs_dweight, needs_dbias, needs_dgate = needs
    relu = activation == "relu"
    dbias, dweight, dgate, dx = None, None, None, None
    if (training and needs_dx) or needs_dweight or needs_dbias or needs_dgate:
        dbias, dweight, _, dgate = sum_gradients(
            walkable(dy), peak, weight, bias, mean, var, None, gate, eps, relu, False, needs_dgate
        )
    if needs_dx:
        dx = empty_in_layout(x)
        cells = [-(-(x.shape[2 + i] + window[4 + i]) // window[2 + i]) for i in range(2)]
        grid, sizes, blocks = _cut(x, dy.shape, cells, pooling=False)
        with torch.cuda.device_of(x):
            unpool_kernel[grid](
                dy,
                place,
                x,
                contiguous(weight),
                contiguous(bias),
                contiguous(mean),
                contiguous(var),
                rows_of(gate),
                *((dbias, dweight) if training else (None, None)),
                dx,
                *sizes,
                *dy.stride(),
                *place.stride(),
                *x.stride(),
                *dx.stride(),
                gate_stride(gate),
                float(x.numel() // x.shape[1]),
                eps,
                RELU=relu,
                TRAINING=training,
                **window_constants(window),
                **blocks,
            )
    return (
        dx,
        dweight.to(weight.dtype) if needs_dweight else None,
        dbias.to(bias.dtype) if needs_dbias else None,
        dgate.to(gate.dtype) if needs_dgate else None,
    )


def window_constants(window: Sequence[int]) -> dict[str, int]:
    """The constexpr arguments of both kernels that say how x is pooled."""
    names = ("KERNEL_H", "KERNEL_W", "STRIDE_H", "STRIDE_W", "PADDING_H", "PADDING_W")
    return dict(zip(names, window, strict=True))


def _cut(
    x: Tensor, pooled: Sequence[int], walked: Sequence[int], pooling: bool
) -> tuple[tuple[int, int], tuple[int, ...], dict[str, Any]]:
    """Grid, sizes and constexpr blocks for walking a plane of ``walked`` cells of each sample."""
    n, c, height, width = x.shape
    block_h, block_w, block_c = patches(*walked, c, x.element_size(), is_channels_last(x), pooling)
    high, wide = triton.cdiv(walked[0], block_h), triton.cdiv(walked[1], block_w)
    blocks = {"BLOCK_H": block_h, "BLOCK_W": block_w, "BLOCK_C": block_c}
    return (n * high * wide, triton.cdiv(c, block_c)), (c, height, width, *pooled[2:], high, wide), blocks

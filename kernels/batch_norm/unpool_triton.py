"""Triton kernel of BatchNorm + activation + max-pooling + gate, backward, imported at the first launch.

The sums over all positions are sums over the pooled ones, for no other position has a gradient: the kernel of the operation
without pooling takes them. The second pass walks cells of ``stride`` x ``stride`` positions: in a cell it is known at compile
time which place each position has in each window that reaches it.

Dims: N batch, C channels, H W of x, OH OW of the pooled y.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from fastmerge.kernels.batch_norm.formulas import empty_in_layout
from fastmerge.kernels.batch_norm.pool_triton import cut, patch, window_constants
from fastmerge.kernels.batch_norm.sums_triton import sum_gradients
from fastmerge.kernels.batch_norm.tiles import walkable
from fastmerge.kernels.batch_norm.walk_triton import contiguous, gate_stride, in_dtypes_of, per_channel, rows_of
from torch import Tensor


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
        grid, sizes, blocks = cut(x, dy.shape, cells, pooling=False)
        with torch.cuda.device_of(x):
            unpool_kernel[grid](
                dy,
                place,
                x,
                *contiguous(weight, bias, mean, var),
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
    return dx, *in_dtypes_of((weight, bias, gate), (dweight, dbias, dgate), needs[1:])

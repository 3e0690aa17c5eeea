"""Triton kernel of BatchNorm + residual + activation + gate, forward, imported at the first launch.

Dims: N batch, C channels, P positions of a sample.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastmerge.kernels.batch_norm.formulas import empty_in_layout
from fastmerge.kernels.batch_norm.tiles import arguments, strides_of, tiles_of, walkable
from fastmerge.kernels.batch_norm.walk_triton import (
    channels_of,
    contiguous,
    gate_stride,
    per_channel,
    rows_of,
    share,
    tile,
)
from torch import Tensor


@triton.jit
def normalize_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    residual_ptr,
    gate_ptr,
    y_ptr,
    n,
    p,
    c,
    samples,
    pixels,
    parts_p,
    x_stride_n,
    x_stride_p,
    x_stride_c,
    residual_stride_n,
    residual_stride_p,
    residual_stride_c,
    y_stride_n,
    y_stride_p,
    y_stride_c,
    gate_stride,
    eps,
    RELU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first_n, last_n, first_p, last_p = share(n, p, samples, pixels, parts_p)
    channel = channels_of(BLOCK_C)
    column = channel.to(tl.int64)
    mean = per_channel(mean_ptr, channel, c, 0.0)
    scale = per_channel(weight_ptr, channel, c, 1.0) / tl.sqrt(per_channel(var_ptr, channel, c, 1.0) + eps)
    bias = per_channel(bias_ptr, channel, c, 0.0)
    for n_ in range(first_n, last_n, BLOCK_N):
        if gate_ptr is not None:
            row = (n_ + tl.arange(0, BLOCK_N))[:, None, None].to(tl.int64)
            gate = tl.load(gate_ptr + row * gate_stride + channel, (row < last_n) & (channel < c), other=0.0)
            gate = gate.to(tl.float32)
        for p_ in range(first_p, last_p, BLOCK_P):
            sample, position, inside = tile(n_, p_, last_n, last_p, channel, c, BLOCK_N, BLOCK_P)
            offset = sample * x_stride_n + position * x_stride_p + column * x_stride_c
            # Distances first: x times scale, far from 0, would lose the digits that the mean takes away.
            y = (tl.load(x_ptr + offset, inside, other=0.0).to(tl.float32) - mean) * scale + bias
            if residual_ptr is not None:
                offset = sample * residual_stride_n + position * residual_stride_p + column * residual_stride_c
                y += tl.load(residual_ptr + offset, inside, other=0.0).to(tl.float32)
            if RELU:
                y = tl.where(y < 0, 0.0, y)
            if gate_ptr is not None:
                y *= gate
            offset = sample * y_stride_n + position * y_stride_p + column * y_stride_c
            tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), inside)


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor:
    """``act((x - mean) / sqrt(var + eps) * weight + bias + residual) * gate``, dense, in the layout of ``x``."""
    y = empty_in_layout(x)
    x, residual = walkable(x), walkable(residual)
    strides = [strides_of(t) for t in (x, y, *([] if residual is None else [residual]))]
    cut = tiles_of(x, strides, by_sample=gate is not None and gate.shape[0] > 1, summing=False)
    with torch.cuda.device_of(x):
        normalize_kernel[cut.grid](
            x,
            *contiguous(weight, bias, mean, var),
            residual,
            rows_of(gate),
            y,
            *cut.sizes,
            **arguments("x", strides[0]),
            **arguments("y", strides[1]),
            **arguments("residual", strides[-1]),
            gate_stride=gate_stride(gate),
            eps=eps,
            RELU=activation == "relu",
            **cut.blocks,
        )
    return y

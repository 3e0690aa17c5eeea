"""Triton kernels of BatchNorm + residual + activation + gate, backward, imported at the first launch.

With dz the gradient before the activation, h the value there, M positions, and x̂ = (x - mean) / sqrt(var + eps),

    dz = dy · gate · [h > 0],   dgate = Σ_P dy · act(h),   dbias = Σ dz,   dweight = Σ dz x̂,
    dx = weight / sqrt(var + eps) · (dz - dbias / M - x̂ · dweight / M)      (in evaluation the sums drop out).

Two passes: one that sums, one that writes dx. x̂ and h are computed anew from x, which is cheaper than reading a mask and
needs no memory. A residual is read in the first pass only: dz, its gradient, is written there and read in the second.

Dims: N batch, C channels, P positions of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from fastmerge.kernels.batch_norm.formulas import empty_in_layout
from fastmerge.kernels.batch_norm.sums_triton import sum_gradients
from fastmerge.kernels.batch_norm.tiles import arguments, strides_of, tiles_of, walkable
from fastmerge.kernels.batch_norm.walk_triton import (
    channels_of,
    contiguous,
    gate_stride,
    in_dtypes_of,
    per_channel,
    rows_of,
    share,
    tile,
)
from torch import Tensor


@triton.jit
def input_gradient_kernel(
    dz_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    gate_ptr,
    dbias_ptr,
    dweight_ptr,
    dx_ptr,
    n,
    p,
    c,
    samples,
    pixels,
    parts_p,
    dz_stride_n,
    dz_stride_p,
    dz_stride_c,
    x_stride_n,
    x_stride_p,
    x_stride_c,
    dx_stride_n,
    dx_stride_p,
    dx_stride_c,
    gate_stride,
    count,
    eps,
    RELU: tl.constexpr,
    TRAINING: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first_n, last_n, first_p, last_p = share(n, p, samples, pixels, parts_p)
    channel = channels_of(BLOCK_C)
    column = channel.to(tl.int64)
    mean = per_channel(mean_ptr, channel, c, 0.0)
    inverse_std = 1 / tl.sqrt(per_channel(var_ptr, channel, c, 1.0) + eps)
    scale = per_channel(weight_ptr, channel, c, 1.0) * inverse_std
    bias = per_channel(bias_ptr, channel, c, 0.0)
    if TRAINING:
        center = per_channel(dbias_ptr, channel, c, 0.0) / count
        slope = per_channel(dweight_ptr, channel, c, 0.0) * inverse_std / count
    for n_ in range(first_n, last_n, BLOCK_N):
        if gate_ptr is not None:
            row = (n_ + tl.arange(0, BLOCK_N))[:, None, None].to(tl.int64)
            gate = tl.load(gate_ptr + row * gate_stride + channel, (row < last_n) & (channel < c), other=0.0)
            gate = gate.to(tl.float32)
        for p_ in range(first_p, last_p, BLOCK_P):
            sample, position, inside = tile(n_, p_, last_n, last_p, channel, c, BLOCK_N, BLOCK_P)
            offset = sample * dz_stride_n + position * dz_stride_p + column * dz_stride_c
            dz = tl.load(dz_ptr + offset, inside, other=0.0).to(tl.float32)
            if RELU or TRAINING:
                offset = sample * x_stride_n + position * x_stride_p + column * x_stride_c
                distance = tl.load(x_ptr + offset, inside, other=0.0).to(tl.float32) - mean
            if RELU:
                dz = tl.where(distance * scale + bias <= 0, 0.0, dz)
            if gate_ptr is not None:
                dz *= gate
            if TRAINING:
                dz -= center + distance * slope
            offset = sample * dx_stride_n + position * dx_stride_p + column * dx_stride_c
            tl.store(dx_ptr + offset, (dz * scale).to(dx_ptr.dtype.element_ty), inside)


def input_gradient(
    dz: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gate: Tensor | None,
    sums: tuple[Tensor, Tensor] | None,
    eps: float,
    relu: bool,
) -> Tensor:
    """The second pass.

    Args:
        dz: gradient before the activation, or with ``relu`` or ``gate`` what these are still to be applied to; ``walkable``.
        x: shape (N, C, ...), ``walkable``.
        weight, bias, mean, var: shape (C,).
        gate: shape (1 or N, C), or None where ``dz`` went through it.
        sums: dbias and dweight; None in evaluation.
        eps: added to the variance.
        relu: whether ``dz`` has yet to pass a ReLU.

    Returns:
        dx, dense, in dtype and layout of ``x``.
    """
    dx = empty_in_layout(x)
    strides = {"dz": strides_of(dz), "x": strides_of(x), "dx": strides_of(dx)}
    cut = tiles_of(x, strides.values(), by_sample=gate is not None and gate.shape[0] > 1, summing=False)
    with torch.cuda.device_of(x):
        input_gradient_kernel[cut.grid](
            dz,
            x,
            *contiguous(weight, bias, mean, var),
            rows_of(gate),
            *(sums or (None, None)),
            dx,
            *cut.sizes,
            **arguments("dz", strides["dz"]),
            **arguments("x", strides["x"]),
            **arguments("dx", strides["dx"]),
            gate_stride=gate_stride(gate),
            count=float(cut.n * cut.p),
            eps=eps,
            RELU=relu,
            TRAINING=sums is not None,
            **cut.blocks,
        )
    return dx


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    training: bool,
    eps: float,
    activation: str,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of ``normalize``, in training through mean and variance too.

    Args:
        dy: gradient of the result, any strides.
        needs: which of dx, dweight, dbias, dresidual and dgate are wanted.

    Returns:
        Those gradients in the dtypes of what they belong to, None where not wanted. dresidual is ``dy`` itself where it
        equals it.
    """
    needs_dx, needs_dweight, needs_dbias, needs_dresidual, needs_dgate = needs
    relu = activation == "relu"
    dy, x, residual = walkable(dy), walkable(x), walkable(residual)
    if residual is not None and not relu and not needs_dgate:
        residual = None
    changed = relu or gate is not None
    needs_dz = changed and (needs_dresidual or (residual is not None and needs_dx and relu))
    dbias, dweight, dz, dgate = None, None, None, None
    if (training and needs_dx) or needs_dweight or needs_dbias or needs_dgate or needs_dz:
        dbias, dweight, dz, dgate = sum_gradients(
            dy, x, weight, bias, mean, var, residual, gate, eps, relu, needs_dz, needs_dgate
        )
    dx = None
    if needs_dx:
        sums = (dbias, dweight) if training else None
        if dz is None:
            dx = input_gradient(dy, x, weight, bias, mean, var, gate, sums, eps, relu)
        else:
            dx = input_gradient(dz, x, weight, bias, mean, var, None, sums, eps, False)
    dresidual = (dz if changed else dy) if needs_dresidual else None
    needed = (needs_dweight, needs_dbias, needs_dgate)
    dweight, dbias, dgate = in_dtypes_of((weight, bias, gate), (dweight, dbias, dgate), needed)
    return dx, dweight, dbias, dresidual, dgate

"""Triton kernels of BatchNorm's backward sums, imported at the first launch. Formulas: ``backward_triton``.

One pass over the tensors leaves the sums of each program's share, a small kernel adds them up.

Dims: N batch, C channels, P positions of a sample.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastmerge.kernels.batch_norm.formulas import empty_in_layout
from fastmerge.kernels.batch_norm.tiles import arguments, strides_of, tiles_of
from fastmerge.kernels.batch_norm.walk_triton import (
    MERGE_C,
    MERGE_PARTS,
    channels_of,
    contiguous,
    gate_stride,
    per_channel,
    rows_of,
    share,
    tile,
    total_per_channel,
)
from torch import Tensor

# What becomes of the gates' gradient in the summing pass.
NO_DGATE, SHARED_DGATE, DGATE_BY_SAMPLE = 0, 1, 2
_SHARED, _BY_SAMPLE = tl.constexpr(SHARED_DGATE), tl.constexpr(DGATE_BY_SAMPLE)


@triton.jit
def sum_gradients_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    residual_ptr,
    gate_ptr,
    dz_ptr,
    dgate_ptr,
    partial_ptr,
    n,
    p,
    c,
    samples,
    pixels,
    parts_p,
    dy_stride_n,
    dy_stride_p,
    dy_stride_c,
    x_stride_n,
    x_stride_p,
    x_stride_c,
    residual_stride_n,
    residual_stride_p,
    residual_stride_c,
    dz_stride_n,
    dz_stride_p,
    dz_stride_c,
    gate_stride,
    eps,
    RELU: tl.constexpr,
    DGATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first_n, last_n, first_p, last_p = share(n, p, samples, pixels, parts_p)
    channel = channels_of(BLOCK_C)
    column = channel.to(tl.int64)
    inside_c = channel < c
    mean = per_channel(mean_ptr, channel, c, 0.0)
    scale = per_channel(weight_ptr, channel, c, 1.0) / tl.sqrt(per_channel(var_ptr, channel, c, 1.0) + eps)
    bias = per_channel(bias_ptr, channel, c, 0.0)

    dbias = tl.zeros((BLOCK_N, BLOCK_P, BLOCK_C), tl.float32)
    dweight = tl.zeros((BLOCK_N, BLOCK_P, BLOCK_C), tl.float32)
    dgate = tl.zeros((BLOCK_N, BLOCK_P, BLOCK_C), tl.float32)
    for n_ in range(first_n, last_n, BLOCK_N):
        row = (n_ + tl.arange(0, BLOCK_N))[:, None, None].to(tl.int64)
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + row * gate_stride + channel, (row < last_n) & inside_c, other=0.0).to(tl.float32)
        if DGATE == _BY_SAMPLE:
            dgate = tl.zeros((BLOCK_N, BLOCK_P, BLOCK_C), tl.float32)
        for p_ in range(first_p, last_p, BLOCK_P):
            sample, position, inside = tile(n_, p_, last_n, last_p, channel, c, BLOCK_N, BLOCK_P)
            offset = sample * dy_stride_n + position * dy_stride_p + column * dy_stride_c
            dz = tl.load(dy_ptr + offset, inside, other=0.0).to(tl.float32)
            offset = sample * x_stride_n + position * x_stride_p + column * x_stride_c
            distance = tl.load(x_ptr + offset, inside, other=0.0).to(tl.float32) - mean
            h = distance * scale + bias
            if residual_ptr is not None:
                offset = sample * residual_stride_n + position * residual_stride_p + column * residual_stride_c
                h += tl.load(residual_ptr + offset, inside, other=0.0).to(tl.float32)
            if RELU:
                # Comparisons that let a NaN pass.
                dz = tl.where(h <= 0, 0.0, dz)
            if DGATE:
                dgate += dz * h
            if gate_ptr is not None:
                dz *= gate
            if dz_ptr is not None:
                # What the second pass will read is summed, rounded as it is.
                rounded = dz.to(dz_ptr.dtype.element_ty)
                dz = rounded.to(tl.float32)
                offset = sample * dz_stride_n + position * dz_stride_p + column * dz_stride_c
                tl.store(dz_ptr + offset, rounded, inside)
            dbias += dz
            dweight += dz * distance
        if DGATE == _BY_SAMPLE:
            into = dgate_ptr + ((tl.program_id(0) % parts_p).to(tl.int64) * n + row) * c + channel
            tl.store(into, tl.sum(dgate, 1)[:, None, :], (row < last_n) & inside_c)

    partial_ptr += tl.program_id(0).to(tl.int64) * 3 * c + channel
    tl.store(partial_ptr, total_per_channel(dbias), inside_c)
    tl.store(partial_ptr + c, total_per_channel(dweight), inside_c)
    if DGATE == _SHARED:
        tl.store(partial_ptr + 2 * c, total_per_channel(dgate), inside_c)


@triton.jit
def merge_sums_kernel(
    partial_ptr,
    var_ptr,
    dbias_ptr,
    dweight_ptr,
    dgate_ptr,
    c,
    parts,
    eps,
    DGATE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    inside_c = channel < c
    dbias = tl.zeros((PARTS, BLOCK_C), tl.float32)
    dweight = tl.zeros((PARTS, BLOCK_C), tl.float32)
    dgate = tl.zeros((PARTS, BLOCK_C), tl.float32)
    for start in range(0, parts, PARTS):
        part = (start + tl.arange(0, PARTS))[:, None]
        inside = (part < parts) & inside_c
        row = partial_ptr + part.to(tl.int64) * 3 * c + channel
        dbias += tl.load(row, inside, other=0.0)
        dweight += tl.load(row + c, inside, other=0.0)
        if DGATE == _SHARED:
            dgate += tl.load(row + 2 * c, inside, other=0.0)
    std = tl.sqrt(tl.load(var_ptr + channel, inside_c, other=1.0).to(tl.float32) + eps)
    tl.store(dbias_ptr + channel, tl.sum(dbias, 0)[None, :], inside_c)
    tl.store(dweight_ptr + channel, tl.sum(dweight, 0)[None, :] / std, inside_c)
    if DGATE == _SHARED:
        tl.store(dgate_ptr + channel, tl.sum(dgate, 0)[None, :], inside_c)


def sum_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    eps: float,
    relu: bool,
    needs_dz: bool,
    needs_dgate: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The first pass, and the sum of its parts.

    Args:
        dy, x, residual: shape (N, C, ...), ``walkable``.
        weight, bias, mean, var: shape (C,).
        gate: shape (1 or N, C).
        eps: added to the variance.
        relu: whether the activation is ReLU, rather than the identity.
        needs_dz: whether to write the gradient before the activation.
        needs_dgate: whether to sum the gates' gradient.

    Returns:
        dbias and dweight, float32, shape (C,); dz in dtype and layout of ``x``, or None; dgate, in the shape of the gate, in
        its dtype or float32, or None.
    """
    n, c = x.shape[:2]
    dz = empty_in_layout(x) if needs_dz else None
    by_sample = gate is not None and gate.shape[0] > 1
    mode = NO_DGATE if not needs_dgate else DGATE_BY_SAMPLE if by_sample else SHARED_DGATE
    strides = {"dy": strides_of(dy), "x": strides_of(x)}
    strides["residual"] = strides["x"] if residual is None else strides_of(residual)
    strides["dz"] = strides["x"] if dz is None else strides_of(dz)
    cut = tiles_of(x, strides.values(), by_sample, summing=True)
    partial = x.new_empty((cut.parts, 3, c), dtype=torch.float32)
    dbias, dweight = x.new_empty(c, dtype=torch.float32), x.new_empty(c, dtype=torch.float32)
    dgate = None
    # One part is the result already; several are summed at full precision.
    whole = gate is not None and cut.parts_p == 1
    if mode == SHARED_DGATE:
        dgate = x.new_empty((1, c), dtype=torch.float32)
    elif mode == DGATE_BY_SAMPLE:
        dgate = x.new_empty((cut.parts_p, n, c), dtype=gate.dtype if whole else torch.float32)
    with torch.cuda.device_of(x):
        sum_gradients_kernel[cut.grid](
            dy,
            x,
            *contiguous(weight, bias, mean, var),
            residual,
            rows_of(gate),
            dz,
            dgate,
            partial,
            *cut.sizes,
            **arguments("dy", strides["dy"]),
            **arguments("x", strides["x"]),
            **arguments("residual", strides["residual"]),
            **arguments("dz", strides["dz"]),
            gate_stride=gate_stride(gate),
            eps=eps,
            RELU=relu,
            DGATE=mode,
            **cut.blocks,
        )
        merge_sums_kernel[(triton.cdiv(c, MERGE_C),)](
            partial,
            *contiguous(var),
            dbias,
            dweight,
            dgate,
            c,
            cut.parts,
            eps,
            DGATE=mode,
            PARTS=MERGE_PARTS,
            BLOCK_C=MERGE_C,
        )
    if mode == DGATE_BY_SAMPLE:
        dgate = dgate[0] if whole else dgate.sum(0)
    return dbias, dweight, dz, dgate

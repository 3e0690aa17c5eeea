"""Triton kernels of BatchNorm's statistics, imported at the first launch.

One pass over the tensor leaves mean and sum of squared deviations, M2, of each program's share; a small kernel merges them
by Chan's formula,

    mean = Σ_i n_i mean_i / Σ_i n_i,      M2 = Σ_i (M2_i + n_i (mean_i - mean)²).

Source: T. Chan, G. Golub, R. LeVeque, "Algorithms for computing the sample variance" (1983).

Dims: N batch, C channels, P positions of a sample.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastmerge.kernels.batch_norm.tiles import arguments, strides_of, tiles_of, walkable
from fastmerge.kernels.batch_norm.walk_triton import MERGE_C, MERGE_PARTS, channels_of, share, tile, total_per_channel
from torch import Tensor


@triton.jit
def partial_statistics_kernel(
    x_ptr,
    partial_ptr,
    n,
    p,
    c,
    samples,
    pixels,
    parts_p,
    x_stride_n,
    x_stride_p,
    x_stride_c,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first_n, last_n, first_p, last_p = share(n, p, samples, pixels, parts_p)
    channel = channels_of(BLOCK_C)
    x_ptr += channel.to(tl.int64) * x_stride_c

    # Sums of x - shift and of its square: near the mean nothing cancels. The first tile's mean is near enough; with k tiles
    # the variance is at least 1/k of the squared distance that is left, less the variance within the first tile.
    sample, position, inside = tile(first_n, first_p, last_n, last_p, channel, c, BLOCK_N, BLOCK_P)
    x = tl.load(x_ptr + sample * x_stride_n + position * x_stride_p, inside, other=0.0).to(tl.float32)
    held = tl.minimum(last_n - first_n, BLOCK_N) * tl.minimum(last_p - first_p, BLOCK_P)
    shift = total_per_channel(x) / held.to(tl.float32)

    sums = tl.zeros((BLOCK_N, BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_N, BLOCK_P, BLOCK_C), tl.float32)
    for n_ in range(first_n, last_n, BLOCK_N):
        for p_ in range(first_p, last_p, BLOCK_P):
            sample, position, inside = tile(n_, p_, last_n, last_p, channel, c, BLOCK_N, BLOCK_P)
            x = tl.load(x_ptr + sample * x_stride_n + position * x_stride_p, inside, other=0.0).to(tl.float32)
            distance = tl.where(inside, x - shift, 0.0)
            sums += distance
            squares += distance * distance

    count = ((last_n - first_n) * (last_p - first_p)).to(tl.float32)
    offset = total_per_channel(sums) / count
    m2 = total_per_channel(squares) - offset * offset * count
    partial_ptr += tl.program_id(0).to(tl.int64) * 2 * c + channel
    tl.store(partial_ptr, shift + offset, channel < c)
    # Rounding may take a constant channel below 0. A comparison, which keeps a NaN.
    tl.store(partial_ptr + c, tl.where(m2 < 0, 0.0, m2), channel < c)


@triton.jit
def _share_sizes(part, n, p, samples, pixels, parts_p):
    """How many positions each part holds; 0 past the last."""
    held_n = tl.minimum(n - (part // parts_p) * samples, samples)
    held_p = tl.minimum(p - (part % parts_p).to(tl.int64) * pixels, pixels)
    return tl.maximum(held_n, 0).to(tl.float32) * tl.maximum(held_p, 0).to(tl.float32)


@triton.jit
def merge_statistics_kernel(
    partial_ptr,
    mean_ptr,
    var_ptr,
    running_mean_ptr,
    running_var_ptr,
    n,
    p,
    c,
    samples,
    pixels,
    parts_p,
    parts,
    running_mean_stride,
    running_var_stride,
    count,
    momentum,
    PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    inside_c = channel < c
    partial_ptr += channel

    # Means as distances from the first: as exact as the first mean itself, however far from 0 it is.
    first = tl.load(partial_ptr, inside_c, other=0.0)
    sums = tl.zeros((PARTS, BLOCK_C), tl.float32)
    for start in range(0, parts, PARTS):
        part = (start + tl.arange(0, PARTS))[:, None]
        mean = tl.load(partial_ptr + part.to(tl.int64) * 2 * c, (part < parts) & inside_c, other=0.0)
        size = _share_sizes(part, n, p, samples, pixels, parts_p)
        sums += tl.where(part < parts, (mean - first) * size, 0.0)
    mean = first + tl.sum(sums, 0)[None, :] / count

    m2s = tl.zeros((PARTS, BLOCK_C), tl.float32)
    for start in range(0, parts, PARTS):
        part = (start + tl.arange(0, PARTS))[:, None]
        row = partial_ptr + part.to(tl.int64) * 2 * c
        inside = (part < parts) & inside_c
        distance = tl.load(row, inside, other=0.0) - mean
        size = _share_sizes(part, n, p, samples, pixels, parts_p)
        m2s += tl.where(inside, tl.load(row + c, inside, other=0.0) + distance * distance * size, 0.0)
    m2 = tl.sum(m2s, 0)[None, :]

    tl.store(mean_ptr + channel, mean, inside_c)
    tl.store(var_ptr + channel, m2 / count, inside_c)
    channel = channel.to(tl.int64)
    if running_mean_ptr is not None:
        running_mean_ptr += channel * running_mean_stride
        old = tl.load(running_mean_ptr, inside_c, other=0.0).to(tl.float32)
        tl.store(running_mean_ptr, (1 - momentum) * old + momentum * mean, inside_c)
    if running_var_ptr is not None:
        running_var_ptr += channel * running_var_stride
        old = tl.load(running_var_ptr, inside_c, other=0.0).to(tl.float32)
        tl.store(running_var_ptr, (1 - momentum) * old + momentum * (m2 / (count - 1)), inside_c)


def statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel; updates the running statistics in place, as torch does.

    Args:
        x: shape (N, C, ...), with more than one value per channel.
        running_mean, running_var: shape (C,), any stride.
        momentum: weight of the new statistics.

    Returns:
        Mean and variance, float32, shape (C,).
    """
    x = walkable(x)
    c = x.shape[1]
    cut = tiles_of(x, [strides_of(x)], by_sample=False, summing=True)
    partial = x.new_empty((cut.parts, 2, c), dtype=torch.float32)
    mean, var = x.new_empty(c, dtype=torch.float32), x.new_empty(c, dtype=torch.float32)
    with torch.cuda.device_of(x):
        partial_statistics_kernel[cut.grid](x, partial, *cut.sizes, **arguments("x", strides_of(x)), **cut.blocks)
        merge_statistics_kernel[(triton.cdiv(c, MERGE_C),)](
            partial,
            mean,
            var,
            running_mean,
            running_var,
            *cut.sizes,
            cut.parts,
            0 if running_mean is None else running_mean.stride(0),
            0 if running_var is None else running_var.stride(0),
            float(cut.n * cut.p),
            momentum,
            PARTS=MERGE_PARTS,
            BLOCK_C=MERGE_C,
        )
    return mean, var

"""Triton kernels of BatchNorm's statistics, imported at the first launch.

One pass over the tensors leaves mean and sum of squared deviations, M2, of each program's share; a small kernel merges them
by Chan's formula,

    mean = Σ_i n_i mean_i / Σ_i n_i,      M2 = Σ_i (M2_i + n_i (mean_i - mean)²).

Source: T. Chan, G. Golub, R. LeVeque, "Algorithms for computing the sample variance" (1983).

Dims: N batch, C channels, P positions of a sample, T streams.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastmerge.kernels.batch_norm import tiles
from fastmerge.kernels.batch_norm.formulas import distance_of, of_stream
from fastmerge.kernels.batch_norm.walk_triton import (
    MERGE_C,
    MERGE_PARTS,
    channels_of,
    kernel,
    on_meta,
    read,
    share,
    stream_of,
    tile,
    total_per_channel,
    vector_of,
    walk_of,
)
from fastmerge.kernels.launch import Launch, Looks, looks, remembered
from torch import Tensor


@kernel
def partial_statistics_kernel(
    x_ptr,
    partial_ptr,
    x_stride_t: tl.int64,
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
    LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):
    first_n, last_n, first_p, last_p = share(n, p, samples, pixels, parts_p, LAST, VECTOR, BLOCK_P)
    channel, c = channels_of(c, LAST, VECTOR, BLOCK_C)
    x_ptr = stream_of(x_ptr, x_stride_t, VECTOR)

    # Sums of x - shift and of its square: near the mean nothing cancels. The first tile's mean is near enough; with k tiles
    # the variance is at least 1/k of the squared distance that is left, less the variance within the first tile.
    at = tile(first_n, first_p, last_n, last_p, channel, c, BLOCK_N, BLOCK_P)
    x = read(x_ptr, at, x_stride_n, x_stride_p, x_stride_c, LAST, VECTOR)
    held = tl.minimum(last_n - first_n, BLOCK_N) * tl.minimum(last_p - first_p, BLOCK_P)
    shift = total_per_channel(x) / held.to(tl.float32)

    sums = tl.zeros((BLOCK_N, BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_N, BLOCK_P, BLOCK_C), tl.float32)
    for n_ in range(first_n, last_n, BLOCK_N):
        for p_ in tl.range(first_p, last_p, BLOCK_P, num_stages=STAGES):
            at = tile(n_, p_, last_n, last_p, channel, c, BLOCK_N, BLOCK_P)
            x = read(x_ptr, at, x_stride_n, x_stride_p, x_stride_c, LAST, VECTOR)
            distance = tl.where(at[3], x - shift, 0.0)
            sums += distance
            squares += distance * distance

    count = ((last_n - first_n) * (last_p - first_p)).to(tl.float32)
    offset = total_per_channel(sums) / count
    m2 = total_per_channel(squares) - offset * offset * count
    partial_ptr += (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * 2 * c + channel
    tl.store(partial_ptr, shift + offset, channel < c)
    # Rounding may take a constant channel below 0. A comparison, which keeps a NaN.
    tl.store(partial_ptr + c, tl.where(m2 < 0, 0.0, m2), channel < c)


@triton.jit
def _share_sizes(part, n, p, samples, pixels, parts_p):
    """How many positions each part holds; 0 past the last."""
    held_n = tl.minimum(n - (part // parts_p) * samples, samples)
    held_p = tl.minimum(p - (part % parts_p).to(tl.int64) * pixels, pixels)
    return tl.maximum(held_n, 0).to(tl.float32) * tl.maximum(held_p, 0).to(tl.float32)


@kernel
def merge_statistics_kernel(
    partial_ptr,
    mean_ptr,
    var_ptr,
    running_mean_ptr,
    running_var_ptr,
    batches_ptr,
    count,
    momentum,
    n,
    p,
    c,
    samples,
    pixels,
    parts_p,
    parts,
    running_mean_stride,
    running_var_stride,
    counters,
    PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    inside_c = channel < c
    stream = tl.program_id(2).to(tl.int64)
    partial_ptr += stream * parts * 2 * c + channel

    # Means as distances from the first: as exact as the first mean itself, however far from 0 it is.
    first = tl.load(partial_ptr, inside_c, other=0.0)
    sums = tl.zeros((PARTS, BLOCK_C), tl.float32)
    for start in range(0, parts, PARTS):
        part = (start + tl.arange(0, PARTS))[:, None]
        mean = tl.load(partial_ptr + part.to(tl.int64) * 2 * c, (part < parts) & inside_c, other=0.0)
        size = _share_sizes(part, n, p, samples, pixels, parts_p)
        sums += (mean - first) * size  # 0 past the last part
    mean = first + tl.sum(sums, 0)[None, :] / count

    m2s = tl.zeros((PARTS, BLOCK_C), tl.float32)
    for start in range(0, parts, PARTS):
        part = (start + tl.arange(0, PARTS))[:, None]
        row = partial_ptr + part.to(tl.int64) * 2 * c
        inside = (part < parts) & inside_c
        distance = tl.load(row, inside, other=0.0) - mean
        size = _share_sizes(part, n, p, samples, pixels, parts_p)
        m2s += tl.load(row + c, inside, other=0.0) + distance * distance * size
    m2 = tl.sum(m2s, 0)[None, :]

    column = stream * c + channel
    tl.store(mean_ptr + column, mean, inside_c)
    tl.store(var_ptr + column, m2 / count, inside_c)
    if running_mean_ptr is not None:
        running_mean_ptr += column * running_mean_stride
        old = tl.load(running_mean_ptr, inside_c, other=0.0).to(tl.float32)
        tl.store(running_mean_ptr, (1 - momentum) * old + momentum * mean, inside_c)
    if running_var_ptr is not None:
        running_var_ptr += column * running_var_stride
        old = tl.load(running_var_ptr, inside_c, other=0.0).to(tl.float32)
        tl.store(running_var_ptr, (1 - momentum) * old + momentum * (m2 / (count - 1)), inside_c)
    if batches_ptr is not None:  # noqa: SIM102, known when compiled
        if tl.program_id(0) + tl.program_id(2) == 0:
            for counter in range(counters):
                tl.store(batches_ptr + counter, tl.load(batches_ptr + counter) + 1)


class Statistics(NamedTuple):
    """The launches, into how many parts the first cuts a stream, and the length of the vectors, T·C."""

    partial_statistics: Launch
    merge_statistics: Launch
    parts: int
    size: int

    def run(
        self, x: Tensor, distance: int, running_mean: Tensor | None, running_var: Tensor | None, batches: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See ``statistics``; the first stream, and elements from each to the next."""
        partial = x.new_empty(2 * self.size * self.parts, dtype=torch.float32)
        mean = x.new_empty(self.size, dtype=torch.float32)
        var = x.new_empty(self.size, dtype=torch.float32)
        self.partial_statistics((x, partial), (distance,))
        self.merge_statistics((partial, mean, var, running_mean, running_var, batches))
        return mean, var


@remembered
def plan_statistics(seen: Looks, streams: int, vector: int, momentum: float) -> Statistics:
    """The launches for streams, of which the first looks so, running mean, running variance and counters."""
    x, *running, batches = seen
    x_ = on_meta(x)
    walk = walk_of((x_,), None, summing=True, vector=vector)
    cut = walk.tiles
    strides = [0 if look is None else look[1][0] for look in running]
    return Statistics(
        Launch(partial_statistics_kernel, (*walk.grid, streams), (), walk.integers, walk.constants),
        Launch(
            merge_statistics_kernel,
            (-(-x_.shape[1] // MERGE_C), 1, streams),
            (float(cut.n * cut.p), momentum),
            (*cut.sizes, cut.parts, *strides, 0 if batches is None else math.prod(batches[0])),
            {"PARTS": MERGE_PARTS, "BLOCK_C": MERGE_C},
        ),
        cut.parts,
        streams * x_.shape[1],
    )


def statistics(
    x: Sequence[Tensor],
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    batches: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel; updates the running statistics in place, as torch does.

    Args:
        x: T tensors of shape (N, C, ...), with more than one value per channel.
        running_mean, running_var: shape (T·C,), any stride.
        momentum: weight of the new statistics.
        batches: counters that each go up by 1, int64, contiguous, or None.

    Returns:
        Mean and variance, float32, shape (T·C,).
    """
    count, distance = len(x), distance_of(x)
    if distance is None:
        running = [(of_stream(running_mean, t, count), of_stream(running_var, t, count)) for t in range(count)]
        found = [statistics([own], *running[t], momentum, None if t else batches) for t, own in enumerate(x)]
        return torch.cat([mean for mean, _ in found]), torch.cat([var for _, var in found])
    try:
        seen = looks(x[0], running_mean, running_var, batches)
        plan = plan_statistics(seen, count, vector_of(distance), momentum)
    except tiles.NotWalkableError:
        return statistics(tiles.walkable(x), running_mean, running_var, momentum, batches)
    return plan.run(x[0], distance, running_mean, running_var, batches)

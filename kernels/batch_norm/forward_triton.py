"""Triton kernel of BatchNorm + residual + activation + gate, forward, imported at the first launch.

Dims: N batch, C channels, P positions of a sample, T streams.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton.language as tl
from fastmerge.kernels.batch_norm import tiles
from fastmerge.kernels.batch_norm.formulas import Norm, Room, is_channels_last, room
from fastmerge.kernels.batch_norm.statistics_triton import Statistics, plan_statistics, statistics
from fastmerge.kernels.batch_norm.walk_triton import (
    activated,
    affine,
    channels_of,
    check_vectors,
    distances,
    gate_like,
    gate_stride,
    gate_vector,
    gates_of,
    kernel,
    on_meta,
    plain,
    read,
    share,
    stream_of,
    tile,
    vector_of,
    walk_of,
    write,
)
from fastmerge.kernels.launch import Launch, Looks, looks, remembered
from torch import Tensor


@kernel
def normalize_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    residual_ptr,
    gate_ptr,
    y_ptr,
    x_stride_t: tl.int64,
    residual_stride_t: tl.int64,
    y_stride_t: tl.int64,
    eps,
    n,
    p,
    c,
    samples,
    pixels,
    parts_p,
    x_stride_n,
    x_stride_p,
    x_stride_c,
    y_stride_n,
    y_stride_p,
    y_stride_c,
    residual_stride_n,
    residual_stride_p,
    residual_stride_c,
    gate_stride,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
    GATE_VECTOR: tl.constexpr,
):
    first_n, last_n, first_p, last_p = share(n, p, samples, pixels, parts_p, LAST, VECTOR, BLOCK_P)
    channel, c = channels_of(c, LAST, VECTOR, BLOCK_C)
    x_ptr = stream_of(x_ptr, x_stride_t, VECTOR)
    y_ptr = stream_of(y_ptr, y_stride_t, VECTOR)
    if residual_ptr is not None:
        residual_ptr = stream_of(residual_ptr, residual_stride_t, VECTOR)
    mean, scale, bias, _ = affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, channel, c, eps)
    for n_ in range(first_n, last_n, BLOCK_N):
        if gate_ptr is not None:
            row = (n_ + tl.arange(0, BLOCK_N))[:, None, None].to(tl.int64)
            gate = gates_of(gate_ptr, row, last_n, gate_stride, channel, c, GATE_VECTOR)
        for p_ in tl.range(first_p, last_p, BLOCK_P, num_stages=STAGES):
            at = tile(n_, p_, last_n, last_p, channel, c, BLOCK_N, BLOCK_P)
            # Distances first: x times scale, far from 0, would lose the digits that the mean takes away.
            y = (read(x_ptr, at, x_stride_n, x_stride_p, x_stride_c, LAST, VECTOR) - mean) * scale + bias
            if residual_ptr is not None:
                y += read(residual_ptr, at, residual_stride_n, residual_stride_p, residual_stride_c, LAST, VECTOR)
            y = activated(y, ACTIVATION)
            if gate_ptr is not None:
                y *= gate
            write(y_ptr, y, at, y_stride_n, y_stride_p, y_stride_c, LAST, VECTOR)


@remembered
def _plan(seen: Looks, streams: int, vector: int, activation: str, eps: float) -> tuple[Launch, Room]:
    """The launch for what looks so, in the order of ``Norm``, streams by the first; and the room for its results."""
    x, *vectors, residual, gates = seen
    check_vectors(*vectors)
    x_, gate = on_meta(x), gate_like(gates)
    y = room(x_.shape, is_channels_last(x_), x_.dtype, streams)
    tensors = (x_, x_.new_empty_strided(x_.shape, y.strides), on_meta(residual or x))
    walk = walk_of(tensors, gate, summing=False, vector=math.gcd(vector, y.distance))
    launch = Launch(
        normalize_kernel,
        (*walk.grid, streams),
        (eps,),
        (*walk.integers, gate_stride(gate)),
        {"ACTIVATION": activation, **walk.constants, "GATE_VECTOR": gate_vector(gate, x_.shape[1])},
    )
    return launch, y


def normalize(norm: Norm) -> Sequence[Tensor]:
    """``act((x - mean) / sqrt(var + eps) * weight + bias + residual) * gate`` of each stream, dense, in the layout of ``x``."""
    x, weight, bias, mean, var, residual, gate, eps, activation = norm
    apart = distances(x, residual)
    if apart is None:
        return [normalize(norm.stream(t))[0] for t in range(len(x))]
    tensors = (x[0], weight, bias, mean, var, residual and residual[0], gate)
    try:
        launch, room_of_y = _plan(looks(*tensors), len(x), vector_of(*apart), activation, eps)
    except tiles.NotWalkableError:
        return normalize(plain(norm))
    y = room_of_y.empty(x[0].device)
    launch((*tensors, y[0]), (*apart, room_of_y.distance))
    return y


@remembered
def _plan_training(
    seen: Looks, streams: int, vectors: tuple[int, int], momentum: float, activation: str, eps: float
) -> tuple[Statistics, Launch, Room]:
    """The launches of ``normalize_batch`` for what looks so, in the order of ``Norm``, then counters."""
    x, weight, bias, *running, residual, gates, batches = seen
    assert x is not None
    of_batch = plan_statistics((x, *running, batches), streams, vectors[0], momentum)
    vector = (of_batch.size,), (1,), torch.float32, x[3], True
    return of_batch, *_plan((x, weight, bias, vector, vector, residual, gates), streams, vectors[1], activation, eps)


def normalize_batch(norm: Norm, momentum: float, batches: Tensor | None, seen: Looks) -> tuple[Sequence[Tensor], Norm]:
    """``normalize`` by the batch's own ``statistics``, found first.

    Args:
        norm: its mean and variance are the running ones, which are updated, or None.
        momentum: weight of the new statistics in the running ones.
        batches: counters that each go up by 1, or None.
        seen: ``looks`` of the tensors of ``norm``, of streams the first, and of ``batches``.

    Returns:
        The results, and ``norm`` with the batch's mean and variance.
    """
    x, weight, bias, mean, var, residual, gate, eps, activation = norm
    apart = distances(x, residual)
    try:
        if apart is None:
            raise tiles.NotWalkableError("streams are at different distances")
        vectors = vector_of(apart[0]), vector_of(*apart)
        of_batch, launch, room_of_y = _plan_training(seen, len(x), vectors, momentum, activation, eps)
    except tiles.NotWalkableError:
        mean, var = statistics(x, mean, var, momentum, batches)
        norm = norm._replace(mean=mean, var=var)
        return normalize(norm), norm
    mean, var = of_batch.run(x[0], apart[0], mean, var, batches)
    y = room_of_y.empty(x[0].device)
    launch((x[0], weight, bias, mean, var, residual and residual[0], gate, y[0]), (*apart, room_of_y.distance))
    return y, Norm(x, weight, bias, mean, var, residual, gate, eps, activation)

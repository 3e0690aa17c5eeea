"""Triton kernels of BatchNorm + residual + activation + gate, backward, imported at the first launch.

With dz the gradient before the activation, h the value there, M positions, and x̂ = (x - mean) / sqrt(var + eps),

    dz = dy · gate · act'(h),   dgate = Σ_P dy · act(h),   dbias = Σ dz,   dweight = Σ dz x̂,
    dx = weight / sqrt(var + eps) · (dz - dbias / M - x̂ · dweight / M)      (in evaluation the sums drop out).

Two passes: one that sums, one that writes dx. x̂ and h are computed anew from x, which is cheaper than reading a mask and
needs no memory. A residual, and a second gradient of a result with two readers, are read in the first pass only: dz is written
there and read in the second.

Dims: N batch, C channels, P positions of a sample, T streams.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton.language as tl
from fastmerge.kernels.batch_norm import tiles
from fastmerge.kernels.batch_norm.formulas import Norm, Room, room_like
from fastmerge.kernels.batch_norm.sums_triton import Sums, first_streams, plan_sums, sum_gradients
from fastmerge.kernels.batch_norm.walk_triton import (
    affine,
    before_activation,
    channels_of,
    check_vectors,
    distances,
    gate_like,
    gate_stride,
    gate_vector,
    gates_of,
    in_dtype_of,
    kernel,
    on_meta,
    per_channel,
    plain,
    read,
    share,
    stream_by_stream,
    stream_of,
    tile,
    vector_of,
    walk_of,
    write,
)
from fastmerge.kernels.launch import Launch, Looks, looks, remembered
from torch import Tensor


@kernel
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
    dz_stride_t: tl.int64,
    x_stride_t: tl.int64,
    dx_stride_t: tl.int64,
    count,
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
    dz_stride_n,
    dz_stride_p,
    dz_stride_c,
    dx_stride_n,
    dx_stride_p,
    dx_stride_c,
    gate_stride,
    ACTIVATION: tl.constexpr,
    TRAINING: tl.constexpr,
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
    dz_ptr = stream_of(dz_ptr, dz_stride_t, VECTOR)
    x_ptr = stream_of(x_ptr, x_stride_t, VECTOR)
    dx_ptr = stream_of(dx_ptr, dx_stride_t, VECTOR)
    mean, scale, bias, inverse_std = affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, channel, c, eps)
    if TRAINING:
        center = per_channel(dbias_ptr, channel, c, 0.0) / count
        slope = per_channel(dweight_ptr, channel, c, 0.0) * inverse_std / count
    for n_ in range(first_n, last_n, BLOCK_N):
        if gate_ptr is not None:
            row = (n_ + tl.arange(0, BLOCK_N))[:, None, None].to(tl.int64)
            gate = gates_of(gate_ptr, row, last_n, gate_stride, channel, c, GATE_VECTOR)
        for p_ in tl.range(first_p, last_p, BLOCK_P, num_stages=STAGES):
            at = tile(n_, p_, last_n, last_p, channel, c, BLOCK_N, BLOCK_P)
            dz = read(dz_ptr, at, dz_stride_n, dz_stride_p, dz_stride_c, LAST, VECTOR)
            if ACTIVATION != "identity" or TRAINING:
                distance = read(x_ptr, at, x_stride_n, x_stride_p, x_stride_c, LAST, VECTOR) - mean
            if ACTIVATION != "identity":
                dz = before_activation(dz, distance * scale + bias, ACTIVATION)
            if gate_ptr is not None:
                dz *= gate
            if TRAINING:
                dz -= center + distance * slope
            write(dx_ptr, dz * scale, at, dx_stride_n, dx_stride_p, dx_stride_c, LAST, VECTOR)


class _Plan(NamedTuple):
    """The two passes, None where not needed; how far the streams of dz are apart; the room for dx."""

    sums: Sums | None
    input_gradient: Launch | None
    dz_distance: int
    dx: Room


@remembered
def _plan(
    seen: Looks,
    streams: int,
    joined: bool,
    vector: int,
    activation: str,
    eps: float,
    training: bool,
    needs: tuple[bool, ...],
) -> _Plan:
    """The launches for what looks so; see ``plan_sums``.

    Args:
        joined: whether the streams of x are as far apart as slices of the channels of one tensor.
        training, needs: see ``gradients``.
    """
    dy, more, x, *vectors, residual, gates = seen
    needs_dx, needs_dweight, needs_dbias, needs_dresidual, needs_dgate = needs
    activates = activation != "identity"
    needs_dz = (needs_dresidual and (activates or gates is not None or more is not None)) or (
        needs_dx and (more is not None or (residual is not None and activates))
    )
    sums, launch, dz_distance = None, None, 0
    if (training and needs_dx) or needs_dweight or needs_dbias or needs_dgate or needs_dz:
        sums = plan_sums(seen, streams, vector, activation, eps, needs_dz, needs_dgate)
    check_vectors(*vectors)
    x_, dz_ = on_meta(x), on_meta(dy)
    dx, gate = room_like(x_, streams, x_.shape[1] * x_.stride(1) if joined else None), gate_like(gates)
    vector = math.gcd(vector, dx.distance)
    if sums is not None and sums.dz is not None:  # what the second pass reads in place of dy, activation and gates
        dz_, dz_distance = x_.new_empty_strided(x_.shape, sums.dz.strides), sums.dz.distance
        vector, activation, gate = math.gcd(vector, dz_distance), "identity", None
    if needs_dx:
        walk = walk_of((x_, dz_, x_.new_empty_strided(x_.shape, dx.strides)), gate, summing=False, vector=vector)
        launch = Launch(
            input_gradient_kernel,
            (*walk.grid, streams),
            (float(walk.tiles.n * walk.tiles.p), eps),
            (*walk.integers, gate_stride(gate)),
            {
                "ACTIVATION": activation,
                "TRAINING": training,
                **walk.constants,
                "GATE_VECTOR": gate_vector(gate, x_.shape[1]),
            },
        )
    return _Plan(sums, launch, dz_distance, dx)


def gradients(
    dy: Sequence[Tensor], more: Sequence[Tensor] | None, norm: Norm, training: bool, needs: Sequence[bool]
) -> tuple[Any, ...]:
    """The gradients of ``normalize``, in training through mean and variance too.

    Args:
        dy: gradients of the T results, any strides.
        more: as many more, to be added to them, or None.
        norm: of the forward pass.
        training: whether mean and variance are those of ``x``.
        needs: which of dx, dweight, dbias, dresidual and dgate are wanted.

    Returns:
        Those gradients in the dtypes of what they belong to, None where not wanted; T of dx and of dresidual. dx is dense in
        the layout of ``x``, or slices of one tensor where these are. dresidual is ``dy`` itself where it equals it.
    """
    if norm.residual is not None and not norm.activates and not needs[4]:
        norm = norm._replace(residual=None)  # its values change no gradient
    x, weight, bias, mean, var, residual, gate, eps, activation = norm
    apart = distances(dy, more, x, residual)
    if apart is None:
        return stream_by_stream(
            lambda t: gradients(dy[t : t + 1], more and more[t : t + 1], norm.stream(t), training, needs), len(x)
        )
    seen = looks(*first_streams(dy, more, norm))
    shape, strides, *_ = seen[2]  # type: ignore[misc]
    joined = apart[2] == shape[1] * strides[1]
    try:
        plan = _plan(seen, len(x), joined, vector_of(*apart), activation, eps, training, tuple(needs))
    except tiles.NotWalkableError:
        return gradients(tiles.walkable(dy), more and tiles.walkable(more), plain(norm), training, needs)
    dbias, dweight, dz, dgate, dx = None, None, None, None, None
    if plan.sums is not None:
        dbias, dweight, dz, dgate = sum_gradients(plan.sums, dy, more, apart, norm)
    if plan.input_gradient is not None:
        dx = plan.dx.empty(x[0].device)
        read, gates, distance = (dy[0], gate, apart[0]) if dz is None else (dz[0], None, plan.dz_distance)
        sums = (dbias, dweight) if training else (None, None)
        plan.input_gradient(
            (read, x[0], weight, bias, mean, var, gates, *sums, dx[0]), (distance, apart[2], plan.dx.distance)
        )
    changed = norm.activates or gate is not None or more is not None
    dresidual = (dz if changed else dy) if needs[3] else None
    return dx, in_dtype_of(weight, dweight, needs[1]), in_dtype_of(bias, dbias, needs[2]), dresidual, dgate

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
from typing import Any

import triton.language as tl
from fastmerge.kernels.batch_norm import tiles
from fastmerge.kernels.batch_norm.formulas import Norm, Room, distance_of, room_like
from fastmerge.kernels.batch_norm.sums_triton import first_streams, sum_gradients
from fastmerge.kernels.batch_norm.walk_triton import (
    Launch,
    Looks,
    affine,
    before_activation,
    channels_of,
    check_vectors,
    distances,
    gate_like,
    gate_stride,
    gate_vector,
    gates_of,
    in_dtypes_of,
    kernel,
    looks,
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


@tiles.remembered
def _plan(
    seen: Looks, streams: int, joined: bool, vector: int, activation: str, eps: float, training: bool
) -> tuple[Launch, Room]:
    """The launch for what looks so: first streams of dz and x, vectors, gates; and the room for dx."""
    dz, x, *vectors, gates = seen
    check_vectors(*vectors)
    x_, gate = on_meta(x), gate_like(gates)
    dx = room_like(x_, streams, x_.shape[1] * x_.stride(1) if joined else None)
    tensors = (x_, on_meta(dz), x_.new_empty_strided(x_.shape, dx.strides))
    walk = walk_of(tensors, gate, summing=False, vector=math.gcd(vector, dx.distance))
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
    return launch, dx


def input_gradient(
    dz: Sequence[Tensor],
    seen: Looks,
    apart: tuple[int, int],
    norm: Norm,
    linear: bool,
    sums: tuple[Tensor, Tensor] | None,
) -> Sequence[Tensor]:
    """The second pass, of streams that one launch reaches.

    Args:
        dz: gradients before the activation, or of the results.
        seen: ``looks`` of the first streams of dz and x, of the vectors, and of the gates unless ``linear``.
        apart: ``distances`` of dz and x.
        norm: of the forward pass.
        linear: whether ``dz`` are gradients before the activation; otherwise there is no residual.
        sums: dbias and dweight; None in evaluation.

    Returns:
        dx, dense in dtype and layout of ``x``, or slices of one tensor where these are.

    Raises:
        NotWalkableError: see ``tiles``.
    """
    x, weight, bias, mean, var, _, gate, eps, activation = norm
    first = x[0]
    tensors = (dz[0], first, weight, bias, mean, var, None if linear else gate)
    launch, room_of_dx = _plan(
        *(seen, len(x), apart[1] == first.shape[1] * first.stride(1), vector_of(*apart)),
        *("identity" if linear else activation, eps, sums is not None),
    )
    dx = room_of_dx.empty(first.device)
    launch((*tensors, *(sums or (None, None)), dx[0]), (*apart, room_of_dx.distance))
    return dx


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
        Those gradients in the dtypes of what they belong to, None where not wanted; T of dx and of dresidual. dresidual is
        ``dy`` itself where it equals it.
    """
    x, gate = norm.x, norm.gate
    residual = norm.residual if norm.activates or needs[4] else None
    apart = distances(dy, more, x, residual)
    if apart is None:
        return stream_by_stream(
            lambda t: gradients(dy[t : t + 1], more and more[t : t + 1], norm.stream(t), training, needs), len(x)
        )
    needs_dx, needs_dweight, needs_dbias, needs_dresidual, needs_dgate = needs
    changed = norm.activates or gate is not None or more is not None
    needs_dz = changed and (
        needs_dresidual or (needs_dx and (more is not None or (residual is not None and norm.activates)))
    )
    dbias, dweight, dz, dgate, dx = None, None, None, None, None
    summed = norm if residual is norm.residual else norm._replace(residual=None)
    seen = looks(*first_streams(dy, more, summed))
    try:
        if (training and needs_dx) or needs_dweight or needs_dbias or needs_dgate or needs_dz:
            dbias, dweight, dz, dgate = sum_gradients(dy, more, seen, apart, summed, needs_dz, needs_dgate)
        if needs_dx:
            sums = (dbias, dweight) if training else None
            if dz is None:
                dx = input_gradient(dy, (seen[0], *seen[2:7], seen[8]), (apart[0], apart[2]), norm, False, sums)
            else:
                of_dz = (*looks(dz[0]), *seen[2:7], None)
                dx = input_gradient(dz, of_dz, (distance_of(dz) or 0, apart[2]), norm, True, sums)
    except tiles.NotWalkableError:
        return gradients(tiles.walkable(dy), more and tiles.walkable(more), plain(norm), training, needs)
    dresidual = (dz if changed else dy) if needs_dresidual else None
    needed = (needs_dweight, needs_dbias, needs_dgate)
    dweight, dbias, dgate = in_dtypes_of((norm.weight, norm.bias, gate), (dweight, dbias, dgate), needed)
    return dx, dweight, dbias, dresidual, dgate

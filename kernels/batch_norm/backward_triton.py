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

from collections.abc import Sequence
from typing import Any

import triton.language as tl
from fastmerge.kernels.batch_norm import tiles
from fastmerge.kernels.batch_norm.formulas import Norm, empty_like_streams
from fastmerge.kernels.batch_norm.sums_triton import sum_gradients
from fastmerge.kernels.batch_norm.walk_triton import (
    affine,
    before_activation,
    channels_of,
    distances,
    gate_stride,
    gate_vector,
    gates_of,
    in_dtypes_of,
    kernel,
    launch,
    per_channel,
    read,
    rows_of,
    share,
    stream_by_stream,
    stream_of,
    tile,
    vectors_of,
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


def input_gradient(dz: Sequence[Tensor], norm: Norm, sums: tuple[Tensor, Tensor] | None) -> list[Tensor]:
    """The second pass, of streams that one launch reaches.

    Args:
        dz: gradients before the activation, or with an activation or a gate what these are still to be applied to; ``walkable``
            as is ``norm.x``.
        norm: of the forward pass, without a residual; without activation and gate where ``dz`` went through them.
        sums: dbias and dweight; None in evaluation.

    Returns:
        dx, dense in dtype and layout of ``x``, or slices of one tensor where these are.
    """
    x, gate = norm.x, norm.gate
    dx = empty_like_streams(x)
    walk = tiles.walk((x[0], dz[0], dx[0]), gate is not None and gate.shape[0] > 1, summing=False)
    launch(
        input_gradient_kernel,
        (*walk.grid, len(x)),
        (dz[0], x[0], *vectors_of(norm), rows_of(gate), *(sums or (None, None)), dx[0]),
        distances(dz, x, dx),
        (float(walk.tiles.n * walk.tiles.p), norm.eps),
        (*walk.integers, gate_stride(gate)),
        {
            "ACTIVATION": norm.activation,
            "TRAINING": sums is not None,
            **walk.constants,
            "GATE_VECTOR": gate_vector(gate, x[0].shape[1]),
        },
    )
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
        Those gradients in the dtypes of what they belong to, None where not wanted; a list where there are T. dresidual is
        ``dy`` itself where it equals it.
    """
    dy, x = [tiles.walkable(t) for t in dy], [tiles.walkable(t) for t in norm.x]
    more, residual = ([tiles.walkable(t) for t in streams] if streams else None for streams in (more, norm.residual))
    needs_dx, needs_dweight, needs_dbias, needs_dresidual, needs_dgate = needs
    apart = distances(dy, more, x, residual)
    if apart is None:
        return stream_by_stream(
            lambda t: gradients(dy[t : t + 1], more and more[t : t + 1], norm.stream(t), training, needs), len(x)
        )
    if not norm.activates and not needs_dgate:
        residual = None
    norm, gate = norm._replace(x=x, residual=residual), norm.gate
    changed = norm.activates or norm.gate is not None or more is not None
    needs_dz = changed and (
        needs_dresidual or (needs_dx and (more is not None or (residual is not None and norm.activates)))
    )
    dbias, dweight, dz, dgate = None, None, None, None
    if (training and needs_dx) or needs_dweight or needs_dbias or needs_dgate or needs_dz:
        dbias, dweight, dz, dgate = sum_gradients(dy, more, apart, norm, needs_dz, needs_dgate)
    dx = None
    if needs_dx:
        sums = (dbias, dweight) if training else None
        norm = (
            norm._replace(residual=None)
            if dz is None
            else norm._replace(residual=None, activation="identity", gate=None)
        )
        dx = input_gradient(dy if dz is None else dz, norm, sums)
    dresidual = (dz if changed else dy) if needs_dresidual else None
    needed = (needs_dweight, needs_dbias, needs_dgate)
    dweight, dbias, dgate = in_dtypes_of((norm.weight, norm.bias, gate), (dweight, dbias, dgate), needed)
    return dx, dweight, dbias, dresidual, dgate

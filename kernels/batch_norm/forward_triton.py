"""Triton kernel of BatchNorm + residual + activation + gate, forward, imported at the first launch.

Dims: N batch, C channels, P positions of a sample, T streams.
"""

from __future__ import annotations

import triton.language as tl
from fastmerge.kernels.batch_norm import tiles
from fastmerge.kernels.batch_norm.formulas import Norm, empty_streams
from fastmerge.kernels.batch_norm.walk_triton import (
    activated,
    affine,
    channels_of,
    distances,
    gate_stride,
    gate_vector,
    gates_of,
    kernel,
    launch,
    read,
    rows_of,
    share,
    stream_of,
    tile,
    vectors_of,
    write,
)
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


def normalize(norm: Norm) -> list[Tensor]:
    """``act((x - mean) / sqrt(var + eps) * weight + bias + residual) * gate`` of each stream, dense, in the layout of ``x``."""
    y = empty_streams(norm.x)
    x, residual = ([tiles.walkable(t) for t in norm.x], norm.residual and [tiles.walkable(t) for t in norm.residual])
    apart = distances(x, residual, y)
    if apart is None:
        return [normalize(norm.stream(t))[0] for t in range(len(x))]
    gate = norm.gate
    walk = tiles.walk(
        (x[0], y[0], x[0] if residual is None else residual[0]), gate is not None and gate.shape[0] > 1, summing=False
    )
    launch(
        normalize_kernel,
        (*walk.grid, len(x)),
        (x[0], *vectors_of(norm), None if residual is None else residual[0], rows_of(gate), y[0]),
        apart,
        (norm.eps,),
        (*walk.integers, gate_stride(gate)),
        {"ACTIVATION": norm.activation, **walk.constants, "GATE_VECTOR": gate_vector(gate, x[0].shape[1])},
    )
    return y

"""Triton kernel of BatchNorm + activation + max-pooling + gate, backward, imported at the first launch.

The sums over all positions are sums over the pooled ones, for no other position has a gradient: the kernel of the operation
without pooling takes them, and writes dz, pooled, where the result has two readers. The second pass walks cells of ``stride`` x
``stride`` positions: in a cell it is known at compile time which place each position has in each window that reaches it.

Dims: N batch, C channels, H W of x, OH OW of the pooled y, T streams.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import triton.language as tl
from fastmerge.kernels.batch_norm import tiles
from fastmerge.kernels.batch_norm.formulas import Norm, Room, distance_of, room_like
from fastmerge.kernels.batch_norm.pool_triton import cut, gate_of, patch, window_constants
from fastmerge.kernels.batch_norm.sums_triton import first_streams, plan_sums, sum_gradients
from fastmerge.kernels.batch_norm.walk_triton import (
    affine,
    before_activation,
    check_vectors,
    distances,
    gate_like,
    gate_stride,
    gate_vector,
    in_dtype_of,
    kernel,
    multiple,
    on_meta,
    per_channel,
    plain,
    stream_by_stream,
    stream_of,
    vector_of,
)
from fastmerge.kernels.launch import Launch, Looks, looks, remembered
from torch import Tensor


@kernel
def unpool_kernel(
    dy_ptr,
    place_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    gate_ptr,
    dbias_ptr,
    dweight_ptr,
    dx_ptr,
    dy_stride_t: tl.int64,
    place_stride_t: tl.int64,
    x_stride_t: tl.int64,
    dx_stride_t: tl.int64,
    count,
    eps,
    c,
    height,
    width,
    pooled_height,
    pooled_width,
    high,
    wide,
    dy_stride_n,
    dy_stride_c,
    dy_stride_h,
    dy_stride_w,
    place_stride_n,
    place_stride_c,
    place_stride_h,
    place_stride_w,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    dx_stride_n,
    dx_stride_c,
    dx_stride_h,
    dx_stride_w,
    gate_stride,
    ACTIVATION: tl.constexpr,
    TRAINING: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VECTOR: tl.constexpr,
    GATE_VECTOR: tl.constexpr,
):
    sample, row, column, channel = patch(high, wide, BLOCK_H, BLOCK_W, BLOCK_C)
    c = multiple(c, VECTOR)
    inside_c = channel < c
    mean, scale, bias, inverse_std = affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, channel, c, eps)
    if TRAINING:
        center = per_channel(dbias_ptr, channel, c, 0.0) / count
        slope = per_channel(dweight_ptr, channel, c, 0.0) * inverse_std / count
    if gate_ptr is not None:
        gate = gate_of(gate_ptr, sample, gate_stride, channel, c, GATE_VECTOR)

    across = channel.to(tl.int64)
    dy_ptr = stream_of(dy_ptr, dy_stride_t, VECTOR) + sample * multiple(dy_stride_n, VECTOR) + across * dy_stride_c
    place_ptr = stream_of(place_ptr, place_stride_t, VECTOR) + sample * multiple(place_stride_n, VECTOR)
    place_ptr += across * place_stride_c
    x_ptr = stream_of(x_ptr, x_stride_t, VECTOR) + sample * multiple(x_stride_n, VECTOR) + across * x_stride_c
    dx_ptr = stream_of(dx_ptr, dx_stride_t, VECTOR) + sample * multiple(dx_stride_n, VECTOR) + across * dx_stride_c
    dy_stride_h, dy_stride_w = multiple(dy_stride_h, VECTOR), multiple(dy_stride_w, VECTOR)
    place_stride_h, place_stride_w = multiple(place_stride_h, VECTOR), multiple(place_stride_w, VECTOR)
    x_stride_h, x_stride_w = multiple(x_stride_h, VECTOR), multiple(x_stride_w, VECTOR)
    dx_stride_h, dx_stride_w = multiple(dx_stride_h, VECTOR), multiple(dx_stride_w, VECTOR)
    for a in tl.static_range(STRIDE_H):
        h = row * STRIDE_H + a - PADDING_H
        for b in tl.static_range(STRIDE_W):
            w = column * STRIDE_W + b - PADDING_W
            dz = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_C), tl.float32)
            # Place (i, j) of window (row - i // stride, column - j // stride) is this position.
            for i in tl.static_range(a, KERNEL_H, STRIDE_H):
                oh = row - i // STRIDE_H
                for j in tl.static_range(b, KERNEL_W, STRIDE_W):
                    ow = column - j // STRIDE_W
                    reached = (oh >= 0) & (oh < pooled_height) & (ow >= 0) & (ow < pooled_width) & inside_c
                    oh_, ow_ = oh.to(tl.int64), ow.to(tl.int64)
                    place = tl.load(place_ptr + oh_ * place_stride_h + ow_ * place_stride_w, reached, other=-1)
                    dy = tl.load(dy_ptr + oh_ * dy_stride_h + ow_ * dy_stride_w, reached, other=0.0)
                    dz += tl.where(place == i * KERNEL_W + j, dy.to(tl.float32), 0.0)
            inside = (h >= 0) & (h < height) & (w >= 0) & (w < width) & inside_c
            h_, w_ = h.to(tl.int64), w.to(tl.int64)
            if ACTIVATION != "identity" or TRAINING:
                x = tl.load(x_ptr + h_ * x_stride_h + w_ * x_stride_w, inside, other=0.0)
                distance = x.to(tl.float32) - mean
            if ACTIVATION != "identity":
                dz = before_activation(dz, distance * scale + bias, ACTIVATION)
            if gate_ptr is not None:
                dz *= gate
            if TRAINING:
                dz -= center + distance * slope
            tl.store(dx_ptr + h_ * dx_stride_h + w_ * dx_stride_w, (dz * scale).to(dx_ptr.dtype.element_ty), inside)


@remembered
def _plan(
    seen: Looks,
    window: tuple[int, ...],
    streams: int,
    joined: bool,
    vector: int,
    activation: str,
    eps: float,
    training: bool,
) -> tuple[Launch, Room]:
    """The launch of the second pass for what looks so: first streams of dy, places and x, vectors, gates; the room for dx."""
    dy, place, x, *vectors, gates = seen
    check_vectors(*vectors)
    dy_, place_, x_, gate = on_meta(dy), on_meta(place), on_meta(x), gate_like(gates)
    dx = room_like(x_, streams, x_.shape[1] * x_.stride(1) if joined else None)
    high, wide = (-(-(x_.shape[2 + i] + window[4 + i]) // window[2 + i]) for i in range(2))
    strides = (dy_.stride(), place_.stride(), x_.stride(), dx.strides)
    grid, sizes, constants, warps = cut(x_, dy_.shape, (high, wide), False, strides, math.gcd(vector, dx.distance))
    launch = Launch(
        unpool_kernel,
        (*grid, streams),
        (float(x_.numel() // x_.shape[1]), eps),
        (*sizes, *[step for own in strides for step in own], gate_stride(gate)),
        {
            "ACTIVATION": activation,
            "TRAINING": training,
            **window_constants(window),
            **constants,
            "GATE_VECTOR": gate_vector(gate, x_.shape[1]),
        },
        warps,
    )
    return launch, dx


def gradients(
    dy: Sequence[Tensor],
    more: Sequence[Tensor] | None,
    norm: Norm,
    peak: Sequence[Tensor],
    place: Sequence[Tensor],
    training: bool,
    window: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Any, ...]:
    """The gradients of ``pool``, in training through mean and variance too.

    Args:
        dy: gradients of the T results, any strides.
        more: as many more, to be added to them, or None.
        norm: of the forward pass.
        peak, place: what that kept.
        training: whether mean and variance are those of ``x``.
        window: see ``pooling_window``.
        needs: which of dx, dweight, dbias and dgate are wanted.

    Returns:
        Those gradients in the dtypes of what they belong to, None where not wanted; T of dx.
    """
    norm = plain(norm)._replace(x=norm.x)  # the second pass takes x as it lies
    x = norm.x
    needs_dx, needs_dweight, needs_dbias, needs_dgate = needs
    dy, more = tiles.walkable(dy), more and tiles.walkable(more)
    apart = distances(dy, more, peak, place, x)
    if apart is None:
        return stream_by_stream(
            lambda t: gradients(
                *(dy[t : t + 1], more and more[t : t + 1], norm.stream(t), peak[t : t + 1], place[t : t + 1]),
                *(training, window, needs),
            ),
            len(x),
        )
    of_dy, of_more, of_peak, of_place, of_x = apart
    dbias, dweight, dgate, dx = None, None, None, None
    needs_dz = needs_dx and more is not None
    if (training and needs_dx) or needs_dweight or needs_dbias or needs_dgate or needs_dz:
        pooled = norm._replace(x=peak)
        seen = looks(*first_streams(dy, more, pooled))
        vector = vector_of(of_dy, of_more, of_peak)
        plan = plan_sums(seen, len(x), vector, norm.activation, norm.eps, needs_dz, needs_dgate)
        dbias, dweight, dz, dgate = sum_gradients(plan, dy, more, (of_dy, of_more, of_peak, 0), pooled)
        if dz is not None:
            dy, of_dy, norm = dz, distance_of(dz) or 0, norm._replace(activation="identity", gate=None)
    if needs_dx:
        tensors = (dy[0], place[0], x[0], *norm[1:5], norm.gate)
        launch, room_of_dx = _plan(
            *(looks(*tensors), tuple(window), len(x), of_x == x[0].shape[1] * x[0].stride(1)),
            *(vector_of(of_dy, of_place, of_x), norm.activation, norm.eps, training),
        )
        dx = room_of_dx.empty(x[0].device)
        sums = (dbias, dweight) if training else (None, None)
        launch((*tensors, *sums, dx[0]), (of_dy, of_place, of_x, room_of_dx.distance))
    return dx, in_dtype_of(norm.weight, dweight, needs_dweight), in_dtype_of(norm.bias, dbias, needs_dbias), dgate

"""Triton kernels of BatchNorm + activation + max-pooling + gate, imported at the first launch.

Normalisation and most activations never decrease along x, or never increase where the scale is negative. So the largest
activation of a window is the activation of its largest or smallest x, and the window is searched before anything is
computed. SiLU and Hardswish fall before they rise: their windows are searched for the largest activation.

Kept for the backward pass (``unpool_triton``), all in the pooled size: the x that was chosen, and its place in the window as
int8.

Dims: N batch, C channels, H W of x, OH OW of the pooled y, T streams.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from fastmerge.kernels.batch_norm import tiles
from fastmerge.kernels.batch_norm.formulas import (
    Norm,
    Room,
    distance_of,
    is_channels_last,
    pooled_shape,
    room,
)
from fastmerge.kernels.batch_norm.walk_triton import (
    activated,
    affine,
    check_vectors,
    gate_like,
    gate_stride,
    gate_vector,
    kernel,
    multiple,
    on_meta,
    per_channel,
    plain,
    stream_of,
    vector_of,
)
from fastmerge.kernels.launch import Launch, Looks, looks, remembered
from torch import Tensor

_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def patch(high, wide, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's sample, its patch of rows and columns, and its channels; ``high`` x ``wide`` patches are a sample."""
    index = tl.program_id(0)
    place = tl.arange(0, BLOCK_H * BLOCK_W)[:, None]
    row = (index // wide) % high * BLOCK_H + place // BLOCK_W
    column = index % wide * BLOCK_W + place % BLOCK_W
    channel = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    return (index // (wide * high)).to(tl.int64), row, column, channel


@triton.jit
def gate_of(gate_ptr, sample, gate_stride, channel, c, GATE_VECTOR: tl.constexpr):
    """A sample's gates, as float32."""
    gate_ptr += sample * multiple(gate_stride, GATE_VECTOR) + tl.program_id(2) * c + channel
    return tl.load(gate_ptr, channel < c, other=0.0).to(tl.float32)


@kernel
def pool_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    gate_ptr,
    y_ptr,
    peak_ptr,
    place_ptr,
    x_stride_t: tl.int64,
    y_stride_t: tl.int64,
    peak_stride_t: tl.int64,
    place_stride_t: tl.int64,
    eps,
    c,
    height,
    width,
    pooled_height,
    pooled_width,
    high,
    wide,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    y_stride_n,
    y_stride_c,
    y_stride_h,
    y_stride_w,
    gate_stride,
    ACTIVATION: tl.constexpr,
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
    mean, scale, bias, _ = affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, channel, c, eps)
    rises: tl.constexpr = ACTIVATION != "silu" and ACTIVATION != "hardswish"
    if rises:
        weight = per_channel(weight_ptr, channel, c, 1.0)
        sign = tl.where(weight < 0, -1.0, tl.where(weight > 0, 1.0, 0.0))

    # Where a window leaves x, its nearest position is read again: that changes neither the largest value nor, but for the
    # places in the padding corrected below, which of equal ones comes first. So nothing but channels needs a mask.
    x_ptr = stream_of(x_ptr, x_stride_t, VECTOR) + sample * multiple(x_stride_n, VECTOR)
    x_ptr += channel.to(tl.int64) * x_stride_c
    x_stride_h, x_stride_w = multiple(x_stride_h, VECTOR), multiple(x_stride_w, VECTOR)
    top, left = row * STRIDE_H - PADDING_H, column * STRIDE_W - PADDING_W
    best = tl.full((BLOCK_H * BLOCK_W, BLOCK_C), -_INFINITY, tl.float32)
    place = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_C), tl.int32)
    peak = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_C), tl.float32)
    for i in tl.static_range(KERNEL_H):
        h = tl.minimum(tl.maximum(top + i, 0), height - 1).to(tl.int64)
        for j in tl.static_range(KERNEL_W):
            w = tl.minimum(tl.maximum(left + j, 0), width - 1).to(tl.int64)
            x = tl.load(x_ptr + h * x_stride_h + w * x_stride_w, inside_c, other=0.0).to(tl.float32)
            if rises:
                if i + j == 0:
                    peak = x
                value = x * sign
            else:
                value = activated((x - mean) * scale + bias, ACTIVATION)
                peak = tl.where((value > best) | (value != value), x, peak)
            place = tl.where(value > best, i * KERNEL_W + j, place)
            best = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
    if rises:
        peak = tl.where(sign == 0, peak, best * sign)
    y = activated((peak - mean) * scale + bias, ACTIVATION)
    if gate_ptr is not None:
        y *= gate_of(gate_ptr, sample, gate_stride, channel, c, GATE_VECTOR)
    offset = sample * multiple(y_stride_n, VECTOR) + channel.to(tl.int64) * y_stride_c
    offset += row.to(tl.int64) * multiple(y_stride_h, VECTOR) + column.to(tl.int64) * multiple(y_stride_w, VECTOR)
    inside = (row < pooled_height) & (column < pooled_width) & inside_c
    tl.store(stream_of(y_ptr, y_stride_t, VECTOR) + offset, y.to(y_ptr.dtype.element_ty), inside)
    if place_ptr is not None:
        place = tl.maximum(place // KERNEL_W, -top) * KERNEL_W + tl.maximum(place % KERNEL_W, -left)
        tl.store(stream_of(place_ptr, place_stride_t, VECTOR) + offset, place.to(tl.int8), inside)
        tl.store(stream_of(peak_ptr, peak_stride_t, VECTOR) + offset, peak.to(peak_ptr.dtype.element_ty), inside)


@remembered
def _plan(
    seen: Looks, window: tuple[int, ...], streams: int, vector: int, activation: str, eps: float
) -> tuple[Launch, Room, Room]:
    """The launch for what looks so: first stream, vectors, gates; the room for its results, and that for places."""
    x, *vectors, gates = seen
    check_vectors(*vectors)
    x_, gate = on_meta(x), gate_like(gates)
    channels_last, pooled = is_channels_last(x_), pooled_shape(x_, window)
    y, place = (room(pooled, channels_last, dtype, streams) for dtype in (x_.dtype, torch.int8))
    vector = math.gcd(vector, y.distance)
    grid, sizes, constants, warps = cut(x_, pooled, (pooled[2], pooled[3]), True, (x_.stride(), y.strides), vector)
    launch = Launch(
        pool_kernel,
        (*grid, streams),
        (eps,),
        (*sizes, *x_.stride(), *y.strides, gate_stride(gate)),
        {
            "ACTIVATION": activation,
            **window_constants(window),
            **constants,
            "GATE_VECTOR": gate_vector(gate, x_.shape[1]),
        },
        warps,
    )
    return launch, y, place


def pool(
    norm: Norm, window: Sequence[int], keep: bool
) -> tuple[Sequence[Tensor], Sequence[Tensor] | None, Sequence[Tensor] | None]:
    """``max_pool(act((x - mean) / sqrt(var + eps) * weight + bias)) * gate`` of each stream.

    Args:
        norm: its ``x`` of shape (N, C, H, W), any strides.
        window: see ``pooling_window``.
        keep: whether the backward pass will need ``peak`` and ``place``.

    Returns:
        y; the x that each element of it came from; that x's place in the window, int8, row by row. All of them dense, in the
        layout of ``x``, shape (N, C, OH, OW).
    """
    x, distance = norm.x, distance_of(norm.x)
    if distance is None:
        found = [pool(norm.stream(t), window, keep) for t in range(len(x))]
        y, peak, place = ([own[0] for own in parts] if parts[0] else None for parts in zip(*found, strict=True))
        assert y is not None
        return y, peak, place
    tensors = (x[0], *norm[1:5], norm.gate)
    try:
        launch, room_of_y, room_of_place = _plan(
            looks(*tensors), tuple(window), len(x), vector_of(distance), norm.activation, norm.eps
        )
    except tiles.NotWalkableError:
        return pool(plain(norm), window, keep)
    device = x[0].device
    y = room_of_y.empty(device)
    peak = room_of_y.empty(device) if keep else None
    place = room_of_place.empty(device) if keep else None
    launch(
        (*tensors, y[0], peak and peak[0], place and place[0]),
        (distance, room_of_y.distance, *((room_of_y.distance, room_of_place.distance) if keep else (0, 0))),
    )
    return y, peak, place


def window_constants(window: Sequence[int]) -> dict[str, int]:
    """The constexpr arguments of both kernels that say how x is pooled."""
    names = ("KERNEL_H", "KERNEL_W", "STRIDE_H", "STRIDE_W", "PADDING_H", "PADDING_W")
    return dict(zip(names, window, strict=True))


def cut(
    x: Tensor,
    pooled: Sequence[int],
    walked: tuple[int, int],
    pooling: bool,
    strides: tuple[tuple[int, ...], ...],
    vector: int,
) -> tuple[tuple[int, int], tuple[int, ...], dict[str, Any], int]:
    """Grid, sizes, constexprs and warps for walking ``walked`` cells of each sample, in tensors of all ``strides``."""
    n, c, height, width = x.shape
    channels_last = is_channels_last(x)
    block_h, block_w, block_c = tiles.patches(*walked, c, x.element_size(), channels_last, pooling)
    high, wide = -(-walked[0] // block_h), -(-walked[1] // block_w)
    at_once = 1
    if all(own[1] == 1 for own in strides):
        at_once = math.gcd(vector, c, *[own[dim] for own in strides for dim in (0, 2, 3)])
    constants = {"BLOCK_H": block_h, "BLOCK_W": block_w, "BLOCK_C": block_c, "VECTOR": at_once}
    grid = (n * high * wide, -(-c // block_c))
    return grid, (c, height, width, *pooled[2:], high, wide), constants, tiles.patch_warps(channels_last, pooling)

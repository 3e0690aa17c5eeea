"""Triton kernel of BatchNorm + activation + max-pooling + gate, backward, imported at the first launch.

The sums over all positions are sums over the pooled ones, for no other position has a gradient: the kernel of the operation
without pooling takes them, and writes dz, pooled, where the result has two readers. The second pass walks cells of ``stride`` x
``stride`` positions: in a cell it is known at compile time which place each position has in each window that reaches it.

Dims: N batch, C channels, H W of x, OH OW of the pooled y, T streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton.language as tl
from fastmerge.kernels.batch_norm.formulas import Norm, empty_like_streams
from fastmerge.kernels.batch_norm.pool_triton import cut, gate_of, patch, window_constants
from fastmerge.kernels.batch_norm.sums_triton import sum_gradients
from fastmerge.kernels.batch_norm.tiles import walkable
from fastmerge.kernels.batch_norm.walk_triton import (
    affine,
    before_activation,
    distances,
    gate_stride,
    gate_vector,
    in_dtypes_of,
    kernel,
    launch,
    multiple,
    per_channel,
    rows_of,
    stream_by_stream,
    stream_of,
    vectors_of,
)
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
        Those gradients in the dtypes of what they belong to, None where not wanted; a list where there are T.
    """
    x, gate = norm.x, norm.gate
    needs_dx, needs_dweight, needs_dbias, needs_dgate = needs
    dy, more = [walkable(t) for t in dy], more and [walkable(t) for t in more]
    apart = distances(dy, more, peak, place, x)
    if apart is None:
        return stream_by_stream(
            lambda t: gradients(
                *(dy[t : t + 1], more and more[t : t + 1], norm.stream(t), peak[t : t + 1], place[t : t + 1]),
                *(training, window, needs),
            ),
            len(x),
        )
    dbias, dweight, dgate, dx = None, None, None, None
    needs_dz = needs_dx and more is not None
    if (training and needs_dx) or needs_dweight or needs_dbias or needs_dgate or needs_dz:
        dbias, dweight, dz, dgate = sum_gradients(
            dy, more, (*apart[:3], 0), norm._replace(x=peak), needs_dz, needs_dgate
        )
        if dz is not None:
            dy, norm = dz, norm._replace(activation="identity", gate=None)
    if needs_dx:
        dx = empty_like_streams(x)
        cells = [-(-(x[0].shape[2 + i] + window[4 + i]) // window[2 + i]) for i in range(2)]
        strides = (dy[0].stride(), place[0].stride(), x[0].stride(), dx[0].stride())
        grid, sizes, constants, warps = cut(x[0], dy[0].shape, cells, False, strides)
        launch(
            unpool_kernel,
            (*grid, len(x)),
            (
                *(dy[0], place[0], x[0], *vectors_of(norm), rows_of(norm.gate)),
                *((dbias, dweight) if training else (None, None)),
                dx[0],
            ),
            distances(dy, place, x, dx),
            (float(x[0].numel() // x[0].shape[1]), norm.eps),
            (*sizes, *[step for own in strides for step in own], gate_stride(norm.gate)),
            {
                "ACTIVATION": norm.activation,
                "TRAINING": training,
                **window_constants(window),
                **constants,
                "GATE_VECTOR": gate_vector(norm.gate, x[0].shape[1]),
            },
            warps,
        )
    return dx, *in_dtypes_of((norm.weight, norm.bias, gate), (dweight, dbias, dgate), needs[1:])

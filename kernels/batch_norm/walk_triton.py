"""What the Triton kernels of BatchNorm share: how a program walks its tiles, and how a launch reaches it.

A launch goes through T streams: tensors of one shape and equal strides, one distance apart in memory. A program's third
index is its stream. Sizes and strides are not specialised on; how much can be loaded at once tell two constants, those of
``tiles.Walk``: LAST, whether channels lie side by side rather than positions, and VECTOR, of which all else is a multiple.

Dims: N batch, C channels, P positions of a sample, T streams.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastmerge.kernels.batch_norm import tiles
from fastmerge.kernels.batch_norm.formulas import Norm, distance_of
from fastmerge.kernels.batch_norm.tiles import MOST_AT_ONCE
from fastmerge.kernels.launch import Look
from torch import Tensor

# Shares and channels that a program which merges shares holds at a time.
MERGE_PARTS, MERGE_C = 256, 8

_TENSORS = ("x", "y", "dy", "more", "dz", "dx", "residual", "place", "peak")
# A kernel for any size and stride; but 1, the distance of what lies side by side, is a constant.
kernel = functools.partial(
    triton.jit,
    do_not_specialize=[
        *("n", "p", "c", "samples", "pixels", "parts_p", "parts", "counters", "gate_stride", "dgate_parts"),
        *("height", "width", "pooled_height", "pooled_width", "high", "wide"),
        *(f"{name}_stride_{dim}" for name in _TENSORS for dim in "tn"),
        *("running_mean_stride", "running_var_stride"),
    ],
    do_not_specialize_on_alignment=[f"{name}_stride_{dim}" for name in _TENSORS for dim in "pchw"],
)


@triton.jit
def multiple(value, VECTOR: tl.constexpr):
    """A number known to be a multiple of VECTOR, in a way that the compiler follows."""
    return value // VECTOR * VECTOR


@triton.jit
def stream_of(ptr, stride_t, VECTOR: tl.constexpr):
    """Where this program's stream begins, in tensors of several; None for None."""
    if ptr is not None:
        ptr += tl.program_id(2) * multiple(stride_t, VECTOR)
    return ptr


@triton.jit
def share(n, p, samples, pixels, parts_p, LAST: tl.constexpr, VECTOR: tl.constexpr, BLOCK_P: tl.constexpr):
    """First and last sample and position of this program's share; beyond 2^31 positions it takes 64 bits."""
    if not LAST:
        p, pixels = multiple(p, VECTOR), multiple(pixels, BLOCK_P)
    part = tl.program_id(0)
    first_n = (part // parts_p) * samples
    first_p = (part % parts_p).to(tl.int64) * pixels
    return first_n, tl.minimum(first_n + samples, n), first_p, tl.minimum(first_p + pixels, p)


@triton.jit
def channels_of(c, LAST: tl.constexpr, VECTOR: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's channels, and how many there are."""
    if LAST:
        c = multiple(c, VECTOR)
    return (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, None, :], c


@triton.jit
def tile(n_, p_, last_n, last_p, channel, c, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    """Sample, position and channel of each element of a tile, and whether the element exists."""
    sample = (n_ + tl.arange(0, BLOCK_N))[:, None, None].to(tl.int64)
    position = (p_ + tl.arange(0, BLOCK_P))[None, :, None].to(tl.int64)
    return sample, position, channel, (sample < last_n) & (position < last_p) & (channel < c)


@triton.jit
def read(ptr, at, stride_n, stride_p, stride_c, LAST: tl.constexpr, VECTOR: tl.constexpr):
    """The elements of a ``tile`` of a tensor, as float32; 0 for those that don't exist."""
    return tl.load(ptr + _offsets(at, stride_n, stride_p, stride_c, LAST, VECTOR), at[3], other=0.0).to(tl.float32)


@triton.jit
def write(ptr, values, at, stride_n, stride_p, stride_c, LAST: tl.constexpr, VECTOR: tl.constexpr):
    """Stores the elements of a ``tile`` in the tensor's dtype."""
    offsets = _offsets(at, stride_n, stride_p, stride_c, LAST, VECTOR)
    tl.store(ptr + offsets, values.to(ptr.dtype.element_ty), at[3])


@triton.jit
def _offsets(at, stride_n, stride_p, stride_c, LAST: tl.constexpr, VECTOR: tl.constexpr):
    """Where the elements of a tile lie in a tensor."""
    sample, position, channel, _ = at
    if LAST:
        stride_p = multiple(stride_p, VECTOR)
    else:
        stride_c = multiple(stride_c, VECTOR)
    return sample * multiple(stride_n, VECTOR) + position * stride_p + channel.to(tl.int64) * stride_c


@triton.jit
def gates_of(gate_ptr, row, last_n, gate_stride, channel, c, GATE_VECTOR: tl.constexpr):
    """The gates of samples, as float32."""
    gate_ptr += tl.program_id(2) * c + channel
    return tl.load(gate_ptr + row * multiple(gate_stride, GATE_VECTOR), (row < last_n) & (channel < c), other=0.0).to(
        tl.float32
    )


@triton.jit
def per_channel(ptr, channel, c, other: tl.constexpr):
    """A stream's part of a vector of T·C, as float32; ``other`` where there is none."""
    if ptr is None:
        values = tl.full(channel.shape, other, tl.float32)
    else:
        values = tl.load(ptr + tl.program_id(2) * c + channel, channel < c, other=other).to(tl.float32)
    return values


@triton.jit
def affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, channel, c, eps):
    """Mean, scale, bias and 1 / std of each channel, rounded alike in every pass."""
    inverse_std = 1 / tl.sqrt(per_channel(var_ptr, channel, c, 1.0) + eps)
    scale = per_channel(weight_ptr, channel, c, 1.0) * inverse_std
    return per_channel(mean_ptr, channel, c, 0.0), scale, per_channel(bias_ptr, channel, c, 0.0), inverse_std


@triton.jit
def sigmoid(h):
    return 1 / (1 + tl.exp(-h))


@triton.jit
def activated(h, ACTIVATION: tl.constexpr):
    """The activation of h; a NaN stays one."""
    if ACTIVATION == "relu":
        h = tl.where(h <= 0, 0.0, h)
    elif ACTIVATION == "relu6":
        h = tl.where(h <= 0, 0.0, tl.where(h >= 6, 6.0, h))
    elif ACTIVATION == "silu":
        h *= sigmoid(h)
    elif ACTIVATION == "hardswish":
        h *= tl.minimum(tl.maximum(h + 3, 0.0), 6.0) / 6
    else:
        tl.static_assert(ACTIVATION == "identity")
    return h


@triton.jit
def before_activation(dy, h, ACTIVATION: tl.constexpr):
    """The gradient with respect to h, from that with respect to its activation, which passes where h is a NaN."""
    if ACTIVATION == "relu":
        dy = tl.where(h <= 0, 0.0, dy)
    elif ACTIVATION == "relu6":
        dy = tl.where((h <= 0) | (h >= 6), 0.0, dy)
    elif ACTIVATION == "silu":
        share = sigmoid(h)
        dy *= share * (1 + h * (1 - share))
    elif ACTIVATION == "hardswish":
        dy = tl.where(h <= -3, 0.0, tl.where(h < 3, dy * (h / 3 + 0.5), dy))
    return dy


@triton.jit
def total_per_channel(values):
    """Sums a tile over samples and positions."""
    return tl.sum(tl.sum(values, 0), 0)[None, None, :]


def distances(*tensors: Sequence[Tensor] | None) -> tuple[int, ...] | None:
    """The distance of the streams of each, 0 where there are none; None where one launch doesn't reach all streams."""
    found = tuple([0 if streams is None else distance_of(streams) for streams in tensors])
    return None if None in found else found  # type: ignore[return-value]


def vector_of(*apart: int) -> int:
    """How many elements can be read at once in every stream, as far as their distances go."""
    return math.gcd(MOST_AT_ONCE, *apart)


def on_meta(look: Look | None) -> Tensor:
    """A tensor that looks so, without memory."""
    assert look is not None
    shape, strides, dtype, *_ = look
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def check_vectors(*vectors: Look | None) -> None:
    """Raises a NotWalkableError unless vectors of T·C are contiguous."""
    for look in vectors:
        if look is not None and look[0][0] > 1 and look[1] != (1,):
            raise tiles.NotWalkableError(f"a vector has strides {look[1]}")


def plain(norm: Norm) -> Norm:
    """The same with copies of the tensors that a launch can't walk through."""
    vectors = [None if vector is None else vector.contiguous() for vector in norm[1:5]]
    residual = None if norm.residual is None else tiles.walkable(norm.residual)
    gate = None if norm.gate is None else norm.gate.contiguous()
    return Norm(tiles.walkable(norm.x), *vectors, residual, gate, norm.eps, norm.activation)


def walk_of(tensors: Sequence[Tensor], gate: GateLike | None, summing: bool, vector: int) -> tiles.Walk:
    """How a pass goes through tensors of which so many elements can be read at once in every stream; see ``tiles.walk``."""
    walk = tiles.walk(tensors, gate is not None and gate.by_sample, summing)
    return walk._replace(vector=math.gcd(walk.vector, vector))


class GateLike(NamedTuple):
    """How the gates lie.

    Attributes:
        by_sample: whether each sample has its own.
        stride: from the gates of one sample to the next one's; 0 if all share theirs.
    """

    by_sample: bool
    stride: int


def gate_like(look: Look | None) -> GateLike | None:
    """Of gates with channels side by side; rows may be slices of longer ones."""
    if look is None:
        return None
    (samples, channels), (stride, step), *_ = look
    if channels > 1 and step != 1:
        raise tiles.NotWalkableError(f"gates have strides {look[1]}")
    return GateLike(samples > 1, stride if samples > 1 else 0)


def gate_vector(gate: GateLike | None, c: int) -> int:
    """What the gates' stride and a stream's channels are multiples of: so many can be read at once."""
    return math.gcd(MOST_AT_ONCE, c, gate_stride(gate))


def gate_stride(gate: GateLike | None) -> int:
    return 0 if gate is None else gate.stride


def stream_by_stream(gradients: Callable[[int], tuple[Any, ...]], count: int) -> tuple[Any, ...]:
    """What ``gradients`` returns for each of streams that lie anyhow, put together: lists of tensors, and tensors of T·C."""
    found = []
    for own in zip(*[gradients(t) for t in range(count)], strict=True):
        if own[0] is None:
            found.append(None)
        elif isinstance(own[0], Tensor):
            found.append(torch.cat(own, -1))
        else:
            found.append([tensor for (tensor,) in own])
    return tuple(found)


def in_dtype_of(tensor: Tensor | None, gradient: Tensor | None, needed: bool) -> Tensor | None:
    """A gradient in the dtype of what it belongs to, None where not needed."""
    if tensor is None or gradient is None or not needed:
        return None
    return gradient if gradient.dtype == tensor.dtype else gradient.to(tensor.dtype)

"""Triton kernels of BatchNorm's backward sums, imported at the first launch. Formulas: ``backward_triton``.

One pass over the tensors leaves the sums of each program's share, a small kernel adds them up.

Dims: N batch, C channels, P positions of a sample, T streams.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastmerge.kernels.batch_norm.formulas import Norm, Room, is_channels_last, room
from fastmerge.kernels.batch_norm.walk_triton import (
    MERGE_C,
    MERGE_PARTS,
    activated,
    affine,
    before_activation,
    channels_of,
    check_vectors,
    gate_like,
    gate_stride,
    gate_vector,
    gates_of,
    kernel,
    on_meta,
    read,
    share,
    stream_of,
    tile,
    total_per_channel,
    walk_of,
    write,
)
from fastmerge.kernels.launch import Launch, Looks, remembered
from torch import Tensor

# What becomes of the gates' gradient in the summing pass.
NO_DGATE, SHARED_DGATE, DGATE_BY_SAMPLE = 0, 1, 2
_SHARED, _BY_SAMPLE = tl.constexpr(SHARED_DGATE), tl.constexpr(DGATE_BY_SAMPLE)


@kernel
def sum_gradients_kernel(
    dy_ptr,
    more_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    residual_ptr,
    gate_ptr,
    dz_ptr,
    dgate_ptr,
    partial_ptr,
    dy_stride_t: tl.int64,
    more_stride_t: tl.int64,
    x_stride_t: tl.int64,
    residual_stride_t: tl.int64,
    dz_stride_t: tl.int64,
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
    dy_stride_n,
    dy_stride_p,
    dy_stride_c,
    more_stride_n,
    more_stride_p,
    more_stride_c,
    residual_stride_n,
    residual_stride_p,
    residual_stride_c,
    dz_stride_n,
    dz_stride_p,
    dz_stride_c,
    gate_stride,
    ACTIVATION: tl.constexpr,
    DGATE: tl.constexpr,
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
    inside_c = channel < c
    stream = tl.program_id(2).to(tl.int64)
    dy_ptr = stream_of(dy_ptr, dy_stride_t, VECTOR)
    x_ptr = stream_of(x_ptr, x_stride_t, VECTOR)
    if more_ptr is not None:
        more_ptr = stream_of(more_ptr, more_stride_t, VECTOR)
    if residual_ptr is not None:
        residual_ptr = stream_of(residual_ptr, residual_stride_t, VECTOR)
    if dz_ptr is not None:
        dz_ptr = stream_of(dz_ptr, dz_stride_t, VECTOR)
    mean, scale, bias, _ = affine(weight_ptr, bias_ptr, mean_ptr, var_ptr, channel, c, eps)

    dbias = tl.zeros((BLOCK_N, BLOCK_P, BLOCK_C), tl.float32)
    dweight = tl.zeros((BLOCK_N, BLOCK_P, BLOCK_C), tl.float32)
    dgate = tl.zeros((BLOCK_N, BLOCK_P, BLOCK_C), tl.float32)
    for n_ in range(first_n, last_n, BLOCK_N):
        row = (n_ + tl.arange(0, BLOCK_N))[:, None, None].to(tl.int64)
        if gate_ptr is not None:
            gate = gates_of(gate_ptr, row, last_n, gate_stride, channel, c, GATE_VECTOR)
        if DGATE == _BY_SAMPLE:
            dgate = tl.zeros((BLOCK_N, BLOCK_P, BLOCK_C), tl.float32)
        for p_ in tl.range(first_p, last_p, BLOCK_P, num_stages=STAGES):
            at = tile(n_, p_, last_n, last_p, channel, c, BLOCK_N, BLOCK_P)
            dz = read(dy_ptr, at, dy_stride_n, dy_stride_p, dy_stride_c, LAST, VECTOR)
            if more_ptr is not None:
                dz += read(more_ptr, at, more_stride_n, more_stride_p, more_stride_c, LAST, VECTOR)
            distance = read(x_ptr, at, x_stride_n, x_stride_p, x_stride_c, LAST, VECTOR) - mean
            h = distance * scale + bias
            if residual_ptr is not None:
                h += read(residual_ptr, at, residual_stride_n, residual_stride_p, residual_stride_c, LAST, VECTOR)
            if DGATE:
                dgate += dz * activated(h, ACTIVATION)
            dz = before_activation(dz, h, ACTIVATION)
            if gate_ptr is not None:
                dz *= gate
            if dz_ptr is not None:
                # What the second pass will read is summed, rounded as it is.
                rounded = dz.to(dz_ptr.dtype.element_ty)
                dz = rounded.to(tl.float32)
                write(dz_ptr, rounded, at, dz_stride_n, dz_stride_p, dz_stride_c, LAST, VECTOR)
            dbias += dz
            dweight += dz * distance
        if DGATE == _BY_SAMPLE:
            into = ((tl.program_id(0) % parts_p).to(tl.int64) * n + row) * tl.num_programs(2) + stream
            tl.store(dgate_ptr + into * c + channel, tl.sum(dgate, 1)[:, None, :], (row < last_n) & inside_c)

    partial_ptr += (stream * tl.num_programs(0) + tl.program_id(0)) * 3 * c + channel
    tl.store(partial_ptr, total_per_channel(dbias), inside_c)
    tl.store(partial_ptr + c, total_per_channel(dweight), inside_c)
    if DGATE == _SHARED:
        tl.store(partial_ptr + 2 * c, total_per_channel(dgate), inside_c)


@kernel
def merge_sums_kernel(
    partial_ptr,
    var_ptr,
    dbias_ptr,
    dweight_ptr,
    dgate_ptr,
    dgate_parts_ptr,
    eps,
    n,
    c,
    parts,
    parts_p,
    DGATE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    if tl.program_id(0) > 0:
        if dgate_parts_ptr is not None:
            _merge_dgate(dgate_parts_ptr, dgate_ptr, n, channel, c, parts_p)
    else:
        _merge_parts(
            partial_ptr, var_ptr, dbias_ptr, dweight_ptr, dgate_ptr, channel, c, parts, eps, DGATE, PARTS, BLOCK_C
        )


@triton.jit
def _merge_dgate(dgate_parts_ptr, dgate_ptr, n, channel, c, parts_p):
    """Adds up the parts of the gates' gradient of this program's sample."""
    sample = tl.program_id(0).to(tl.int64) - 1
    total = tl.zeros(channel.shape, tl.float32)
    for part in range(parts_p):
        row = (n.to(tl.int64) * part + sample) * tl.num_programs(2) + tl.program_id(2)
        total += tl.load(dgate_parts_ptr + row * c + channel, channel < c, other=0.0)
    row = sample * tl.num_programs(2) + tl.program_id(2)
    tl.store(dgate_ptr + row * c + channel, total.to(dgate_ptr.dtype.element_ty), channel < c)


@triton.jit
def _merge_parts(
    partial_ptr,
    var_ptr,
    dbias_ptr,
    dweight_ptr,
    dgate_ptr,
    channel,
    c,
    parts,
    eps,
    DGATE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Adds up what the programs of the summing pass left."""
    inside_c = channel < c
    stream = tl.program_id(2).to(tl.int64)
    partial_ptr += stream * parts * 3 * c + channel
    dbias = tl.zeros((PARTS, BLOCK_C), tl.float32)
    dweight = tl.zeros((PARTS, BLOCK_C), tl.float32)
    dgate = tl.zeros((PARTS, BLOCK_C), tl.float32)
    for start in range(0, parts, PARTS):
        part = (start + tl.arange(0, PARTS))[:, None]
        inside = (part < parts) & inside_c
        row = partial_ptr + part.to(tl.int64) * 3 * c
        dbias += tl.load(row, inside, other=0.0)
        dweight += tl.load(row + c, inside, other=0.0)
        if DGATE == _SHARED:
            dgate += tl.load(row + 2 * c, inside, other=0.0)
    column = stream * c + channel
    std = tl.sqrt(tl.load(var_ptr + column, inside_c, other=1.0).to(tl.float32) + eps)
    tl.store(dbias_ptr + column, tl.sum(dbias, 0)[None, :], inside_c)
    tl.store(dweight_ptr + column, tl.sum(dweight, 0)[None, :] / std, inside_c)
    if DGATE == _SHARED:
        tl.store(dgate_ptr + column, tl.sum(dgate, 0)[None, :].to(dgate_ptr.dtype.element_ty), inside_c)


class Sums(NamedTuple):
    """The launches, the room for dz, how the gates' gradient is summed, and programs along N and P, and along P."""

    sum_gradients: Launch
    merge_sums: Launch
    dz: Room | None
    mode: int
    parts: int
    parts_p: int


@remembered
def plan_sums(
    seen: Looks, streams: int, vector: int, activation: str, eps: float, needs_dz: bool, needs_dgate: bool
) -> Sums:
    """The first pass, and the sum of its parts, for what looks so.

    Args:
        seen: ``looks`` of the ``first_streams``.
        streams: T.
        vector: see ``vector_of``.
        activation, eps: of the forward pass.
        needs_dz: whether to write the gradient before the activation.
        needs_dgate: whether to sum the gates' gradient.

    Raises:
        NotWalkableError: see ``tiles``.
    """
    dy, more, x, *vectors, residual, gates = seen
    check_vectors(*vectors)
    x_, gate = on_meta(x), gate_like(gates)
    n, c = x_.shape[:2]
    by_sample = gate is not None and gate.by_sample
    mode = NO_DGATE if not needs_dgate else DGATE_BY_SAMPLE if by_sample else SHARED_DGATE
    dz = room(x_.shape, is_channels_last(x_), x_.dtype, streams) if needs_dz else None
    written = x_ if dz is None else x_.new_empty_strided(x_.shape, dz.strides)
    tensors = (x_, on_meta(dy), on_meta(more or x), on_meta(residual or x), written)
    walk = walk_of(tensors, gate, summing=True, vector=vector if dz is None else math.gcd(vector, dz.distance))
    cut = walk.tiles
    parts_p = cut.parts_p if mode == DGATE_BY_SAMPLE and cut.parts_p > 1 else 0
    return Sums(
        Launch(
            sum_gradients_kernel,
            (*walk.grid, streams),
            (eps,),
            (*walk.integers, gate_stride(gate)),
            {"ACTIVATION": activation, "DGATE": mode, **walk.constants, "GATE_VECTOR": gate_vector(gate, c)},
        ),
        Launch(
            merge_sums_kernel,
            (1 + n if parts_p else 1, -(-c // MERGE_C), streams),
            (eps,),
            (n, c, cut.parts, cut.parts_p),
            {"DGATE": mode, "PARTS": MERGE_PARTS, "BLOCK_C": MERGE_C},
        ),
        *(dz, mode, cut.parts, parts_p),
    )


def first_streams(dy: Sequence[Tensor], more: Sequence[Tensor] | None, norm: Norm) -> tuple[Tensor | None, ...]:
    """What the first pass reads, of streams the first: dy, more, x, vectors, residual, gates."""
    x, weight, bias, mean, var, residual, gate, *_ = norm
    return dy[0], more and more[0], x[0], weight, bias, mean, var, residual and residual[0], gate


def sum_gradients(
    plan: Sums, dy: Sequence[Tensor], more: Sequence[Tensor] | None, apart: tuple[int, ...], norm: Norm
) -> tuple[Tensor, Tensor, Sequence[Tensor] | None, Tensor | None]:
    """Runs ``plan_sums``.

    Args:
        plan: for what these tensors look like.
        dy: gradients of the T results.
        more: further gradients of them, or None.
        apart: ``distances`` of dy, more, x and residual.
        norm: of the forward pass; or with other tensors in place of ``x``.

    Returns:
        dbias and dweight, float32, shape (T·C,); dz in dtype and layout of ``x``, or None; dgate as the gate is, or None.
    """
    x, gate = norm.x, norm.gate
    first, size = x[0], len(x) * x[0].shape[1]
    dz = None if plan.dz is None else plan.dz.empty(first.device)
    partial = first.new_empty(3 * size * plan.parts, dtype=torch.float32)
    dbias = first.new_empty(size, dtype=torch.float32)
    dweight = first.new_empty(size, dtype=torch.float32)
    dgate = dgate_parts = None
    if plan.mode != NO_DGATE:
        assert gate is not None
        dgate = gate.new_empty(gate.shape)
    if plan.parts_p:
        dgate_parts = first.new_empty(plan.parts_p * first.shape[0] * size, dtype=torch.float32)
    plan.sum_gradients(
        (*first_streams(dy, more, norm), dz and dz[0], dgate if dgate_parts is None else dgate_parts, partial),
        (*apart, plan.dz.distance if plan.dz else 0),
    )
    plan.merge_sums((partial, norm.var, dbias, dweight, dgate, dgate_parts))
    return dbias, dweight, dz, dgate

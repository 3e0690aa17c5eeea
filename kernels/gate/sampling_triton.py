"""Triton kernels of the gate sampling, imported at the first launch. Formula and reference: ``formulas``.

Dims: N batch, C channels, S seeds.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from fastmerge.kernels.gate.formulas import UNIFORM_MARGIN, computing_dtype
from fastmerge.kernels.launch import Launch, Looks, looks, remembered
from torch import Tensor

# One Philox call yields four numbers; a thread turns them into the gates of four consecutive samples.
_QUADS = 4
_SAMPLE_BLOCK_C = 128
# A program of the backward pass sums the gradients of _BACKWARD_STEPS blocks of samples. How the sum is split depends
# on N and the dtype alone, never on the card, so that a gradient is the same bits each time.
_BACKWARD_STEPS = 4
_BACKWARD_BLOCK_N = {torch.float32: 64, torch.float64: 32}
_BACKWARD_BLOCK_C = 32

# The step of the uniform numbers: float32 holds every multiple u of it in [0, 1], and 1 - u, exactly.
_UNIFORM_STEP = tl.constexpr(2.0**-24)

_TRITON_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def _gate(
    bits,
    loc,
    BETA: tl.constexpr,
    GAMMA: tl.constexpr,
    ZETA: tl.constexpr,
    MARGIN: tl.constexpr,
    BELOW_ONE: tl.constexpr,
):
    u = (bits >> 8).to(loc.dtype) * _UNIFORM_STEP
    u = tl.minimum(tl.maximum(u, MARGIN), 1 - MARGIN)
    logit = (tl.log(u / (1 - u)) + loc) / BETA
    y = (ZETA - GAMMA) / (1 + tl.exp(-logit)) + GAMMA
    # Comparisons instead of tl.clamp, which would turn the gates of a NaN loc into numbers.
    z = tl.where(y < 0, 0.0, y)
    # The backward pass takes a saved gate of 1 for a clamped one: an open gate must not be rounded up to it.
    return tl.where(z > BELOW_ONE, tl.where(y < 1, BELOW_ONE, 1.0), z)


@triton.jit
def sample_kernel(
    loc_ptr,
    seed_ptr,
    z_ptr,
    n,
    channels,
    channels_per_seed,
    BETA: tl.constexpr,
    GAMMA: tl.constexpr,
    ZETA: tl.constexpr,
    MARGIN: tl.constexpr,
    BELOW_ONE: tl.constexpr,
    COMPUTE: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    quad = tl.program_id(0) * QUADS + tl.arange(0, QUADS)[:, None]
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = channel < channels
    loc = tl.load(loc_ptr + channel, inside, other=0.0).to(COMPUTE)
    seed = tl.load(seed_ptr + channel // channels_per_seed, inside, other=0)

    # The counter is (channel within its seed, sample // 4): a draw doesn't depend on the block sizes or the grid.
    zero = tl.zeros((QUADS, BLOCK_C), tl.int32)
    counter = zero + channel % channels_per_seed
    bits0, bits1, bits2, bits3 = tl.philox(seed, counter, zero + quad, zero, zero)

    row = 4 * quad.to(tl.int64)
    z_ptr += row * channels + channel
    z0 = _gate(bits0, loc, BETA, GAMMA, ZETA, MARGIN, BELOW_ONE)
    z1 = _gate(bits1, loc, BETA, GAMMA, ZETA, MARGIN, BELOW_ONE)
    z2 = _gate(bits2, loc, BETA, GAMMA, ZETA, MARGIN, BELOW_ONE)
    z3 = _gate(bits3, loc, BETA, GAMMA, ZETA, MARGIN, BELOW_ONE)
    tl.store(z_ptr, z0, inside & (row < n))
    tl.store(z_ptr + channels, z1, inside & (row + 1 < n))
    tl.store(z_ptr + 2 * channels, z2, inside & (row + 2 < n))
    tl.store(z_ptr + 3 * channels, z3, inside & (row + 3 < n))


@triton.jit
def sample_backward_kernel(
    dz_ptr,
    z_ptr,
    dloc_ptr,
    n,
    channels,
    dz_stride_n,
    dz_stride_c,
    BETA: tl.constexpr,
    GAMMA: tl.constexpr,
    ZETA: tl.constexpr,
    COMPUTE: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    part = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_C), COMPUTE)
    for step in tl.static_range(STEPS):
        row = ((part * STEPS + step) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]).to(tl.int64)
        inside = (row < n) & (channel < channels)
        z = tl.load(z_ptr + row * channels + channel, inside, other=0.0).to(COMPUTE)
        dz = tl.load(dz_ptr + row * dz_stride_n + channel.to(tl.int64) * dz_stride_c, inside, other=0.0).to(COMPUTE)
        total += tl.where((z <= 0) | (z >= 1), 0.0, (z - GAMMA) * (ZETA - z) * dz)
    dloc = tl.sum(total, 0)[None, :] * (1 / (BETA * (ZETA - GAMMA)))
    tl.store(dloc_ptr + part.to(tl.int64) * channels + channel, dloc, channel < channels)


def sample_constants(
    loc_dtype: torch.dtype, z_dtype: torch.dtype, beta: float, gamma: float, zeta: float
) -> dict[str, Any]:
    """The constexpr arguments of ``sample_kernel``."""
    return {
        "BETA": beta,
        "GAMMA": gamma,
        "ZETA": zeta,
        "MARGIN": UNIFORM_MARGIN,
        "BELOW_ONE": 1 - torch.finfo(z_dtype).eps / 2,
        "COMPUTE": _TRITON_DTYPES[computing_dtype(loc_dtype)],
        "QUADS": _QUADS,
        "BLOCK_C": _SAMPLE_BLOCK_C,
    }


def sample(loc: Tensor, seed: Tensor, n: int, beta: float, gamma: float, zeta: float, dtype: torch.dtype) -> Tensor:
    """Launches ``sample_kernel``.

    Args:
        loc: shape (C,).
        seed: int64, shape (S,), S a divisor of C: each seed draws for C / S consecutive channels.
        n: number of samples.
        beta, gamma, zeta: constants of the distribution.
        dtype: dtype of the result.

    Returns:
        Gates, shape (n, C).
    """
    loc, seed, z = loc.contiguous(), seed.contiguous(), loc.new_empty((n, loc.shape[0]), dtype=dtype)
    if z.numel() != 0:
        _plan(looks(loc, seed, z), beta, gamma, zeta)((loc, seed, z))
    return z


@remembered
def _plan(seen: Looks, beta: float, gamma: float, zeta: float) -> Launch:
    """The launch for loc, seeds and gates that look so."""
    (_, _, loc_dtype, *_), ((seeds,), *_), ((n, channels), _, z_dtype, *_) = seen  # type: ignore[misc]
    constants = sample_constants(loc_dtype, z_dtype, beta, gamma, zeta)
    grid = (triton.cdiv(n, 4 * constants["QUADS"]), triton.cdiv(channels, constants["BLOCK_C"]), 1)
    return Launch(sample_kernel, grid, (), (n, channels, channels // seeds), constants)


def sample_backward_constants(dtype: torch.dtype, beta: float, gamma: float, zeta: float) -> dict[str, Any]:
    """The constexpr arguments of ``sample_backward_kernel`` for a ``loc`` of this dtype."""
    computing = computing_dtype(dtype)
    return {
        "BETA": beta,
        "GAMMA": gamma,
        "ZETA": zeta,
        "COMPUTE": _TRITON_DTYPES[computing],
        "STEPS": _BACKWARD_STEPS,
        "BLOCK_N": _BACKWARD_BLOCK_N[computing],
        "BLOCK_C": _BACKWARD_BLOCK_C,
    }


def sample_backward(dz: Tensor, z: Tensor, beta: float, gamma: float, zeta: float, dtype: torch.dtype) -> Tensor:
    """Launches ``sample_backward_kernel``.

    Args:
        dz: gradient of the gates, shape (N, C), any strides.
        z: the gates, shape (N, C).
        beta, gamma, zeta: constants of the distribution.
        dtype: dtype of ``loc``, hence of the result.

    Returns:
        Gradient of ``loc``, shape (C,), the same bits each time.
    """
    channels = z.shape[1]
    if z.numel() == 0:
        return z.new_zeros(channels, dtype=dtype)
    z = z.contiguous()
    launch, parts, summed = _backward_plan(looks(dz, z), beta, gamma, zeta, dtype)
    dloc = z.new_empty((parts, channels), dtype=summed)
    launch((dz, z, dloc))
    return dloc[0] if parts == 1 else dloc.sum(0).to(dtype)


@remembered
def _backward_plan(
    seen: Looks, beta: float, gamma: float, zeta: float, dtype: torch.dtype
) -> tuple[Launch, int, torch.dtype]:
    """The launch for a gradient and gates that look so; how many parts of the result it leaves, and in which dtype."""
    (_, strides, *_), ((n, channels), *_) = seen  # type: ignore[misc]
    constants = sample_backward_constants(dtype, beta, gamma, zeta)
    parts = triton.cdiv(n, constants["STEPS"] * constants["BLOCK_N"])
    grid = (parts, triton.cdiv(channels, constants["BLOCK_C"]), 1)
    launch = Launch(sample_backward_kernel, grid, (), (n, channels, *strides), constants)
    # One part is the result already; several are summed at full precision.
    return launch, parts, dtype if parts == 1 else computing_dtype(dtype)

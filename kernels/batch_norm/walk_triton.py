"""What the Triton kernels of BatchNorm share: how a program walks its tiles, and how arguments reach it.

Dims: N batch, C channels, P positions of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

# Shares and channels that a program which merges shares holds at a time.
MERGE_PARTS, MERGE_C = 256, 8


@triton.jit
def share(n, p, samples, pixels, parts_p):
    """First and last sample and position of this program's share; beyond 2^31 positions it takes 64 bits."""
    part = tl.program_id(0)
    first_n = (part // parts_p) * samples
    first_p = (part % parts_p).to(tl.int64) * pixels
    return first_n, tl.minimum(first_n + samples, n), first_p, tl.minimum(first_p + pixels, p)


@triton.jit
def channels_of(BLOCK_C: tl.constexpr):
    return (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, None, :]


@triton.jit
def tile(n_, p_, last_n, last_p, channel, c, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    """Sample and position of each element of a tile, and whether the element exists."""
    sample = (n_ + tl.arange(0, BLOCK_N))[:, None, None].to(tl.int64)
    position = (p_ + tl.arange(0, BLOCK_P))[None, :, None].to(tl.int64)
    return sample, position, (sample < last_n) & (position < last_p) & (channel < c)


@triton.jit
def per_channel(ptr, channel, c, other: tl.constexpr):
    """A vector of C, as float32; ``other`` where there is none."""
    if ptr is None:
        values = tl.full(channel.shape, other, tl.float32)
    else:
        values = tl.load(ptr + channel, channel < c, other=other).to(tl.float32)
    return values


@triton.jit
def total_per_channel(values):
    """Sums a tile over samples and positions."""
    return tl.sum(tl.sum(values, 0), 0)[None, None, :]


def contiguous(*vectors: Tensor | None) -> list[Tensor | None]:
    """Vectors of C, as kernels read them."""
    return [None if vector is None else vector.contiguous() for vector in vectors]


def in_dtypes_of(
    tensors: Sequence[Tensor | None], gradients: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients in the dtypes of what they belong to, None where not needed."""
    return [
        g.to(t.dtype) if need and g is not None and t is not None else None
        for t, g, need in zip(tensors, gradients, needs, strict=True)
    ]


def rows_of(gate: Tensor | None) -> Tensor | None:
    """The gates with channels side by side; rows may be slices of longer ones."""
    return gate if gate is None or gate.stride(1) == 1 else gate.contiguous()


def gate_stride(gate: Tensor | None) -> int:
    """From the gates of one sample to the next one's; 0 if all samples share theirs."""
    if gate is None or gate.shape[0] == 1:
        return 0
    return gate.stride(0) if gate.stride(1) == 1 else gate.shape[1]

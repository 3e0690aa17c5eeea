"""The plan of a compaction in place: what stays of a tensor moves, in the order of memory, to the front of its storage.

With the kept indices of every dimension sorted, the element that is to lie at place k comes from ``source(k) >= k``, and
``source`` grows with k. So places [a, b) can be filled in any order, on as many processors as there are, once either

    b <= source(a)      (a direct pass: all that is read lies behind all that is written), or
    their elements were gathered into scratch memory first (two launches of bounded size).

Direct passes get longer as the gap grows, which is the sum of all that was dropped before: of a tensor that loses half,
scratch memory sees the first few MiB alone. Memory beside the tensor: the scratch, and two tables of offsets, of which one
has an entry per position of the outer dimensions and the other one per position of the inner dimensions.

Dims: 1 to 5 of any size and any stride, so long as elements don't overlap; itemsizes of 1, 2, 4, 8 and 16 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


@dataclass(frozen=True)
class Plan:
    """Where each word of the compacted tensor comes from: ``outer[k // row] + inner[k % row // run] + k % run``.

    Attributes:
        word: integer dtype of the words in which memory is moved, as wide as sizes and strides allow.
        total: words that stay.
        row: words per entry of ``outer``.
        run: words that lie side by side before and after.
        outer: int64 (total / row,), ascending, on the CPU.
        inner: int64 (row / run,), ascending, on the CPU.
        extent: words of memory that the tensor spans.
    """

    word: torch.dtype
    total: int
    row: int
    run: int
    outer: Tensor
    inner: Tensor
    extent: int

    def source(self, place: int) -> int:
        """Where the word for a place lies before."""
        outer, rest = divmod(place, self.row)
        inner, within = divmod(rest, self.run)
        return int(self.outer[outer]) + int(self.inner[inner]) + within

    def passes(self, scratch_words: int) -> Iterator[tuple[int, int, bool]]:
        """Yields (first, last, direct): places to fill one range after another, directly or through scratch memory."""
        first = 0
        while first < self.total:
            gap = self.source(first) - first
            direct = gap >= min(scratch_words, self.total - first)
            last = min(self.total, first + (gap if direct else scratch_words))
            yield first, last, direct
            first = last


def memory_order(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """The dimensions as they lie in memory, the outermost first; those of size 1, which lie nowhere, last."""
    return sorted(range(len(shape)), key=lambda d: (shape[d] == 1, -strides[d]))


def make_plan(tensor: Tensor, keeps: Sequence[Tensor | None]) -> Plan:
    """Plans the compaction of a tensor.

    Args:
        tensor: any strided tensor whose elements don't overlap.
        keeps: per dimension the int64 indices that stay, ascending and unique, on the CPU; None keeps all.
    """
    itemsize, shape = tensor.element_size(), tensor.shape
    order = [d for d in memory_order(shape, tensor.stride()) if shape[d] != 1]
    kept = math.prod(shape[d] if (k := keeps[d]) is None else len(k) for d in range(len(shape)))
    run = itemsize
    while order and keeps[order[-1]] is None and tensor.stride(order[-1]) * itemsize == run:
        run *= shape[order.pop()]
    strides = {d: tensor.stride(d) * itemsize for d in order}
    width = next(width for width in _WORDS if not any(length % width for length in (run, *strides.values())))
    axes = [
        (torch.arange(shape[d], device="cpu") if (k := keeps[d]) is None else k) * (strides[d] // width) for d in order
    ]
    # The split that leaves the smaller tables.
    outer_axes = min(range(len(axes) + 1), key=lambda n: _count(axes[:n]) + _count(axes[n:]))
    outer, inner = _sums(axes[:outer_axes]), _sums(axes[outer_axes:])
    run //= width
    extent = (sum((shape[d] - 1) * strides[d] for d in order) // width + run) if kept else 0
    return Plan(_WORDS[width], kept * itemsize // width, len(inner) * run, run, outer, inner, extent)


def _count(axes: Sequence[Tensor]) -> int:
    return math.prod(len(axis) for axis in axes)


def _sums(axes: Sequence[Tensor]) -> Tensor:
    """All sums of one entry of each axis, the last axis moving fastest."""
    total = torch.zeros(1, dtype=torch.int64, device="cpu")
    for axis in axes:
        total = (total[:, None] + axis).flatten()
    return total

"""How one tensor of the student is cut from those of the big student, as a copy or in their own memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmerge.compaction import compact_, dense_strides, is_compactable, set_data
from fastmerge.kernels.compact import memory_order

SCRATCH_ELEMENTS = 1 << 18


class Cut:
    """Makes a tensor of the student from one or more tensors of the big student."""

    def copy(self, sources: Sequence[Tensor]) -> Tensor:
        """A new tensor; the sources stay as they are."""
        raise NotImplementedError

    def take(self, sources: Sequence[Tensor]) -> Tensor:
        """As :meth:`copy`, but the sources' memory is used up: it becomes the result's or is given back.

        Sources whose memory others use too (a view of them is alive, one tensor is the source of several) are left as they are.
        """
        result = self.copy(sources)
        for source in sources:
            discard(source)
        return result


class Whole(Cut):
    """One tensor as it is."""

    def copy(self, sources: Sequence[Tensor]) -> Tensor:
        (source,) = sources
        return source.detach().clone()

    def take(self, sources: Sequence[Tensor]) -> Tensor:
        (source,) = sources
        return source.detach() if is_compactable(source) else source.detach().clone()


@dataclass(frozen=True)
class Part(Cut):
    """Entries of one tensor along dimension 0 that lie together.

    Attributes:
        start: the first.
        length: how many; None for the first alone, without the dimension.
    """

    start: int
    length: int | None = None

    def copy(self, sources: Sequence[Tensor]) -> Tensor:
        source = sources[0].detach()
        return (source[self.start] if self.length is None else source.narrow(0, self.start, self.length)).clone()


@dataclass(frozen=True)
class OneTeachers(Cut):
    """The tensor of one teacher.

    Attributes:
        teacher: which.
    """

    teacher: int

    def copy(self, sources: Sequence[Tensor]) -> Tensor:
        return sources[self.teacher].detach().clone()


@dataclass(frozen=True)
class WeightedMean(Cut):
    """The mean of the teachers' tensors.

    Attributes:
        shares: float64 (T,), of each teacher, 1 in all.
    """

    shares: Tensor

    def copy(self, sources: Sequence[Tensor]) -> Tensor:
        parts = [source.detach() * share for source, share in zip(sources, self.shares.tolist(), strict=True)]
        return torch.stack(parts).sum(0)


@dataclass(frozen=True)
class Sums:
    """Entries that are the sum of all teachers'.

    Attributes:
        dim: along which dimension, 0 or 1.
        entries: int64 (k,), positions in the result.
        sources: int64 (T, k), positions in the source.
    """

    dim: int
    entries: Tensor
    sources: Tensor

    def of(self, source: Tensor) -> Tensor:
        """The sums, a new tensor with k entries along the dimension."""
        return torch.stack([_select(source, self.dim, positions) for positions in self.sources]).sum(0)


@dataclass(frozen=True)
class Selection(Cut):
    """Rows and columns of one tensor.

    Attributes:
        rows: int64, which entries along dimension 0 there are in the result, in its order; None for all.
        columns: likewise along dimension 1.
        sums: entries to take the sum of, if any.
    """

    rows: Tensor | None
    columns: Tensor | None = None
    sums: Sums | None = None

    def copy(self, sources: Sequence[Tensor]) -> Tensor:
        result = source = sources[0].detach()
        totals = None if self.sums is None else self.sums.of(source)
        for dim, index in ((0, self.rows), (1, self.columns)):
            if index is not None:
                result = _select(result, dim, index) if result is source else _narrow(result, dim, index)
                if totals is not None and self.sums is not None and dim != self.sums.dim:
                    totals = _select(totals, dim, index)
        if totals is not None and self.sums is not None:
            result.index_copy_(self.sums.dim, self.sums.entries.to(result.device), totals)
        return result

    def take(self, sources: Sequence[Tensor]) -> Tensor:
        (source,) = sources
        if not is_compactable(source):
            return self.copy(sources)
        if self.sums is not None:
            index = self.rows if self.sums.dim == 0 else self.columns
            assert index is not None
            totals = self.sums.of(source.detach())
            source.detach().index_copy_(self.sums.dim, index[self.sums.entries].to(source.device), totals)
            del totals
        rows = torch.arange(source.shape[0], device="cpu") if self.rows is None else self.rows.sort().values
        compact_(source, rows, None if self.columns is None else self.columns.sort().values)
        return _reordered(source, self.rows, self.columns)


@dataclass(frozen=True)
class BlockSelection(Cut):
    """Rows and columns of a block-diagonal weight of which the blocks alone are stored, zeros elsewhere.

    Attributes:
        rows: int64 (T, rows), where each row of the result lies in each teacher's block.
        row_teacher: int64 (rows,), in which teacher's block it is looked up; -1 for all of them.
        columns: int64 (T, columns), which column of each teacher's block each of the result's is.
        column_teacher: int64 (columns,), as for rows.
    """

    rows: Tensor
    row_teacher: Tensor
    columns: Tensor
    column_teacher: Tensor

    def copy(self, sources: Sequence[Tensor]) -> Tensor:
        source = sources[0].detach()
        shape = (self.rows.shape[1], self.columns.shape[1], *source.shape[2:])
        result = source.new_empty_strided(shape, dense_strides(source, shape)).zero_()
        for t, columns in enumerate(self.columns):
            r = ((self.row_teacher == t) | (self.row_teacher < 0)).nonzero().flatten()
            c = self._columns_of(t)
            block = _select(_select(source, 0, self.rows[t, r]), 1, columns[c])
            result[r.to(source.device)[:, None], c.to(source.device)[None, :]] = block
        return result

    def take(self, sources: Sequence[Tensor]) -> Tensor:
        (source,) = sources
        fits = source.shape[1] == self.columns.shape[1] and bool((self.row_teacher >= 0).all())
        if not fits or not is_compactable(source):
            return super().take(sources)
        rows = self.rows[self.row_teacher, torch.arange(len(self.row_teacher), device="cpu")]
        compact_(source, rows.sort().values)
        teachers = self.row_teacher[rows.argsort()]
        step = max(1, SCRATCH_ELEMENTS // max(1, source[:1].numel()))
        for part, teacher in zip(source.detach().split(step), teachers.split(step), strict=True):
            cut = torch.zeros_like(part)
            for t in teacher.unique().tolist():
                r, c = (teacher == t).nonzero().flatten().to(source.device), self._columns_of(t)
                cut[r[:, None], c.to(source.device)[None, :]] = _select(_select(part, 0, r), 1, self.columns[t, c])
            part.copy_(cut)
        return _reordered(source, rows, None)

    def _columns_of(self, teacher: int) -> Tensor:
        return ((self.column_teacher == teacher) | (self.column_teacher < 0)).nonzero().flatten()


@dataclass(frozen=True)
class Joined(Cut):
    """Entries along one dimension of the teachers' own tensors.

    Attributes:
        index: int64, positions in the concatenation of the sources.
        dim: which dimension.
    """

    index: Tensor
    dim: int

    def copy(self, sources: Sequence[Tensor]) -> Tensor:
        return _select(torch.cat([source.detach() for source in sources], dim=self.dim), self.dim, self.index)


def discard(tensor: Tensor) -> None:
    """Gives a tensor's memory back where nothing else uses it."""
    if is_compactable(tensor):
        set_data(tensor, tensor.new_empty(0))


def _reordered(source: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """A compacted tensor with its entries in the order they were asked for rather than ascending."""
    result = source.detach()
    for dim, index in ((0, rows), (1, columns)):
        if index is not None and not _ascends(index):
            result = _select(result, dim, index.argsort().argsort())
    if result.data_ptr() != source.data_ptr():
        set_data(source, source.new_empty(0))
    return result


def _ascends(index: Tensor) -> bool:
    return bool((index.diff() > 0).all())


def _select(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """The given indices along a dimension, as a new tensor in the same memory format."""
    order = memory_order(tensor.shape, tensor.stride())
    selected = tensor.permute(order).index_select(order.index(dim), index.to(tensor.device))
    shape = [len(index) if d == dim else size for d, size in enumerate(tensor.shape)]
    return selected.as_strided(shape, dense_strides(tensor, shape))


def _narrow(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """As :func:`_select` of a tensor that is no longer needed: in its own memory where the indices ascend."""
    if dim > 1 or not _ascends(index) or not is_compactable(tensor):
        return _select(tensor, dim, index)
    every = torch.arange(tensor.shape[0], device="cpu")
    compact_(tensor, *((index, None) if dim == 0 else (every, index)))
    return tensor

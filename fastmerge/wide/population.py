"""How many channels of each group there are: the candidates left, where they lie in tensors, and how many a student has."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastmerge.channels.aten import LAYER_NORMS, op_name
from fastmerge.channels.groups import AxisUnits, ChannelGroups
from fastmerge.channels.written_layers import BY_WIDTH
from fastmerge.gates import HardConcrete
from fastmerge.problems import Problem, UnmergeableError
from fastmerge.wide.analysis import Analysis


class Population:
    """Which candidates are left.

    Args:
        groups: the channel groups.
        num_teachers: T.
        left: int64 ascending candidates t·n + j by name of the group; all T·n of a group that is not there.
        open_groups: names of groups all of whose gates are 1 for good, so that nothing need be multiplied by them.
        widths: channels of the student by name of the group; None: as many as a teacher has.
    """

    def __init__(
        self,
        groups: ChannelGroups,
        num_teachers: int,
        left: Mapping[str, Tensor],
        open_groups: Collection[str] = (),
        widths: Mapping[str, int] | None = None,
    ) -> None:
        self.groups, self.num_teachers, self.open_groups = groups, num_teachers, frozenset(open_groups)
        every = {group.name: torch.arange(num_teachers * group.size, device="cpu") for group in groups}
        self.candidates: dict[str, Tensor] = {name: left.get(name, all_of).cpu() for name, all_of in every.items()}
        self._rank = torch.cat([_rank(self.candidates[name], len(all_of)) for name, all_of in every.items()])
        self._sizes = torch.tensor([group.size for group in groups], device="cpu")
        self._kept = torch.tensor(
            [(widths or {}).get(group.name, group.size) / group.size for group in groups],
            dtype=torch.float64,
            device="cpu",
        )
        self._first, self._first_column = _starts(every), _starts(self.candidates)

    @classmethod
    def of(
        cls, groups: ChannelGroups, num_teachers: int, gates: nn.ModuleDict, widths: Mapping[str, int]
    ) -> Population:
        """As the gates know it."""
        left, open_groups = {}, set()
        for name, gate in gates.items():
            assert isinstance(gate, HardConcrete)
            if gate.candidates is not None:
                left[name] = gate.candidates
            if gate.fixed and bool((gate.loc > 0).all()):
                open_groups.add(name)
        return cls(groups, num_teachers, left, open_groups, widths)

    def is_open(self, units: AxisUnits) -> bool:
        """Whether all groups along a dimension, if any, have gates that are 1 for good."""
        return all(self.groups[number].name in self.open_groups for number in units.numbers)

    @property
    def total(self) -> int:
        """How many candidates are left in all groups together."""
        return int(self._first_column[-1])

    def kept(self, units: AxisUnits) -> float:
        """How many of all teachers' entries of a dimension are open where each teacher's sees all others': the student's.

        Where the student has fewer than a teacher, it is a teacher's.
        """
        group = torch.from_numpy(units.group)
        student = torch.where(group >= 0, self._kept[group.clamp(min=0)], 1.0).sum().item()
        return max(student, float(len(group)))

    def rank(self, units: AxisUnits) -> Tensor:
        """Per teacher and entry of a dimension its candidate's place among those left: int64 (T, entries).

        -1 where the candidate was dropped, 0 for entries without a group.
        """
        group, place = torch.from_numpy(units.group), torch.from_numpy(units.place)
        number = group.clamp(min=0)
        candidate = torch.arange(self.num_teachers, device="cpu")[:, None] * self._sizes[number] + place
        return torch.where(group >= 0, self._rank[self._first[number] + candidate], 0)

    def is_left(self, units: AxisUnits) -> Tensor:
        """Per teacher and entry of a dimension whether it is still there: bool (T, entries)."""
        return self.rank(units) >= 0

    def joined(self, units: AxisUnits) -> Tensor:
        """Where each teacher's entries lie when all are in one tensor, teacher by teacher: int64 (T, entries)."""
        left = self.is_left(units)
        return torch.where(left, left.flatten().cumsum(0).view(left.shape) - 1, -1)

    def in_stream(self, units: AxisUnits) -> Tensor:
        """Where each teacher's entries lie in its own stream: int64 (T, entries)."""
        left = self.is_left(units)
        return torch.where(left, left.cumsum(1) - 1, -1)

    def gate_columns(self, units: AxisUnits) -> list[Tensor]:
        """Which column of the gate matrix multiplies each channel of each stream: int64 (channels left,) per teacher.

        The matrix holds the groups one after another, each its candidates that are left, then a column of ones.
        """
        group = torch.from_numpy(units.group)
        rank = self.rank(units)
        columns = torch.where(group >= 0, self._first_column[group.clamp(min=0)] + rank, self.total)
        return [row[left] for row, left in zip(columns, rank >= 0, strict=True)]


def _starts(numbers: Mapping[str, Tensor]) -> Tensor:
    """Where each group's begin when they stand one after another, and where the last end: int64 (G + 1,)."""
    return torch.tensor([0, *map(len, numbers.values())], device="cpu").cumsum(0)


def _rank(candidates: Tensor, count: int) -> Tensor:
    rank = torch.full((count,), -1, device="cpu")
    rank[candidates] = torch.arange(len(candidates), device="cpu")
    return rank


LEAST = 0.25  # of a teacher's channels, up to all teachers' together

Keep = float | Mapping[str, float] | None


def student_widths(groups: ChannelGroups, num_teachers: int, keep: Keep) -> dict[str, int]:
    """Channels of each group that the student has.

    Args:
        groups: n channels each.
        num_teachers: T.
        keep: of a teacher's channels, as a fraction of n in 1/4..T or, as a whole number above T, their number; of all
            groups of more than one channel, or by name of the group; None: n.

    Raises:
        ValueError: a name is no group's, or a number is out of range.
    """
    if isinstance(keep, Mapping):
        unknown = [name for name in keep if name not in groups.names]
        if unknown:
            raise ValueError(
                f"keep needs names of channel groups; got {unknown[0]!r}, known are {', '.join(groups.names)}"
            )
        return {g.name: _width(g.name, g.size, num_teachers, keep.get(g.name, 1.0)) for g in groups}
    return {
        g.name: g.size if g.size == 1 else _width(g.name, g.size, num_teachers, 1.0 if keep is None else keep)
        for g in groups
    }


def _width(name: str, size: int, num_teachers: int, value: Any) -> int:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    is_count = fits and isinstance(value, int) and value > num_teachers
    if not fits or not LEAST <= (value / size if is_count else value) <= num_teachers:
        raise ValueError(
            f"keep needs a fraction of a teacher's channels, {LEAST:g}..{num_teachers}, or a whole number of channels above "
            f"{num_teachers}; group '{name}' has {size}, so {math.ceil(LEAST * size)}..{num_teachers * size}; got {value!r}"
        )
    return int(value) if is_count else max(1, round(value * size))


def check_widths(
    analysis: Analysis, population: Population, widths: Mapping[str, int], whole: Mapping[int, str]
) -> None:
    """Checks that the network's code takes other numbers of channels.

    Args:
        analysis: of the first teacher.
        population: whose candidates the student keeps some of.
        widths: by name of the group.
        whole: groups whose number of channels the code may count on, and why.

    Raises:
        ValueError: naming the group, and what counts on its channels.
    """
    groups, why = analysis.groups, dict(whole)

    def keeps_all(units: AxisUnits) -> bool:
        """Then the same gates stand for all teachers apart and for the student."""
        return population.kept(units) == population.num_teachers * len(units.group)

    for (mode, name), units in groups.reads.items():
        node = next(n for n in analysis.traced.graphs[mode].nodes if n.name == name)
        call = analysis.calls[mode].get(node)
        computed = call is not None and (call.rows is not None or call.is_tied)
        for number in units.numbers:
            if computed or node.meta.get(BY_WIDTH):
                kind = f"'{op_name(node)}'" if call is None else f"'{call.name}', whose weight is shared or computed"
                why.setdefault(number, f"is read by {kind}, which depends on the number of channels")
            elif op_name(node) in LAYER_NORMS and keeps_all(units):
                kind = f"'{op_name(node)}', which is exact only with fewer channels than all teachers have together"
                why.setdefault(number, f"is read by {kind}")
    for axis in groups.axes():
        for number in axis.units.numbers:
            if groups.acts_on_several(axis.tensor) and keeps_all(axis.units):
                why.setdefault(
                    number,
                    f"shares '{axis.tensor}', which is exact only with fewer channels than all teachers have together",
                )
            elif not _lies_in_runs(axis.units, number, groups[number].size):
                why.setdefault(
                    number, f"lies in '{axis.tensor}' in an order that another number of channels does not have"
                )
    for number, group in enumerate(groups):
        if widths[group.name] != group.size and number in why:
            width = f"{widths[group.name]} channels in place of {group.size}"
            what = f"keep can't give group '{group.name}' {width}: it {why[number]}"
            raise UnmergeableError(Problem(what, "leave it out: keep={name: width} for the others"))


def runs(units: AxisUnits) -> Iterator[tuple[int, int, int]]:
    """Pieces of a dimension as (group's number, start, end), within which places ascend; -1 and -2 where there is no group."""
    group, place = units.group, units.place
    breaks = np.flatnonzero((group[1:] != group[:-1]) | ((group[1:] >= 0) & (place[1:] < place[:-1]))) + 1
    edges = [0, *breaks.tolist(), len(group)]
    for start, end in pairwise(edges):
        if end > start:
            yield int(group[start]), start, end


def _lies_in_runs(units: AxisUnits, number: int, size: int) -> bool:
    """Whether a group's places lie in order, equally many entries of each, once or several times over."""
    for found, start, end in runs(units):
        entries = (end - start) // size
        if found == number and not np.array_equal(units.place[start:end], np.repeat(np.arange(size), max(entries, 1))):
            return False
    return True

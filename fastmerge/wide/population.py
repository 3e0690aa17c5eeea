"""The candidates that are left of each channel group, and where they lie in the tensors of the big student."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from fastmerge.channels.groups import AxisUnits, ChannelGroups
from fastmerge.gates import HardConcrete


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
        every = {group.name: torch.arange(num_teachers * group.size) for group in groups}
        self.candidates: dict[str, Tensor] = {name: left.get(name, all_of).cpu() for name, all_of in every.items()}
        self._rank = torch.cat([_rank(self.candidates[name], len(all_of)) for name, all_of in every.items()])
        self._sizes = torch.tensor([group.size for group in groups])
        self._kept = torch.tensor(
            [(widths or {}).get(group.name, group.size) / group.size for group in groups]
        ).double()
        self._first = torch.tensor([0, *(len(all_of) for all_of in every.values())]).cumsum(0)
        self._first_column = torch.tensor([0, *(len(left) for left in self.candidates.values())]).cumsum(0)

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
        candidate = torch.arange(self.num_teachers)[:, None] * self._sizes[number] + place
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


def _rank(candidates: Tensor, count: int) -> Tensor:
    rank = torch.full((count,), -1)
    rank[candidates] = torch.arange(len(candidates))
    return rank

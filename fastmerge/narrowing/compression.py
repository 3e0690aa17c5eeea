"""From the big student to one teacher's size: every tensor cut down to the candidates that are kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastmerge.channels.groups import AxisUnits, ChannelGroups
from fastmerge.narrowing.cuts import (
    BlockSelection,
    Cut,
    Joined,
    OneTeachers,
    Part,
    Selection,
    Sums,
    WeightedMean,
    Whole,
)
from fastmerge.wide.layers import WideLayer
from fastmerge.wide.network import Layout
from fastmerge.wide.population import Population
from fastmerge.wide.widths import runs


@dataclass(frozen=True)
class Sources:
    """For each index along a student's dimension, where it comes from.

    Attributes:
        teacher: int64, which teacher.
        index: int64, the index along that teacher's dimension.
        common: bool, whether every teacher has it (network input) instead of one.
    """

    teacher: Tensor
    index: Tensor
    common: Tensor

    @property
    def owner(self) -> Tensor:
        """The teacher, or -1 for all."""
        return torch.where(self.common, -1, self.teacher)


def sources_of(units: AxisUnits, groups: ChannelGroups, kept: Mapping[str, Tensor]) -> Sources:
    """Fills each place of a dimension with the indices of the candidate that was kept for it, in order.

    Where other numbers of candidates are kept than a teacher has channels, the dimension is that much shorter or longer; there
    the places lie in order (``wide.widths``).
    """
    group, index, resized = torch.from_numpy(units.group), torch.arange(len(units.group)), {}
    teacher = torch.zeros_like(index)
    for number in units.numbers:
        size, candidates = groups[number].size, kept[groups[number].name].cpu()
        if len(candidates) != size:
            resized[number] = size, candidates
            continue
        by_place = torch.from_numpy(units.places(number, size))
        teacher[by_place] = (candidates // size)[:, None]
        index[by_place] = by_place[candidates % size]
    if not resized:
        return Sources(teacher, index, group < 0)
    parts = []
    for number, start, end in runs(units):
        if number in resized:
            size, candidates = resized[number]
            chosen = torch.arange(start, end).view(size, -1)[candidates % size]
            owner = (candidates // size)[:, None].expand_as(chosen)
            parts.append((owner.flatten(), chosen.flatten(), torch.zeros(chosen.numel(), dtype=torch.bool)))
        else:
            parts.append((teacher[start:end], index[start:end], group[start:end] < 0))
    return Sources(*(torch.cat(each) for each in zip(*parts, strict=True)))


class Compressor:
    """Cuts the tensors of a wide network down to the kept channels.

    Args:
        network: the wide modules.
        layout: where the teachers' tensors lie in it.
        kept: per group the candidates to keep.
        population: those that are left in the network.

    Attributes:
        sources: per parameter or buffer of the student, the wide tensors it is cut from.
        magnitudes: per magnitude of a normalised weight, the norm of what was cut, the weight and its norms' dimension.
    """

    def __init__(self, network: nn.Module, layout: Layout, kept: Mapping[str, Tensor], population: Population) -> None:
        self.groups, self.kept, self.population = population.groups, kept, population
        self.sources: dict[str, list[Tensor]] = {}
        self.magnitudes = layout.magnitudes
        self._cuts: dict[str, Cut] = {}
        tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        for weight, path in layout.layers.items():
            wide = network.get_submodule(path)
            assert isinstance(wide, WideLayer)
            self.sources[weight], self._cuts[weight] = [wide.weight], self._weight(wide, weight)
            if wide.bias is not None:
                bias = layout.biases[weight]
                self.sources[bias], self._cuts[bias] = [wide.bias], self._bias(wide, weight)
        for name, place in layout.side_by_side.items():
            self.sources[name], self._cuts[name] = [tensors[place]], self._side_by_side(name)
        for name, place in layout.averaged.items():
            self.sources[name], self._cuts[name] = [tensors[place]], Whole()
        for name, places in layout.per_teacher.items():
            self.sources[name] = [tensors[place] for place in places]
            self._cuts[name] = self._per_teacher(name, self.sources[name])
        uses = Counter(id(tensor) for sources in self.sources.values() for tensor in sources)
        self._alone = {name: all(uses[id(t)] == 1 for t in sources) for name, sources in self.sources.items()}

    def cut_all(self, in_place: bool) -> dict[str, Tensor]:
        """The student's parameters and buffers by name, one after another in their sources' memory if ``in_place``."""
        tensors = {name: self.cut(name, sources, in_place) for name, sources in self.sources.items()}
        for magnitude, (weight, dim) in self.magnitudes.items():
            tensors[magnitude] = torch.norm_except_dim(tensors[weight], 2, dim)
            # where all is zero any direction will do, but none of length zero
            tensors[weight] += tensors[magnitude] == 0
        return tensors

    def cut(self, name: str, sources: Sequence[Tensor], in_place: bool) -> Tensor:
        """A parameter or buffer of the student, or what an optimizer keeps for each of its elements.

        Args:
            name: of the parameter or buffer.
            sources: its :attr:`sources`, or tensors that belong to them, of the same shapes.
            in_place: whether their memory is used up.
        """
        cut = self._cuts[name]
        return cut.take(sources) if in_place and self._alone[name] else cut.copy(sources)

    def _weight(self, wide: WideLayer, name: str) -> Cut:
        geometry, wiring = wide.geometry, wide.wiring
        outputs, inputs = self.groups.outputs[name], self.groups.inputs[name]
        rows, columns = (sources_of(units, self.groups, self.kept) for units in (outputs, inputs))
        if wiring.has_off_diagonal and not wide.linked:
            swapped = geometry.out_dim != 0
            first, second = (columns, rows) if swapped else (rows, columns)
            along_first, along_second = (inputs, outputs) if swapped else (outputs, inputs)
            lie = self.population.joined(along_first), self.population.in_stream(along_second)
            return BlockSelection(lie[0][:, first.index], first.owner, lie[1][:, second.index], second.owner)
        selected: dict[int, Tensor] = {}
        if wiring.writes_streams:
            selected[geometry.out_dim] = self._positions(outputs, rows)
        if not wiring.reads_streams:
            return Selection(selected.get(0), selected.get(1)) if selected else Whole()
        selected[geometry.in_dim] = self._positions(inputs, columns)
        summed = columns.common.nonzero().flatten()
        every = self.population.joined(inputs)[:, columns.index[summed]]
        return Selection(
            selected.get(0), selected.get(1), Sums(geometry.in_dim, summed, every) if len(summed) else None
        )

    def _positions(self, units: AxisUnits, sources: Sources) -> Tensor:
        """Where a student's entries lie in a tensor of all teachers'."""
        return self.population.joined(units)[sources.teacher, sources.index]

    def _bias(self, wide: WideLayer, weight: str) -> Cut:
        if not wide.wiring.writes_streams:
            return Whole()
        units = self.groups.outputs[weight]
        return Selection(self._positions(units, sources_of(units, self.groups, self.kept)))

    def _side_by_side(self, name: str) -> Cut:
        """From the teachers' tensors along the first dimension."""
        if name not in self.groups.tensors:  # a counter of each teacher
            return Part(0)
        dim, units = self.groups.tensors[name]
        sources, size = sources_of(units, self.groups, self.kept), len(units.group)
        if dim is None:
            return Part(int(sources.teacher[0]) * size, size)
        assert dim == 0, name
        return Selection(self._positions(units, sources))

    def _per_teacher(self, name: str, parts: Sequence[Tensor]) -> Cut:
        if name not in self.groups.tensors:  # a counter, the same for all
            assert not parts[0].is_floating_point(), name
            return OneTeachers(0)
        dim, units = self.groups.tensors[name]
        sources = sources_of(units, self.groups, self.kept)
        if self.groups.acts_on_several(name):
            counts = torch.bincount(sources.teacher, minlength=len(parts))
            return WeightedMean(counts.double() / len(sources.teacher))
        if dim is None:
            return OneTeachers(int(sources.teacher[0]))
        return Joined(self._positions(units, sources), dim)

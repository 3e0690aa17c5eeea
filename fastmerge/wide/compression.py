"""From the big student to one teacher's size: which candidates to keep, and every tensor cut down to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fastmerge.channels.groups import AxisUnits, ChannelGroups
from fastmerge.compaction import compact_
from fastmerge.gates import HardConcrete
from fastmerge.wide.layers import WideLayer
from fastmerge.wide.network import Layout


def kept_candidates(groups: ChannelGroups, gates: nn.ModuleDict) -> dict[str, Tensor]:
    """Per group the n candidates whose gates are the most open, ascending; ties go to the lower index.

    Returns:
        int64 (n,) per group name; candidate t·n + j is channel j of teacher t.
    """
    kept = {}
    for group in groups:
        gate = gates[group.name]
        assert isinstance(gate, HardConcrete)
        order = torch.sort(gate.loc.detach(), descending=True, stable=True).indices
        kept[group.name] = order[: group.size].sort().values
    return kept


@dataclass(frozen=True)
class _Sources:
    """For each index along a student's dimension, where it comes from.

    Attributes:
        teacher: int64, which teacher.
        index: int64, the index along that teacher's dimension.
        common: bool, whether every teacher has it (network input) instead of one.
    """

    teacher: Tensor
    index: Tensor
    common: Tensor


def _sources(units: AxisUnits, groups: ChannelGroups, kept: Mapping[str, Tensor]) -> _Sources:
    """Fills each place of a dimension with the indices of the candidate that was kept for it, in order."""
    teacher = np.zeros(len(units.group), dtype=np.int64)
    index = np.arange(len(units.group))
    for number in np.unique(units.group[units.group >= 0]):
        group = groups[int(number)]
        where = np.flatnonzero(units.group == number)
        by_place = where[np.argsort(units.place[where], kind="stable")].reshape(group.size, -1)
        candidates = kept[group.name].cpu().numpy()
        teacher[by_place] = (candidates // group.size)[:, None]
        index[by_place] = by_place[candidates % group.size]
    return _Sources(torch.from_numpy(teacher), torch.from_numpy(index), torch.from_numpy(units.group < 0))


class Compressor:
    """Cuts the tensors of a wide network down to the kept channels.

    Args:
        network: the wide modules.
        layout: where the teachers' tensors lie in it.
        groups: the channel groups.
        kept: per group the candidates to keep.
    """

    def __init__(self, network: nn.Module, layout: Layout, groups: ChannelGroups, kept: Mapping[str, Tensor]) -> None:
        self.layout, self.groups, self.kept = layout, groups, kept
        self.network = network
        self.tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}

    def student_tensors(self, read: Callable[[Tensor], Tensor | None]) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, tensor) of the student.

        Args:
            read: maps a parameter or buffer of the wide network to the tensor to cut: itself, or what an optimizer keeps
                for it; None leaves it out.
        """
        for weight, path in self.layout.layers.items():
            wide = self.network.get_submodule(path)
            assert isinstance(wide, WideLayer)
            source = read(wide.weight)
            if source is not None:
                yield weight, self._weight(wide, weight, source)
        for bias, weight in self.layout.biases.items():
            wide = self.network.get_submodule(self.layout.layers[weight])
            assert isinstance(wide, WideLayer)
            assert wide.bias is not None
            source = read(wide.bias)
            if source is not None:
                yield bias, self._bias(wide, weight, source)
        for name, place in self.layout.side_by_side.items():
            source = read(self.tensors[place])
            if source is not None:
                yield name, self._side_by_side(name, source)
        for name, places in self.layout.per_teacher.items():
            parts = [read(self.tensors[place]) for place in places]
            if all(part is not None for part in parts):
                yield name, self._per_teacher(name, [part for part in parts if part is not None])

    def owners(self) -> dict[str, list[Tensor]]:
        """Per parameter or buffer of the student, the wide tensors it is cut from."""
        owned: dict[str, list[Tensor]] = {n: [self.tensors[p] for p in ps] for n, ps in self.layout.per_teacher.items()}
        owned |= {name: [self.tensors[place]] for name, place in self.layout.side_by_side.items()}
        for weight, path in self.layout.layers.items():
            owned[weight] = [self.tensors[f"{path}.weight"]]
        for bias, weight in self.layout.biases.items():
            owned[bias] = [self.tensors[f"{self.layout.layers[weight]}.bias"]]
        return owned

    def _weight(self, wide: WideLayer, name: str, source: Tensor) -> Tensor:
        geometry, wiring = wide.geometry, wide.wiring
        rows = _sources(self.groups.outputs[name], self.groups, self.kept)
        columns = _sources(self.groups.inputs[name], self.groups, self.kept)
        out_dim, in_dim = geometry.out_dim, geometry.in_dim
        if wiring.has_off_diagonal and not wide.linked:
            return self._from_blocks(wide, source, rows, columns)
        out = source
        if wiring.writes_streams:
            out = _select(out, out_dim, rows.teacher * wide.out_channels + rows.index)
        if wiring.reads_streams:
            shared = [
                _select(out, in_dim, t * wide.in_channels + columns.index[columns.common])
                for t in range(wide.num_teachers if bool(columns.common.any()) else 0)
            ]
            kept = columns.teacher * wide.in_channels + columns.index
            out = _select(out, in_dim, kept) if out is source else _reduce(out, in_dim, kept)
            if shared:
                where = columns.common.nonzero().flatten().to(out.device)
                out.index_copy_(in_dim, where, torch.stack(shared).sum(0))
        return out.clone() if out is source else out

    @staticmethod
    def _from_blocks(wide: WideLayer, source: Tensor, rows: _Sources, columns: _Sources) -> Tensor:
        """As from the dense weight, whose blocks off the diagonal are zero."""
        blocks = source.unflatten(0, (wide.num_teachers, -1))
        device = source.device
        out_dim, in_dim = wide.geometry.out_dim, wide.geometry.in_dim
        result = source.new_zeros(_shape_like(source, out_dim, in_dim, len(rows.index), len(columns.index)))
        for t in range(wide.num_teachers):
            r = (rows.teacher == t).nonzero().flatten()
            c = ((columns.teacher == t) | columns.common).nonzero().flatten()
            block = (
                blocks[t]
                .index_select(out_dim, rows.index[r].to(device))
                .index_select(in_dim, columns.index[c].to(device))
            )
            first, second = (r, c) if out_dim == 0 else (c, r)
            result[first.to(device)[:, None], second.to(device)[None, :]] = block
        return result

    def _bias(self, wide: WideLayer, weight: str, source: Tensor) -> Tensor:
        if not wide.wiring.writes_streams:
            return source.clone()
        rows = _sources(self.groups.outputs[weight], self.groups, self.kept)
        return _select(source, 0, rows.teacher * wide.out_channels + rows.index)

    def _side_by_side(self, name: str, source: Tensor) -> Tensor:
        """From the teachers' tensors along the first dimension."""
        if name not in self.groups.tensors:  # a counter of each teacher
            assert not source.is_floating_point(), name
            return source[0].clone()
        dim, units = self.groups.tensors[name]
        sources, size = _sources(units, self.groups, self.kept), len(units.group)
        if dim is None:
            return source.narrow(0, int(sources.teacher[0]) * size, size).clone()
        assert dim == 0, name
        return _select(source, 0, sources.teacher * size + sources.index)

    def _per_teacher(self, name: str, parts: list[Tensor]) -> Tensor:
        if name not in self.groups.tensors:  # a counter, the same for all
            assert not parts[0].is_floating_point(), name
            return parts[0].clone()
        dim, units = self.groups.tensors[name]
        sources = _sources(units, self.groups, self.kept)
        if dim is None:
            return parts[int(sources.teacher[0])].clone()
        joined = torch.cat(parts, dim=dim)
        return _select(joined, dim, sources.teacher * parts[0].shape[dim] + sources.index)


def _shape_like(source: Tensor, out_dim: int, in_dim: int, rows: int, columns: int) -> list[int]:
    shape = list(source.shape)
    shape[out_dim], shape[in_dim] = rows, columns
    return shape


def _select(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """The given indices along a dimension, as a new tensor."""
    return tensor.index_select(dim, index.to(tensor.device))


def _reduce(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """As :func:`_select` of a tensor that is no longer needed: in its own memory where the indices ascend."""
    if dim > 1 or not bool((index.diff() > 0).all()):
        return _select(tensor, dim, index)
    every = torch.arange(tensor.shape[1 - dim])
    compact_(tensor, *((index, every) if dim == 0 else (every, index)))
    return tensor

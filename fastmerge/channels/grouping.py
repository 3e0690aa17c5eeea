"""From a record of who writes and reads which channel id to channel groups.

A *unit* is a set of channel ids that is kept or dropped as a whole: one channel, or a block of a grouped convolution with
its inputs and outputs. Units with the same readers, writers and operations can change places, so they form a *channel
group*: one gate vector, n places, T·n candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import nn

from fastmerge.channels.groups import OUTPUT, SHARED, AxisUnits, ChannelGroup, ChannelGroups
from fastmerge.channels.labels import connected, occurrence
from fastmerge.channels.record import IdRecord
from fastmerge.channels.signatures import axis_of, settle_norms, settle_scalars, settle_tensors, signatures
from fastmerge.problems import Problem, UnmergeableError

_ATTRIBUTES = set(dir(nn.ModuleDict()))


def group_channels(record: IdRecord) -> ChannelGroups:
    """Groups the channels of a network that was run on ids.

    Raises:
        ValueError: naming the layer, if it makes the network's output in a way that can't be averaged.
    """
    return _Grouping(record).result()


class _Grouping:
    """Turns an :class:`IdRecord` into groups."""

    def __init__(self, record: IdRecord) -> None:
        self.record = record
        settle_tensors(record)
        settle_norms(record)
        self.scalars: dict[str, np.ndarray] = {}
        if record.scalars:
            unit = connected(record.count, record.united + record.tied)
            self.scalars = settle_scalars(record, _kinds(record, unit), unit)
        self.channel = connected(record.count, record.united)
        self.unit = connected(record.count, record.united + record.tied)
        self.kind = _kinds(record, self.unit)
        own = [int(self.unit[int(record.tensors[name].flatten()[0])]) for name in self.scalars]
        self.kind[np.isin(self.unit, own)] = SHARED

    def _along(self, name: str) -> np.ndarray:
        return np.asarray(self.record.tensors[name].reshape(-1).numpy())

    def result(self) -> ChannelGroups:
        """Numbers groups and places in the order of the network and names them."""
        candidates = np.unique(self.unit[self.kind == 0])
        found = signatures(self.record, self.unit)[candidates]
        _, first, inverse = np.unique(found, axis=0, return_index=True, return_inverse=True)
        number = np.argsort(np.argsort(first))[inverse.reshape(-1)] if len(candidates) else np.zeros(0, dtype=np.int64)
        group = np.full(self.record.count, 0, dtype=np.int64)
        place = np.zeros(self.record.count, dtype=np.int64)
        group[candidates] = number
        place[candidates] = occurrence(number)
        group = np.where(self.kind == 0, group[self.unit], self.kind)
        place = np.where(self.kind == 0, place[self.unit], 0)

        def units(ids: np.ndarray) -> AxisUnits:
            return AxisUnits(group[ids], place[ids])

        named = self._named_groups(group, place)
        single = [number for number, found in enumerate(named) if found.size == 1]
        layers = self.record.layers
        tensors = {n: (axis_of(ids.numpy()), units(self._along(n))) for n, ids in self.record.tensors.items()}
        tensors |= {n: (None, _all_of(np.unique(group[ids]), named)) for n, ids in self.scalars.items()}
        for weight, layer in layers.items():
            if layer.call.groups > 1:  # whole blocks, so that only the weight's first dimension is chosen among
                transposed = layer.call.geometry.kind == "conv_transpose"
                tensors[weight] = (0, units(layer.inputs if transposed else layer.outputs))
                if layer.call.bias is not None:
                    tensors[layer.call.bias] = (0, units(layer.outputs))
            norm, geometry = layer.call.norm, layer.call.geometry
            if norm is not None:
                of = layer.outputs if norm.dim == geometry.out_dim else layer.inputs
                by_channel = norm.dim in ((0,) if layer.call.groups > 1 else (0, 1))
                tensors[norm.magnitude] = (norm.dim, units(of)) if by_channel else (None, units(layer.outputs[:1]))
        return ChannelGroups(
            named,
            {w: units(layer.inputs) for w, layer in layers.items()},
            {w: units(layer.outputs) for w, layer in layers.items()},
            tensors,
            {key: units(ids) for key, ids in {**self.record.reads, **self.record.normalised}.items()},
            self.record.sample_dims,
            frozenset(self.record.fast_samples),
            sorted({(w, op) for w, op, ids in self.record.mixed if np.isin(group[ids], single).any()}),
            {w: layer.call.bias for w, layer in layers.items() if layer.call.bias is not None},
            frozenset(w for w, layer in layers.items() if layer.call.geometry.out_dim),
        )

    def _named_groups(self, group: np.ndarray, place: np.ndarray) -> list[ChannelGroup]:
        count = int(group.max(initial=-1)) + 1
        producers: list[list[str]] = [[] for _ in range(count)]
        consumers: list[list[str]] = [[] for _ in range(count)]
        for layer in self.record.layers.values():
            for names, ids in ((producers, layer.outputs), (consumers, layer.inputs)):
                for g in np.unique(group[ids][group[ids] >= 0]):
                    names[g].append(layer.call.name)
        owners: list[list[str]] = [[] for _ in range(count)]
        for name in self.record.tensors:
            for g in np.unique(group[self._along(name)]):
                if g >= 0:
                    owners[g].append(name.rpartition(".")[0] or name)
        channels = np.unique(self.channel[group >= 0])
        sizes = [(int(place[group == g].max()) + 1, int((group[channels] == g).sum())) for g in range(count)]
        groups: list[ChannelGroup] = []
        for g, (size, total) in enumerate(sizes):
            written = producers[g] or list(dict.fromkeys(owners[g]))
            name = _free_name(written[0].replace(".", "_"), {other.name for other in groups})
            groups.append(ChannelGroup(name, size, total // size, tuple(written), tuple(consumers[g])))
        return groups


def _kinds(record: IdRecord, unit: np.ndarray) -> np.ndarray:
    """Per id 0 for a unit to choose among, SHARED or OUTPUT.

    Args:
        record: of a run on ids.
        unit: per id the unit it belongs to.

    Raises:
        ValueError: naming the layer, if it makes the network's output in a way that can't be averaged.
    """
    owned = np.zeros(record.count, dtype=bool)
    for layer in record.layers.values():
        owned[unit[layer.outputs]] = True
        if layer.call.groups > 1:
            owned[unit[layer.inputs]] = True
    for tensor in record.tensors.values():
        owned[unit[np.unique(tensor.numpy())]] = True
    kind = np.where(owned, 0, SHARED)
    for ids in record.outputs:
        kind[unit[ids[ids >= 0]]] = OUTPUT
    kind = kind[unit]
    problems = list(_outputs_in_the_way(record, kind))
    if problems:
        raise UnmergeableError(*problems)
    return kind


def _outputs_in_the_way(record: IdRecord, kind: np.ndarray) -> Iterator[Problem]:
    for layer in record.layers.values():
        name, output = layer.call.name, kind[layer.outputs] == OUTPUT
        hidden = kind[layer.inputs] == 0
        if layer.call.is_tied and not output.all():
            what = (
                f"layer '{name}' shares its weight with an embedding, and choosing its channels would drop rows of that"
            )
            yield Problem(what, "Give each its own weight in every teacher", name)
        if layer.call.rows is not None and layer.call.groups == 1:
            if output.any():
                what = (
                    f"layer '{name}' makes the network's output with a weight that it computes, which can't be averaged"
                )
                yield Problem(what, "Give the last layer a weight that is a parameter", name)
            elif hidden.any() and not hidden.all():
                what = f"layer '{name}' reads the network's input and hidden channels together with a weight that it computes"
                yield Problem(what, "Let two layers read them, and add their outputs", name)
        if layer.call.groups > 1 and output.any():
            what = f"layer '{name}' is a grouped convolution that makes the network's output; it can't be averaged"
            yield Problem(what, "Put a convolution with groups=1 or a linear layer after it", name)
        elif output.any() and not output.all():
            what = f"layer '{name}' makes both outputs of the network and hidden channels"
            yield Problem(what, "split it into two layers", name)


def _all_of(numbers: np.ndarray, groups: Sequence[ChannelGroup]) -> AxisUnits:
    """The places of whole groups, one after another."""
    sizes = [groups[number].size for number in numbers]
    return AxisUnits(np.repeat(numbers, sizes), np.concatenate([np.arange(size) for size in sizes]))


def _free_name(stem: str, taken: set[str]) -> str:
    """A name that no other group has and that is no attribute of an ``nn.ModuleDict``, which could not hold it then."""
    name, number = stem, 1
    while name in taken or name in _ATTRIBUTES:
        number += 1
        name = f"{stem}__{number}"
    return name

"""From a record of who writes and reads which channel id to channel groups.

A *unit* is a set of channel ids that is kept or dropped as a whole: one channel, or a block of a grouped convolution with
its inputs and outputs. Units with the same readers, writers and operations can change places, so they form a *channel
group*: one gate vector, n places, T·n candidates.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmerge.channels.groups import OUTPUT, SHARED, AxisUnits, ChannelGroup, ChannelGroups
from fastmerge.channels.record import NO_ID, IdRecord


def group_channels(record: IdRecord) -> ChannelGroups:
    """Groups the channels of a network that was run on ids.

    Raises:
        ValueError: naming the layer, if it makes the network's output in a way that can't be averaged.
    """
    return _Grouping(record).result()


def connected(count: int, pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The smallest member of each id's connected component.

    Args:
        count: number of ids.
        pairs: edges, as two int64 arrays of equal length each.
    """
    label = np.arange(count)
    if not pairs:
        return label
    a, b = (np.concatenate(side) for side in zip(*pairs, strict=True))
    while True:
        la, lb = label[a], label[b]
        if np.array_equal(la, lb):
            return label
        low = np.minimum(la, lb)
        np.minimum.at(label, la, low)
        np.minimum.at(label, lb, low)
        while not np.array_equal(label[label], label):
            label = label[label]


def _mix(*values: Any) -> np.ndarray:
    """A 64-bit hash of equally long integer arrays, element by element (splitmix64 rounds)."""
    h: NDArray[np.uint64] = np.array(0x9E3779B97F4A7C15, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for value in values:
            h = h ^ np.asarray(value).astype(np.uint64)
            h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            h = h ^ (h >> np.uint64(31))
    return h


class _Grouping:
    """Turns an :class:`IdRecord` into groups."""

    def __init__(self, record: IdRecord) -> None:
        self.record = record
        self.tensor_axes = {name: _axis_of(ids.numpy(), record) for name, ids in record.tensors.items()}
        self.channel = connected(record.count, record.united)
        self.unit = connected(record.count, record.united + record.tied)
        self.role = self._roles()
        self.kind = self._kinds()

    def _roles(self) -> np.ndarray:
        """Per id a hash of how its value came about: the axis that issued it and its number there within the unit, or the
        operation and its operands' roles.

        Within a unit it tells ids apart that are one channel, such as the value and the gate of a gated linear unit; between
        units that can change places it says which corresponds to which.
        """
        role = np.zeros(self.record.count, dtype=np.uint64)
        for number, ids in enumerate(self._issuing()):
            role[ids] = _mix(np.full(len(ids), number), _occurrence(self.unit[ids]))
        labels: dict[str, int] = {}
        for issue in self.record.issues:
            number = labels.setdefault(issue.label, len(labels))
            operands = [np.where(ids == NO_ID, np.uint64(0), role[ids]) for ids in issue.sources]
            role[issue.ids] = _mix(np.full(len(issue.ids), number), *operands)
        return role

    def _issuing(self) -> list[np.ndarray]:
        tensors = [np.unique(ids.numpy()) for ids in self.record.tensors.values()]
        return [*self.record.inputs, *(layer.outputs for layer in self.record.layers.values()), *tensors]

    def _kinds(self) -> np.ndarray:
        """Per id 0 for a unit to choose among, SHARED or OUTPUT."""
        record, unit = self.record, self.unit
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
        self._refuse_used_outputs(kind)
        return kind

    def _refuse_used_outputs(self, kind: np.ndarray) -> None:
        for layer in self.record.layers.values():
            name, output = layer.call.name, kind[layer.outputs] == OUTPUT
            if layer.call.groups > 1 and output.any():
                raise ValueError(
                    f"layer '{name}' is a grouped convolution that makes the network's output; it can't be averaged"
                )
        for layer in self.record.layers.values():
            name, output = layer.call.name, kind[layer.outputs] == OUTPUT
            if (kind[layer.inputs] == OUTPUT)[~self._is_input[layer.inputs]].any():
                raise ValueError(
                    f"layer '{name}' reads channels that are also an output of the network. The big student averages the "
                    "teachers' outputs, so what a layer reads must not be one; return it from a separate layer"
                )
            if output.any() and not output.all():
                raise ValueError(
                    f"layer '{name}' makes both outputs of the network and hidden channels; split it into two layers"
                )
        for name, ids in self.record.tensors.items():
            if (kind[np.unique(ids.numpy())] == OUTPUT).any():
                raise ValueError(
                    f"parameter or buffer '{name}' acts on the network's output, after the last layer, where the teachers "
                    "are already averaged. The network must end in a convolution or linear layer"
                )

    @functools.cached_property
    def _is_input(self) -> np.ndarray:
        """Per id whether its value depends on the network's input alone, so that it is the same for all teachers."""
        shared = np.zeros(self.record.count, dtype=bool)
        for ids in self.record.inputs:
            shared[ids] = True
        for issue in self.record.issues:
            shared[issue.ids] = issue.known and np.all([shared[ids] | (ids == NO_ID) for ids in issue.sources], axis=0)
        return shared

    def _signatures(self) -> np.ndarray:
        """Two 64-bit hashes per id (equal within a unit) of everything its unit takes part in."""
        record = self.record
        total = np.zeros((record.count, 2), dtype=np.uint64)

        def add(ids: np.ndarray, *values: Any) -> None:
            for column in (0, 1):
                np.add.at(total[:, column], self.unit[ids], _mix(column + 1, *values))

        for number, (_, ids) in enumerate(self._axes()):
            add(ids, np.full(len(ids), 3), np.full(len(ids), number), _occurrence(self.unit[ids]), self.role[ids])
        labels: dict[str, int] = {}
        for label, ids in [("values", issue.ids) for issue in record.issues] + record.patterns:
            number = labels.setdefault(label, len(labels))
            add(ids, np.full(len(ids), 5), np.full(len(ids), number), self.role[ids])
        for text, i in record.positions:
            add(np.array([i]), np.array([7]), np.array([i]), np.array([labels.setdefault(text, len(labels))]))
        return total[self.unit]

    def _axes(self) -> list[tuple[str, np.ndarray]]:
        axes = []
        for weight, layer in self.record.layers.items():
            axes += [(f"{weight} in", layer.inputs), (f"{weight} out", layer.outputs)]
        for name, ids in self.record.tensors.items():
            axes.append((name, np.unique(ids.numpy()) if self.tensor_axes[name] is None else self._along(name)))
        return axes

    def _along(self, name: str) -> np.ndarray:
        return np.asarray(self.record.tensors[name].reshape(-1).numpy())

    def result(self) -> ChannelGroups:
        """Numbers groups and places in the order of the network and names them."""
        candidates = np.unique(self.unit[self.kind == 0])
        signatures = self._signatures()[candidates]
        _, first, inverse = np.unique(signatures, axis=0, return_index=True, return_inverse=True)
        number = np.argsort(np.argsort(first))[inverse.reshape(-1)] if len(candidates) else np.zeros(0, dtype=np.int64)
        group = np.full(self.record.count, 0, dtype=np.int64)
        place = np.zeros(self.record.count, dtype=np.int64)
        group[candidates] = number
        place[candidates] = _occurrence(number)
        group = np.where(self.kind == 0, group[self.unit], self.kind)
        place = np.where(self.kind == 0, place[self.unit], 0)

        def units(ids: np.ndarray) -> AxisUnits:
            return AxisUnits(group[ids], place[ids])

        layers = self.record.layers
        tensors = {n: (self.tensor_axes[n], units(self._along(n))) for n in self.record.tensors}
        for weight, layer in layers.items():
            if layer.call.groups > 1:  # whole blocks, so that only the weight's first dimension is chosen among
                transposed = layer.call.geometry.kind == "conv_transpose"
                tensors[weight] = (0, units(layer.inputs if transposed else layer.outputs))
                if layer.call.bias is not None:
                    tensors[layer.call.bias] = (0, units(layer.outputs))
        return ChannelGroups(
            self._named_groups(group, place),
            {w: units(layer.inputs) for w, layer in layers.items()},
            {w: units(layer.outputs) for w, layer in layers.items()},
            tensors,
            {key: units(ids) for key, ids in self.record.reads.items()},
            self.record.sample_dims,
            sorted({(w, op) for w, op, ids in self.record.mixed if (group[ids] >= 0).any()}),
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
        taken: dict[str, int] = {}
        groups = []
        for g, (size, total) in enumerate(sizes):
            written = producers[g] or list(dict.fromkeys(owners[g]))
            stem = written[0].replace(".", "_")
            taken[stem] = taken.get(stem, 0) + 1
            name = stem if taken[stem] == 1 else f"{stem}__{taken[stem]}"
            groups.append(ChannelGroup(name, size, total // size, tuple(written), tuple(consumers[g])))
        return groups


def _occurrence(values: np.ndarray) -> np.ndarray:
    """For each element, how many equal ones stand before it."""
    order = np.argsort(values, kind="stable")
    sorted_values = values[order]
    starts = np.r_[True, np.diff(sorted_values) != 0] if len(values) else np.zeros(0, dtype=bool)
    index = np.arange(len(values))
    result = np.empty(len(values), dtype=np.int64)
    result[order] = index - np.maximum.accumulate(np.where(starts, index, 0)) if len(values) else 0
    return result


def _axis_of(ids: np.ndarray, record: IdRecord) -> int | None:
    """The dimension that a parameter's ids lie along; None if one id stands for the whole tensor."""
    long = [d for d in range(ids.ndim) if ids.shape[d] > 1]
    return long[0] if len(long) == 1 else None

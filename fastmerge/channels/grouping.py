"""From a record of who writes and reads which channel id to channel groups.

A *unit* is a set of channel ids that is kept or dropped as a whole: one channel, or a block of a grouped convolution with
its inputs and outputs. Units with the same readers, writers and operations can change places, so they form a *channel
group*: one gate vector, n places, T·n candidates. Whether they can is told by signatures: hashes of everything that a unit
takes part in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastmerge.channels.examples import example_arguments
from fastmerge.channels.groups import OUTPUT, SHARED, AxisUnits, ChannelGroup, ChannelGroups
from fastmerge.channels.ids import run_on_ids
from fastmerge.channels.record import NO_ID, IdRecord, compact
from fastmerge.channels.tracing import trace
from fastmerge.problems import Problem, UnmergeableError


def _connected(count: int, pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
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


def _occurrence(values: np.ndarray) -> np.ndarray:
    """For each element, how many equal ones stand before it."""
    order = np.argsort(values, kind="stable")
    sorted_values = values[order]
    starts = np.r_[True, np.diff(sorted_values) != 0] if len(values) else np.zeros(0, dtype=bool)
    index = np.arange(len(values))
    result = np.empty(len(values), dtype=np.int64)
    result[order] = index - np.maximum.accumulate(np.where(starts, index, 0)) if len(values) else 0
    return result


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


def _signatures(record: IdRecord, unit: np.ndarray) -> np.ndarray:
    """Two 64-bit hashes per id, equal within a unit: uint64 (ids, 2).

    Args:
        record: of a run on ids.
        unit: per id the unit it belongs to.
    """
    role, total = _roles(record, unit), np.zeros((record.count, 2), dtype=np.uint64)

    def add(ids: np.ndarray, *values: Any) -> None:
        for column in (0, 1):
            np.add.at(total[:, column], unit[ids], _mix(column + 1, *values))

    for number, ids in enumerate(_axes(record)):
        add(ids, np.full(len(ids), 3), np.full(len(ids), number), _occurrence(unit[ids]), role[ids])
    labels: dict[str, int] = {}
    for label, ids in [("values", issue.ids) for issue in record.issues] + record.patterns:
        number = labels.setdefault(label, len(labels))
        add(ids, np.full(len(ids), 5), np.full(len(ids), number), role[ids])
    for text, i in record.positions:
        add(np.array([i]), np.array([7]), np.array([i]), np.array([labels.setdefault(text, len(labels))]))
    return total[unit]


def _settle_tensors(record: IdRecord) -> None:
    """Finds the dimension of channels of every tensor outside layers, now that it is known which ids are one channel.

    Its ids are left along that dimension alone. A tensor without one is kept from one teacher as a whole.
    """
    waiting = {name: ids for name, ids in record.tensors.items() if sum(size > 1 for size in ids.shape) > 1}
    while waiting:
        label = torch.from_numpy(_connected(record.count, record.united))
        for name in list(waiting):
            ids = waiting[name]
            channels = label[compact(ids)]
            long = [d for d in range(ids.dim()) if channels.shape[d] > 1]
            first = next((a for d in long if bool((channels == (a := _along(channels, d))).all())), None)
            if first is not None or not long:
                keep = [d for d in range(ids.dim()) if first is not None and first.shape[d] > 1]
                for d in range(ids.dim()):
                    ids = ids if d in keep else ids.narrow(d, 0, 1)
                record.tensors[name] = ids
                del waiting[name]
        if not waiting:
            return
        for name, ids in waiting.items():  # no dimension: one channel, and others may have become one with it
            record.collapse([ids], name, "its use")
            record.without_channels.append(name)
            record.tensors[name] = ids[(slice(0, 1),) * ids.dim()]
        waiting = {name: ids for name, ids in record.tensors.items() if sum(size > 1 for size in ids.shape) > 1}


def _settle_norms(record: IdRecord) -> None:
    """Tells normalisations over channels from those within each position, such as of each head's query, which is kept whole."""
    if not record.normalised_apart:
        return
    label = torch.from_numpy(_connected(record.count, record.united))
    for call, ids in record.normalised_apart.items():
        small = compact(ids)
        channels = label[small].flatten(0, -2)
        if bool((channels != channels[:1]).any()):
            record.tie(small[..., :1], small)
        elif len(channels[0].unique()) > 1:
            record.normalised[call] = small.flatten(0, -2)[0].numpy()


def _settle_scalars(record: IdRecord, kind: np.ndarray, unit: np.ndarray) -> dict[str, np.ndarray]:
    """Finds the tensors of one element that act on channels to choose among and are no channel themselves.

    One that is a channel, too, or acts on the network's output alone becomes one with all that it acts on.

    Args:
        record: of a run on ids.
        kind: per id 0 for one to choose among, SHARED or OUTPUT.
        unit: per id the unit it belongs to.

    Returns:
        By name of the tensor the ids that it acts on.

    Raises:
        ValueError: naming the tensor, if it acts on hidden channels and on the network's output.
    """
    met: dict[int, list[np.ndarray]] = {}
    for scalar, ids in record.scalars:
        met.setdefault(int(unit[scalar]), []).append(ids)
    alone = np.bincount(unit, minlength=record.count) == np.bincount(unit, record.scalar_ids, minlength=record.count)
    alone[unit[np.concatenate([layer.inputs for layer in record.layers.values()] or [unit[:0]])]] = False
    names = {int(unit[int(ids)]): name for name, ids in record.tensors.items() if ids.numel() == 1}
    found = {}
    for own, several in met.items():
        ids = np.unique(np.concatenate(several))
        hidden = kind[ids] == 0
        if hidden.any() and not hidden.all():
            what = (
                f"'{names[own]}' acts both on hidden channels and on the network's output, which is the teachers' mean"
            )
            raise UnmergeableError(Problem(what, "Use a parameter of its own for each", names[own]))
        if alone[own] and hidden.all():
            found[own] = ids
        else:
            record.united.append((np.full(len(ids), own), ids))
    return {
        name: found[own] for name, ids in record.tensors.items() if (own := int(unit[int(ids.flatten()[0])])) in found
    }


def mixing_tensors(record: IdRecord) -> set[str]:
    """Names of tensors without a dimension of channels, or whose channels are among those that an operation mixed."""
    label = _connected(record.count, record.united)
    mixed = np.unique(label[np.concatenate([ids for _, _, ids in record.mixed] or [np.zeros(0, dtype=np.int64)])])
    meeting = {n for n, ids in record.tensors.items() if np.isin(label[np.unique(ids.numpy())], mixed).any()}
    return meeting | set(record.without_channels)


def _along(channels: Tensor, dim: int) -> Tensor:
    """The entries along one dimension at the start of all others."""
    return channels[tuple(slice(None) if d == dim else slice(0, 1) for d in range(channels.dim()))]


def _axis_of(ids: np.ndarray) -> int | None:
    """The dimension that a parameter's ids lie along; None if one id stands for the whole tensor."""
    long = [d for d in range(ids.ndim) if ids.shape[d] > 1]
    return long[0] if len(long) == 1 else None


def _roles(record: IdRecord, unit: np.ndarray) -> np.ndarray:
    """Per id a hash of how its value came about: the axis that issued it and its number there within the unit, or the
    operation and its operands' roles.

    Within a unit it tells ids apart that are one channel, such as the value and the gate of a gated linear unit; between
    units that can change places it says which corresponds to which.
    """
    role = np.zeros(record.count, dtype=np.uint64)
    for number, ids in enumerate(_issuing(record)):
        role[ids] = _mix(np.full(len(ids), number), _occurrence(unit[ids]))
    labels: dict[str, int] = {}
    for issue in record.issues:
        number = labels.setdefault(issue.label, len(labels))
        operands = [np.where(ids == NO_ID, np.uint64(0), role[ids]) for ids in issue.sources]
        role[issue.ids] = _mix(np.full(len(issue.ids), number), *operands)
    return role


def _issuing(record: IdRecord) -> list[np.ndarray]:
    tensors = [np.unique(ids.numpy()) for ids in record.tensors.values()]
    return [*record.inputs, *(layer.outputs for layer in record.layers.values()), *tensors]


def _axes(record: IdRecord) -> list[np.ndarray]:
    """The ids along each dimension of channels that a parameter or buffer has."""
    axes = [ids for layer in record.layers.values() for ids in (layer.inputs, layer.outputs)]
    for tensor in record.tensors.values():
        ids = tensor.numpy()
        axes.append(np.unique(ids) if _axis_of(ids) is None else ids.reshape(-1))
    return axes


_ATTRIBUTES = set(dir(nn.ModuleDict()))


def channel_groups(model: nn.Module, example_inputs: Any = None) -> ChannelGroups:
    """Finds the channel groups of a network: which channels a merge would choose among.

    Buffers that are not saved (``persistent=False``), such as the frequencies of rotary positions, count as the same in all
    teachers. A big student compares them instead.

    Args:
        model: any network that ``torch.export`` can trace; it is not changed.
        example_inputs: a tensor (N, C, ...), a tuple of positional arguments, a dict of keyword arguments, or a pair of both;
            inferred for networks with one image, signal or vector input.

    Returns:
        The groups; ``print`` shows them as a table.

    Raises:
        ValueError: if the network can't be traced or merged, naming the layer.
    """
    inputs = example_arguments(model, example_inputs)
    unsaved = [
        f"{path}.{name}".lstrip(".") for path, m in model.named_modules() for name in m._non_persistent_buffers_set
    ]
    return group_channels(run_on_ids(trace(model, inputs), pytree.tree_leaves(inputs), constants=unsaved))


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
        _settle_tensors(record)
        _settle_norms(record)
        self.scalars: dict[str, np.ndarray] = {}
        if record.scalars:
            unit = _connected(record.count, record.united + record.tied)
            self.scalars = _settle_scalars(record, _kinds(record, unit), unit)
        self.channel = _connected(record.count, record.united)
        self.unit = _connected(record.count, record.united + record.tied)
        self.kind = _kinds(record, self.unit)
        own = [int(self.unit[int(record.tensors[name].flatten()[0])]) for name in self.scalars]
        self.kind[np.isin(self.unit, own)] = SHARED

    def _along(self, name: str) -> np.ndarray:
        return np.asarray(self.record.tensors[name].reshape(-1).numpy())

    def result(self) -> ChannelGroups:
        """Numbers groups and places in the order of the network and names them."""
        candidates = np.unique(self.unit[self.kind == 0])
        found = _signatures(self.record, self.unit)[candidates]
        _, first, inverse = np.unique(found, axis=0, return_index=True, return_inverse=True)
        number = np.argsort(np.argsort(first))[inverse.reshape(-1)] if len(candidates) else np.zeros(0, dtype=np.int64)
        group = np.full(self.record.count, 0, dtype=np.int64)
        place = np.zeros(self.record.count, dtype=np.int64)
        group[candidates] = number
        place[candidates] = _occurrence(number)
        group = np.where(self.kind == 0, group[self.unit], self.kind)
        place = np.where(self.kind == 0, place[self.unit], 0)

        def units(ids: np.ndarray) -> AxisUnits:
            return AxisUnits(group[ids], place[ids])

        named = self._named_groups(group, place)
        single = [number for number, found in enumerate(named) if found.size == 1]
        layers = self.record.layers
        tensors = {n: (_axis_of(ids.numpy()), units(self._along(n))) for n, ids in self.record.tensors.items()}
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

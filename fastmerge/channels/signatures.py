"""Hashes of everything a unit takes part in: units of equal signatures can change places."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmerge.channels.labels import connected, mix, occurrence
from fastmerge.channels.record import NO_ID, IdRecord, compact
from fastmerge.problems import Problem, UnmergeableError


def signatures(record: IdRecord, unit: np.ndarray) -> np.ndarray:
    """Two 64-bit hashes per id, equal within a unit: uint64 (ids, 2).

    Args:
        record: of a run on ids.
        unit: per id the unit it belongs to.
    """
    role, total = _roles(record, unit), np.zeros((record.count, 2), dtype=np.uint64)

    def add(ids: np.ndarray, *values: Any) -> None:
        for column in (0, 1):
            np.add.at(total[:, column], unit[ids], mix(column + 1, *values))

    for number, ids in enumerate(_axes(record)):
        add(ids, np.full(len(ids), 3), np.full(len(ids), number), occurrence(unit[ids]), role[ids])
    labels: dict[str, int] = {}
    for label, ids in [("values", issue.ids) for issue in record.issues] + record.patterns:
        number = labels.setdefault(label, len(labels))
        add(ids, np.full(len(ids), 5), np.full(len(ids), number), role[ids])
    for text, i in record.positions:
        add(np.array([i]), np.array([7]), np.array([i]), np.array([labels.setdefault(text, len(labels))]))
    return total[unit]


def settle_tensors(record: IdRecord) -> None:
    """Finds the dimension of channels of every tensor outside layers, now that it is known which ids are one channel.

    Its ids are left along that dimension alone. A tensor without one is kept from one teacher as a whole.
    """
    waiting = {name: ids for name, ids in record.tensors.items() if sum(size > 1 for size in ids.shape) > 1}
    while waiting:
        label = torch.from_numpy(connected(record.count, record.united))
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


def settle_norms(record: IdRecord) -> None:
    """Tells normalisations over channels from those within each position, such as of each head's query, which is kept whole."""
    if not record.normalised_apart:
        return
    label = torch.from_numpy(connected(record.count, record.united))
    for call, ids in record.normalised_apart.items():
        small = compact(ids)
        channels = label[small].flatten(0, -2)
        if bool((channels != channels[:1]).any()):
            record.tie(small[..., :1], small)
        elif len(channels[0].unique()) > 1:
            record.normalised[call] = small.flatten(0, -2)[0].numpy()


def settle_scalars(record: IdRecord, kind: np.ndarray, unit: np.ndarray) -> dict[str, np.ndarray]:
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
    label = connected(record.count, record.united)
    mixed = np.unique(label[np.concatenate([ids for _, _, ids in record.mixed] or [np.zeros(0, dtype=np.int64)])])
    meeting = {n for n, ids in record.tensors.items() if np.isin(label[np.unique(ids.numpy())], mixed).any()}
    return meeting | set(record.without_channels)


def _along(channels: Tensor, dim: int) -> Tensor:
    """The entries along one dimension at the start of all others."""
    return channels[tuple(slice(None) if d == dim else slice(0, 1) for d in range(channels.dim()))]


def axis_of(ids: np.ndarray) -> int | None:
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
        role[ids] = mix(np.full(len(ids), number), occurrence(unit[ids]))
    labels: dict[str, int] = {}
    for issue in record.issues:
        number = labels.setdefault(issue.label, len(labels))
        operands = [np.where(ids == NO_ID, np.uint64(0), role[ids]) for ids in issue.sources]
        role[issue.ids] = mix(np.full(len(issue.ids), number), *operands)
    return role


def _issuing(record: IdRecord) -> list[np.ndarray]:
    tensors = [np.unique(ids.numpy()) for ids in record.tensors.values()]
    return [*record.inputs, *(layer.outputs for layer in record.layers.values()), *tensors]


def _axes(record: IdRecord) -> list[np.ndarray]:
    """The ids along each dimension of channels that a parameter or buffer has."""
    axes = [ids for layer in record.layers.values() for ids in (layer.inputs, layer.outputs)]
    for tensor in record.tensors.values():
        ids = tensor.numpy()
        axes.append(np.unique(ids) if axis_of(ids) is None else ids.reshape(-1))
    return axes

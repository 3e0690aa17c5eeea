"""Which ids are to choose among, which are the network's input, and which its output."""

from __future__ import annotations

import numpy as np

from fastmerge.channels.groups import OUTPUT, SHARED
from fastmerge.channels.record import NO_ID, IdRecord


def kinds(record: IdRecord, unit: np.ndarray) -> np.ndarray:
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
    _refuse_used_outputs(record, kind)
    return kind


def _refuse_used_outputs(record: IdRecord, kind: np.ndarray) -> None:
    is_input = _depends_on_input_alone(record)
    for layer in record.layers.values():
        name, output = layer.call.name, kind[layer.outputs] == OUTPUT
        if layer.call.groups > 1 and output.any():
            raise ValueError(
                f"layer '{name}' is a grouped convolution that makes the network's output; it can't be averaged"
            )
    for layer in record.layers.values():
        name, output = layer.call.name, kind[layer.outputs] == OUTPUT
        if (kind[layer.inputs] == OUTPUT)[~is_input[layer.inputs]].any():
            raise ValueError(
                f"layer '{name}' reads channels that are also an output of the network. The big student averages the "
                "teachers' outputs, so what a layer reads must not be one; return it from a separate layer"
            )
        if output.any() and not output.all():
            raise ValueError(
                f"layer '{name}' makes both outputs of the network and hidden channels; split it into two layers"
            )
    for name, ids in record.tensors.items():
        if (kind[np.unique(ids.numpy())] == OUTPUT).any():
            raise ValueError(
                f"parameter or buffer '{name}' acts on the network's output, after the last layer, where the teachers "
                "are already averaged. The network must end in a convolution or linear layer"
            )


def _depends_on_input_alone(record: IdRecord) -> np.ndarray:
    """Per id whether its value depends on the network's input alone, so that it is the same for all teachers."""
    shared = np.zeros(record.count, dtype=bool)
    for ids in record.inputs:
        shared[ids] = True
    for issue in record.issues:
        shared[issue.ids] = issue.known and np.all([shared[ids] | (ids == NO_ID) for ids in issue.sources], axis=0)
    return shared

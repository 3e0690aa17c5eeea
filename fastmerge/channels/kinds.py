"""Which ids are to choose among, which are the network's input, and which its output."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fastmerge.channels.groups import OUTPUT, SHARED
from fastmerge.channels.record import IdRecord
from fastmerge.problems import Problem, UnmergeableError


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

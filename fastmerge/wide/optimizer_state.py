"""An optimizer's state (momentum, moments, steps) carried along when the parameters it belongs to change shape or owner."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fastmerge.wide.compression import Compressor
from fastmerge.wide.layers import WideLayer


def carry_through_link(optimizer: Optimizer, layer: WideLayer) -> None:
    """Writes out the zeros off the diagonal in the state of a weight that is about to be linked."""
    state = optimizer.state.get(layer.weight, {})
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim() and value.shape == layer.weight.shape:
            state[key] = layer.dense(value)


def carry_to_student(optimizer: Optimizer, compressor: Compressor, student: nn.Module) -> None:
    """Points an optimizer of the big student at the student's parameters, its state cut like they were.

    Groups keep their options; a group of which nothing is left (the gates') goes.
    """
    owners = compressor.owners()
    parameters = dict(student.named_parameters())
    state: dict[Tensor, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        kept = optimizer.state.get(owners[name][0], {}) if name in owners else {}
        state[parameter] = {k: copy.deepcopy(v) for k, v in kept.items() if not _is_per_element(owners[name][0], v)}
    for key in {key for entry in optimizer.state.values() for key in entry}:

        def read(tensor: Tensor, key: str = key) -> Tensor | None:
            value = optimizer.state.get(tensor, {}).get(key)
            return value if _is_per_element(tensor, value) else None

        for name, value in compressor.student_tensors(read):
            if name in parameters:
                state[parameters[name]][key] = value
    owner = {id(wide[0]): parameters[name] for name, wide in owners.items() if name in parameters}
    for group in optimizer.param_groups:
        group["params"] = [owner[id(p)] for p in group["params"] if id(p) in owner]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    optimizer.state.clear()
    optimizer.state.update({p: entry for p, entry in state.items() if entry})


def _is_per_element(tensor: Tensor, value: Any) -> bool:
    return isinstance(value, Tensor) and tensor.dim() > 0 and value.shape == tensor.shape

"""An optimizer's state (momentum, moments, steps) carried along when the parameters it belongs to change shape or owner."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fastmerge.narrowing.compression import Compressor
from fastmerge.wide.layers import WideLayer


def carry_through_link(optimizer: Optimizer, layer: WideLayer) -> None:
    """Writes out the zeros off the diagonal in the state of a weight that is about to be linked."""
    state = optimizer.state.get(layer.weight, {})
    for key, value in state.items():
        if is_per_element(layer.weight, value):
            state[key] = layer.dense(value)


class StateCarrier:
    """Points an optimizer of the big student at the student's parameters, its state cut like they were.

    Everything is checked here, before anything changes.

    Args:
        optimizer: of the big student's parameters.
        compressor: cuts the big student.

    Raises:
        ValueError: the optimizer holds none of its weights, or keeps something for one that can't be cut like it.
    """

    def __init__(self, optimizer: Optimizer, compressor: Compressor) -> None:
        self.optimizer, self.compressor = optimizer, compressor
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        names = {name for name, sources in compressor.sources.items() if id(sources[0]) in held}
        if not names:
            raise ValueError(
                f"compress needs an optimizer of this big student's weights; this {type(optimizer).__name__} holds none"
            )
        # Per parameter of the student: what goes over as it is, and the tensors to cut.
        self._whole: dict[str, dict[str, Any]] = {}
        self._per_element: dict[str, dict[str, list[Tensor]]] = {}
        for name in names:
            self._sort(name, compressor.sources[name])

    def _sort(self, name: str, sources: Sequence[Tensor]) -> None:
        entries = [self.optimizer.state.get(source, {}) for source in sources]
        self._whole[name], self._per_element[name] = {}, {}
        for key, value in entries[0].items():
            values = [entry.get(key) for entry in entries]
            if all(is_per_element(source, v) for source, v in zip(sources, values, strict=True)):
                self._per_element[name][key] = values
            elif isinstance(value, Tensor) and value.numel() > 1:
                raise ValueError(
                    f"compress can't carry {type(self.optimizer).__name__}'s {key!r} of '{name}': it has shape "
                    f"{tuple(value.shape)} and belongs to no element of the weight, of shape {tuple(sources[0].shape)}. "
                    "Compress without the optimizer and make a new one"
                )
            else:
                self._whole[name][key] = value

    def carry(self, student: nn.Module) -> None:
        """Cuts the state, in its own memory, and hands the optimizer over."""
        parameters = dict(student.named_parameters())
        state: dict[Tensor, dict[str, Any]] = {}
        for name in list(self._per_element):
            entry = {key: copy.deepcopy(value) for key, value in self._whole[name].items()}
            per_element = self._per_element.pop(name)
            for key in list(per_element):
                entry[key] = self.compressor.cut(name, per_element.pop(key), in_place=True)
            if entry:
                state[parameters[name]] = entry
        owner = {
            id(sources[0]): parameters[name] for name, sources in self.compressor.sources.items() if name in parameters
        }
        for group in self.optimizer.param_groups:
            group["params"] = [owner[id(p)] for p in group["params"] if id(p) in owner]
        self.optimizer.param_groups[:] = [group for group in self.optimizer.param_groups if group["params"]]
        self.optimizer.state.clear()
        self.optimizer.state.update(state)


def is_per_element(tensor: Tensor, value: Any) -> bool:
    """Whether an entry of an optimizer's state has a number for each element of its parameter."""
    return isinstance(value, Tensor) and tensor.dim() > 0 and value.shape == tensor.shape

"""An optimizer's state (momentum, moments, steps) carried along when the parameters it belongs to change shape or owner."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fastmerge.narrowing.compression import Compressor
from fastmerge.wide.layers import WideLayer


def check_state(method: str, optimizer: Optimizer, names: Mapping[Tensor, str]) -> None:
    """Checks that all that an optimizer keeps for some parameters can be cut or grown like them.

    Args:
        method: what would be done, for the message.
        optimizer: of a big student's parameters.
        names: of these parameters.

    Raises:
        TypeError: it is no optimizer.
        ValueError: it holds none of them, or keeps something that belongs to no element of one, or in another optimizer.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{method} needs an optimizer (torch.optim.Optimizer); got a {type(optimizer).__name__}")
    kind = type(optimizer).__name__
    if not any(parameter in names for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(f"{method} needs an optimizer of this big student's weights; this {kind} holds none")
    for attribute, inner in vars(optimizer).items():
        if isinstance(inner, Optimizer) and inner.state is not optimizer.state and inner.state:
            raise ValueError(
                f"{method} can't carry what {kind} keeps in another optimizer, its '{attribute}'; pass that one instead"
            )
    for parameter, entry in optimizer.state.items():
        for key, value in entry.items() if parameter in names else ():
            if isinstance(value, Tensor) and value.numel() > 1 and not is_per_element(parameter, value):
                raise ValueError(
                    f"{method} can't carry {kind}'s {key!r} of '{names[parameter]}': it has shape {tuple(value.shape)} and "
                    f"belongs to no element of the parameter, of shape {tuple(parameter.shape)}. Leave the optimizer out "
                    "and make a new one"
                )


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
        check_state("compress", optimizer, {s: name for name, sources in compressor.sources.items() for s in sources})
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        # Per parameter of the student: what goes over as it is, and the tensors to cut.
        self._whole: dict[str, dict[str, Any]] = {}
        self._per_element: dict[str, dict[str, list[Tensor]]] = {}
        for name, sources in compressor.sources.items():
            if id(sources[0]) in held:
                self._sort(name, sources)

    def _sort(self, name: str, sources: Sequence[Tensor]) -> None:
        entries = [self.optimizer.state.get(source, {}) for source in sources]
        self._whole[name], self._per_element[name] = {}, {}
        for key, value in entries[0].items():
            values = [entry.get(key) for entry in entries]
            if all(is_per_element(source, v) for source, v in zip(sources, values, strict=True)):
                self._per_element[name][key] = values
            elif is_per_element(sources[0], value):
                raise ValueError(
                    f"compress can't carry {type(self.optimizer).__name__}'s {key!r} of '{name}': it has one of some teachers "
                    "only. Compress without the optimizer and make a new one"
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
        owners = {
            id(sources[0]): [parameters[name]]
            for name, sources in self.compressor.sources.items()
            if name in parameters
        }
        for magnitude, (weight, _) in self.compressor.magnitudes.items():
            owners[id(self.compressor.sources[weight][0])].append(parameters[magnitude])
        for group in self.optimizer.param_groups:
            group["params"] = [owner for p in group["params"] for owner in owners.get(id(p), [])]
        self.optimizer.param_groups[:] = [group for group in self.optimizer.param_groups if group["params"]]
        self.optimizer.state.clear()
        self.optimizer.state.update(state)


def is_per_element(tensor: Tensor, value: Any) -> bool:
    """Whether an entry of an optimizer's state has a number for each element of its parameter."""
    return isinstance(value, Tensor) and tensor.dim() > 0 and value.shape == tensor.shape

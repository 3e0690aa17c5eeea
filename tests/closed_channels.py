"""Teachers changed wherever a closed gate should hide it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from fastmerge import ChannelGroups


@torch.no_grad()
def change_closed_channels(
    teachers: Sequence[nn.Module], groups: ChannelGroups, opened: Mapping[str, Tensor]
) -> list[nn.Module]:
    """Copies of the teachers with other values in every slice of a tensor that belongs to a closed channel.

    Args:
        teachers: T networks of one architecture.
        groups: their channel groups, which say where each channel lies in each tensor.
        opened: per group, the candidates t·n + j that stay open.
    """
    changed = []
    for t, teacher in enumerate(copy.deepcopy(list(teachers))):
        tensors = {**dict(teacher.named_parameters()), **dict(teacher.named_buffers())}
        normed = {name: module for name, module in teacher.named_modules() if is_parametrized(module, "weight")}
        weights = {f"{name}.parametrizations.weight.original1": module.weight for name, module in normed.items()}
        tensors |= weights  # that a layer computes with; the magnitudes follow when it is put back
        magnitudes = {f"{name}.parametrizations.weight.original0" for name in normed}

        def closed(units: Any, teacher: int = t) -> Tensor:
            return torch.from_numpy(_closed(units, groups, opened, teacher))

        for name in groups.inputs.keys() - groups.tensors.keys():  # all but grouped ones
            out_dim = 1 if name in groups.transposed else 0
            _randomise(tensors[name], out_dim, closed(groups.outputs[name]))
            _randomise(tensors[name], 1 - out_dim, closed(groups.inputs[name]))
            if name in groups.biases:
                _randomise(tensors[groups.biases[name]], 0, closed(groups.outputs[name]))
        for name, (dim, units) in groups.tensors.items():
            if dim is not None and name not in magnitudes and tensors[name].is_floating_point():
                _randomise(tensors[name], dim, closed(units))
        for module, weight in zip(normed.values(), weights.values(), strict=True):
            module.weight = weight
        changed.append(teacher)
    return changed


def _closed(units: Any, groups: ChannelGroups, opened: Mapping[str, Tensor], teacher: int) -> np.ndarray:
    result = np.zeros(len(units.group), dtype=bool)
    for i, (number, place) in enumerate(zip(units.group.tolist(), units.place.tolist(), strict=True)):
        if number >= 0:
            group = groups[number]
            result[i] = teacher * group.size + place not in opened[group.name].tolist()
    return result


def _randomise(tensor: Tensor, dim: int, where: Tensor) -> None:
    index = where.nonzero().flatten()
    part = tensor.index_select(dim, index)
    tensor.index_copy_(dim, index, torch.rand_like(part) + 0.5)

"""Neuron Transplantation: the largest channels of all teachers, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastmerge.channels.groups import OUTPUT, ChannelGroups
from fastmerge.methods.combination import combine, places_of_kept
from fastmerge.methods.registry import register
from fastmerge.methods.samples import family_of


@register(
    "transplant", needs="weights", source="M. Öz et al., Model fusion via neuron transplantation (arXiv 2502.06849)"
)
def transplant(teachers: Sequence[nn.Module], batches: Iterable[Any]) -> nn.Module:
    """The channels with the largest weights, of all teachers; those of different teachers don't read each other yet.

    Source: M. Öz et al., Model fusion via neuron transplantation (arXiv 2502.06849).
    """
    groups = family_of(teachers, batches).groups
    kept = largest(magnitudes(teachers, groups))
    return combine(teachers, groups, places_of_kept(groups, len(teachers), kept))


def largest(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of each group the n candidates with the highest scores (T, n), ascending; ties go to the lower index."""
    return {
        name: each.flatten().sort(descending=True, stable=True).indices[: each.shape[1]].sort().values
        for name, each in scores.items()
    }


@torch.no_grad()
def magnitudes(teachers: Sequence[nn.Module], groups: ChannelGroups) -> dict[str, Tensor]:
    """The sum of squares of the weights that write and read each channel, in all teachers side by side.

    Weights that make the network's output count a T-th, as they do there. Biases don't count.

    Returns:
        By name of the group float64 (T, n).
    """
    found = {group.name: torch.zeros(len(teachers), group.size, dtype=torch.float64) for group in groups}
    for t, teacher in enumerate(teachers):
        tensors = {name: tensor.detach() for name, tensor in teacher.named_parameters()}
        for axis in groups.axes():
            if (
                axis.tensor not in tensors
                or axis.tensor.rpartition(".")[2] == "bias"
                or axis.tensor in groups.biases.values()
            ):
                continue
            outputs = groups.outputs.get(axis.tensor)
            share = 1 / len(teachers) if outputs is not None and bool((outputs.group == OUTPUT).any()) else 1.0
            values = tensors[axis.tensor].double().square() * share**2
            for number in np.unique(axis.units.group[axis.units.group >= 0]):
                group = groups[int(number)]
                rows = (
                    values.expand(len(axis.units.group), *values.shape)
                    if axis.dim is None
                    else values.movedim(axis.dim, 0)
                )
                places = torch.from_numpy(axis.units.places(int(number), group.size)).to(values.device)
                found[group.name][t] += rows[places].flatten(1).sum(1).cpu()
    return found

"""Neuron Transplantation: the largest channels of all teachers, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmerge.channels.groups import OUTPUT, ChannelGroups, squares
from fastmerge.methods.combination import check_weights, combine, places_of_kept
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


def magnitudes(teachers: Sequence[nn.Module], groups: ChannelGroups) -> dict[str, Tensor]:
    """The sum of squares of the weights that write and read each channel, in all teachers side by side.

    Weights that make the network's output count a T-th, as they do there. Biases don't count.

    Returns:
        By name of the group float64 (T, n).

    Raises:
        ValueError: a layer computes its weight from other tensors.
    """
    check_weights(teachers[0])
    found = {group.name: torch.zeros(len(teachers), group.size, dtype=torch.float64, device="cpu") for group in groups}
    for t, teacher in enumerate(teachers):
        biases = {name for name, _ in teacher.named_parameters() if name.rpartition(".")[2] == "bias"}
        biases.update(groups.biases.values())
        weights = {name: tensor for name, tensor in teacher.named_parameters() if name not in biases}
        for axis, number, own in squares(groups, weights):
            outputs = groups.outputs.get(axis.tensor)
            share = 1 / len(teachers) if outputs is not None and bool((outputs.group == OUTPUT).any()) else 1.0
            found[groups[number].name][t] += own * share**2
    return found

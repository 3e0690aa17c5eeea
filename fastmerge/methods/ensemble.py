"""The teachers side by side: the ceiling that one network of their size is compared with."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastmerge.channels.examples import register_dataclasses
from fastmerge.methods.registry import register


class Ensemble(nn.Module):
    """The mean of several networks' outputs.

    Whole numbers, such as those of classes, have no mean: they are what most networks say, the least of several. What is no
    tensor is the first one's.

    Args:
        networks: they are copied.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(copy.deepcopy(network) for network in networks)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        outputs = [network(*inputs, **kwargs) for network in self.networks]
        register_dataclasses(outputs)
        flat = [pytree.tree_flatten(output) for output in outputs]
        means = [_mean(values) for values in zip(*(leaves for leaves, _ in flat), strict=True)]
        return pytree.tree_unflatten(means, flat[0][1])


def _mean(values: Sequence[Any]) -> Any:
    first = values[0]
    if not isinstance(first, Tensor):
        return first
    if first.is_floating_point() or first.is_complex():
        return torch.stack([*values]).mean(0)
    return torch.stack([value.long() for value in values]).mode(0).values.to(first.dtype)


@register(
    "ensemble", needs="weights", source="L. Hansen & P. Salamon, Neural network ensembles (1990)", one_network=False
)
def ensemble(teachers: Sequence[nn.Module], batches: Iterable[Any] = ()) -> nn.Module:
    """The mean of the teachers' outputs, as large and as slow as all of them.

    Source: L. Hansen & P. Salamon, Neural network ensembles (1990).
    """
    return Ensemble(teachers)

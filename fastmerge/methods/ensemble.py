"""The teachers side by side: the ceiling that one network of their size is compared with."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastmerge.methods.registry import register


class Ensemble(nn.Module):
    """The mean of several networks' outputs.

    Args:
        networks: they are copied.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(copy.deepcopy(network) for network in networks)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        outputs = [pytree.tree_flatten(network(*inputs, **kwargs)) for network in self.networks]
        each = zip(*(leaves for leaves, _ in outputs), strict=True)
        means = [torch.stack(values).mean(0) if isinstance(values[0], Tensor) else values[0] for values in each]
        return pytree.tree_unflatten(means, outputs[0][1])


@register(
    "ensemble", needs="weights", source="L. Hansen & P. Salamon, Neural network ensembles (1990)", one_network=False
)
def ensemble(teachers: Sequence[nn.Module], batches: Iterable[Any] = ()) -> nn.Module:
    """The mean of the teachers' outputs, as large and as slow as all of them.

    Source: L. Hansen & P. Salamon, Neural network ensembles (1990).
    """
    return Ensemble(teachers)

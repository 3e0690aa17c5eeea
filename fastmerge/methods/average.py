"""The mean of the teachers' weights, as they are."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from fastmerge.methods.registry import register


@register("average", needs="weights", source="J. Utans, Weight averaging for neural networks (1996)")
@torch.no_grad()
def average(teachers: Sequence[nn.Module], batches: Iterable[Any] = ()) -> nn.Module:
    """The mean of all weights and statistics, channel i with channel i.

    Source: J. Utans, Weight averaging for neural networks (1996).
    """
    result = copy.deepcopy(teachers[0])
    states = [teacher.state_dict() for teacher in teachers]
    for name, tensor in result.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.stack([state[name] for state in states]).mean(0))
    return result

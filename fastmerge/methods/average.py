"""The mean of the teachers' weights, as they are."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from fastmerge.methods.registry import register
from fastmerge.stack import tensors_of
from fastmerge.validation import check_teachers


@register("average", needs="weights", source="J. Utans, Weight averaging for neural networks (1996)")
def average(teachers: Sequence[nn.Module], batches: Iterable[Any] = ()) -> nn.Module:
    """The mean of all weights and statistics, channel i with channel i.

    Raises:
        TypeError, ValueError: the teachers are not two or more of one class, structure and shapes, or not finite.

    Source: J. Utans, Weight averaging for neural networks (1996).
    """
    check_teachers(teachers)
    return mean_of(teachers)


@torch.no_grad()
def mean_of(networks: Sequence[nn.Module]) -> nn.Module:
    """The mean of networks of one architecture; what is no floating-point tensor is the first one's."""
    result = copy.deepcopy(networks[0])
    every = [tensors_of(network) for network in networks]
    for name, tensor in tensors_of(result).items():
        if tensor.is_floating_point():
            tensor.copy_(torch.stack([tensors[name] for tensors in every]).mean(0))
    return result

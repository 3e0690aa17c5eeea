"""The same function with its channels in another order."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fastmerge.channels.groups import ChannelGroups


@torch.no_grad()
def permute(
    network: nn.Module, groups: ChannelGroups, permutations: Mapping[str, Tensor | np.ndarray | Sequence[int]]
) -> nn.Module:
    """Returns a copy of a network that computes the same with its channels in another order.

    Heads of attention and blocks of grouped convolutions move as a whole.

    Args:
        network: it is not changed.
        groups: its channel groups, by :func:`fastmerge.channel_groups`.
        permutations: by name of the group, a permutation of the numbers 0 to n - 1: place p gets the channel that was in place
            ``permutation[p]``. Other groups stay as they are.

    Raises:
        ValueError: a name is no group's, or what is given is no permutation of its places.
    """
    orders = {groups.names[name]: order for name, order in _checked(groups, permutations).items()}
    result = copy.deepcopy(network)
    tensors = {**dict(result.named_parameters()), **dict(result.named_buffers())}
    for axis in groups.axes():
        if axis.dim is None:  # one entry of a unit's, or what all units share, has no order
            continue
        index = np.arange(len(axis.units.group))
        for number in orders.keys() & {*axis.units.numbers}:
            places = axis.units.places(number, groups[number].size)
            index[places] = places[orders[number]]
        if not np.array_equal(index, np.arange(len(index))):
            tensor = tensors[axis.tensor]
            tensor.copy_(tensor.index_select(axis.dim, torch.from_numpy(index).to(tensor.device)))
    return result


def _checked(
    groups: ChannelGroups, permutations: Mapping[str, Tensor | np.ndarray | Sequence[int]]
) -> dict[str, np.ndarray]:
    """Permutations as arrays, by name of the group.

    Raises:
        ValueError: see :func:`permute`.
    """
    found = {}
    for name, given in permutations.items():
        if name not in groups.names:
            raise ValueError(
                f"permutations need names of channel groups; got {name!r}, known are {', '.join(groups.names)}"
            )
        order, size = np.asarray(given.cpu() if isinstance(given, Tensor) else given), groups[groups.names[name]].size
        if order.dtype.kind not in "iu" or not np.array_equal(np.sort(order), np.arange(size)):
            raise ValueError(f"group '{name}' needs a permutation of 0 to {size - 1}; got {given}")
        found[name] = order
    return found

"""One network out of several, given which candidate goes to which place: averages and selections are both of this form."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastmerge.channels.groups import Axis, ChannelGroups
from fastmerge.stack import tensors_of

Places = Mapping[str, Tensor]
"""By name of the group, int64 (T, n): the place that channel j of teacher t gets in the student; -1 for none."""


def own_places(groups: ChannelGroups, count: int) -> dict[str, Tensor]:
    """Every channel in its own place: the plain average."""
    return {group.name: torch.arange(group.size, device="cpu").repeat(count, 1) for group in groups}


def places_of_kept(groups: ChannelGroups, count: int, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The places of candidates that are kept, in their order.

    Args:
        groups: the channel groups.
        count: of teachers.
        kept: by name of the group n candidates; t·n + j is channel j of teacher t.
    """
    found = {}
    for group in groups:
        places = torch.full((count * group.size,), -1, device="cpu")
        places[kept[group.name]] = torch.arange(group.size, device="cpu")
        found[group.name] = places.view(count, group.size)
    return found


def check_weights(network: nn.Module) -> None:
    """Raises a ValueError where a layer computes its weight from other tensors, so that its channels can't be combined."""
    for path, module in network.named_modules():
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"layer '{path}' computes its weights, so its channels can't be combined. Call "
                "torch.nn.utils.parametrize.remove_parametrizations on it in every teacher"
            )


@torch.no_grad()
def combine(networks: Sequence[nn.Module], groups: ChannelGroups, places: Places) -> nn.Module:
    """A network whose channels are the means of candidates of several networks.

    What belongs to a channel (rows of weights, biases, scales, statistics) is the mean of its candidates'. The weights by which
    layers read it are the sum of theirs: with M the matrix of means and U that of the places, a layer's weights W_t become
    ``Σ_t M_t W_t U_t``. The network's outputs are the mean of all networks'.

    Args:
        networks: of one architecture.
        groups: their channel groups.
        places: by name of the group, int64 (T, n): the place that channel j of teacher t gets; -1 leaves it out. Each place
            needs a candidate.

    Raises:
        ValueError: a layer computes its weight from other tensors, so that it can't be combined channel by channel.
    """
    check_weights(networks[0])
    result = copy.deepcopy(networks[0])
    tensors = [tensors_of(network) for network in (result, *networks)]
    shares = {name: _shares(each) for name, each in places.items()}
    axes: dict[str, list[Axis]] = {}
    for axis in groups.axes():
        axes.setdefault(axis.tensor, []).append(axis)
    for name, tensor in tensors[0].items():
        if not tensor.is_floating_point():
            continue
        parts = [each[name] for each in tensors[1:]]
        if name not in axes:
            tensor.copy_(torch.stack(parts).mean(0))
            continue
        total = torch.zeros_like(tensor)
        for t, part in enumerate(parts):
            for axis in axes[name]:
                part = _moved(part, axis, groups, places, shares, t, len(parts))
            total += part
        tensor.copy_(total)
    return result


def _moved(
    tensor: Tensor, axis: Axis, groups: ChannelGroups, places: Places, shares: Places, t: int, count: int
) -> Tensor:
    """One network's part in a tensor of the result, along one dimension."""
    length = len(axis.units.group)
    index = torch.arange(length, device="cpu")
    share = torch.full((length,), 1.0 if axis.reads else 1 / count, dtype=torch.float64, device="cpu")
    for number in axis.units.numbers:
        group = groups[number]
        where, to = torch.from_numpy(axis.units.places(number, group.size)), places[group.name][t]
        index[where] = torch.where(to[:, None] >= 0, where[to.clamp(min=0)], -1)
        share[where] = (to >= 0).double()[:, None] if axis.reads else shares[group.name][t][:, None]
    if axis.dim is None:
        return tensor * float(share.mean())
    valid = (index >= 0).nonzero().flatten()
    scale = share[valid].to(tensor).view([-1 if d == axis.dim else 1 for d in range(tensor.dim())])
    if len(valid) == length and torch.equal(index, torch.arange(length, device="cpu")):
        return tensor * scale
    moved = tensor.index_select(axis.dim, valid.to(tensor.device)) * scale
    return torch.zeros_like(tensor).index_add_(axis.dim, index[valid].to(tensor.device), moved)


def _shares(places: Tensor) -> Tensor:
    """What each candidate counts in the mean of its place: float64 (T, n), 0 for those without one."""
    counts = torch.bincount(places[places >= 0], minlength=places.shape[1])
    return torch.where(places >= 0, 1 / counts[places.clamp(min=0)].double(), 0.0)

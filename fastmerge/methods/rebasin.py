"""Git Re-Basin: the teachers' channels are matched, then averaged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastmerge.channels.groups import Axis, ChannelGroups, permute
from fastmerge.lock_step import Family
from fastmerge.methods.average import mean_of
from fastmerge.methods.registry import register
from fastmerge.methods.samples import exact, family_of, second_moments

_SWEEPS = 50


@torch.no_grad()
def _match_weights(
    references: Sequence[nn.Module],
    network: nn.Module,
    groups: ChannelGroups,
    seed: int = 0,
    *,
    front_to_back: bool = True,
) -> dict[str, np.ndarray]:
    """The order of a network's channels in which the inner product of its parameters with the mean of others' is the largest.

    Group by group, in random order, by a linear assignment, until no group changes (coordinate ascent). Beforehand, front to
    back, each group is matched by what it shares with those that were matched already, so that networks which are the same but
    for their order are matched exactly.

    Args:
        references: one or more networks.
        network: its channels are to be ordered.
        groups: their channel groups.
        seed: of the random order.
        front_to_back: whether to begin so.

    Returns:
        By name of the group a permutation for :func:`fastmerge.permute`.
    """
    means = _parameters(references)
    ordered = {name: tensor.clone() for name, tensor in _parameters([network]).items()}
    axes: list[list[Axis]] = [[] for _ in groups]
    others: dict[tuple[str, int], Axis] = {}
    for axis in groups.axes():
        if axis.tensor in means and axis.dim is not None:
            for number in axis.units.numbers:
                axes[number].append(axis)
            others[axis.tensor, axis.dim] = axis
    orders = [np.arange(group.size) for group in groups]

    def match(number: int, known: set[int] | None) -> bool:
        size = groups[number].size
        gain = torch.zeros(size, size, dtype=torch.float64, device="cpu")
        for axis in axes[number]:
            assert axis.dim is not None
            other = others.get((axis.tensor, 1 - axis.dim))
            part = None
            if other is not None and known is not None:
                part = np.flatnonzero(np.isin(other.units.group, [*known]) | (other.units.group < 0))
            places = axis.units.places(number, size)
            a, b = (_rows(each[axis.tensor], axis.dim, places, part) for each in (means, ordered))
            gain += (a @ b.T).double().cpu()
        order = _assign(gain)
        if np.array_equal(order, np.arange(size)):
            return False
        orders[number] = orders[number][order]
        for axis in axes[number]:
            assert axis.dim is not None
            index, places = np.arange(len(axis.units.group)), axis.units.places(number, size)
            index[places] = places[order]
            tensor = ordered[axis.tensor]
            ordered[axis.tensor] = tensor.index_select(axis.dim, torch.from_numpy(index).to(tensor.device))
        return True

    known: set[int] = set()
    for number in range(len(groups)) if front_to_back else ():
        match(number, known)
        known.add(number)
    neighbours: list[set[int]] = [set() for _ in groups]  # those that share a tensor, along its other dimension
    for number, own in enumerate(axes):
        for axis in own:
            other = others.get((axis.tensor, 1 - (axis.dim or 0)))
            neighbours[number] |= set() if other is None else {*other.units.numbers}
    waiting, random = set(range(len(groups))), np.random.default_rng(seed)
    for _ in range(_SWEEPS):
        for number in random.permutation(sorted(waiting)).tolist():
            waiting.discard(number)
            if match(number, None):
                waiting |= neighbours[number]
        if not waiting:
            break
    return {group.name: order for group, order in zip(groups, orders, strict=True)}


def _parameters(networks: Sequence[nn.Module]) -> dict[str, Tensor]:
    every = [dict(network.named_parameters()) for network in networks]
    return {name: torch.stack([exact(each[name].detach()) for each in every]).mean(0) for name in every[0]}


def _rows(tensor: Tensor, dim: int, places: np.ndarray, part: np.ndarray | None) -> Tensor:
    """What belongs to each place, of another dimension only a part: (places, values)."""
    if part is not None and len(part) < tensor.shape[1 - dim]:
        tensor = tensor.index_select(1 - dim, torch.from_numpy(part).to(tensor.device))
    return tensor.movedim(dim, 0)[torch.from_numpy(places).to(tensor.device)].flatten(1)


def _assign(gain: Tensor) -> np.ndarray:
    """Which column each row gets so that the sum is the largest."""
    from scipy.optimize import linear_sum_assignment  # takes long to import

    return np.asarray(linear_sum_assignment(gain.double().cpu().numpy(), maximize=True)[1])


def align(family: Family, by: str = "weights", seed: int = 0) -> list[nn.Module]:
    """The networks with their channels in the order of the first one's.

    By weights, of more than two networks each is matched in turn to the mean of the others, until nothing changes.

    Args:
        family: the networks and samples.
        by: "weights" or "activations".
        seed: of the order in which groups are matched.

    Raises:
        ValueError: ``by`` is neither.
    """
    first, *others = family.networks
    groups = family.groups
    if by == "activations":
        found = second_moments(family, family.networks, weighted=False)
        aligned = [first]
        for t, other in enumerate(others, 1):
            orders = {
                group.name: _assign(found[group.name].unflatten(1, (-1, group.size))[: group.size, t])
                for group in groups
                if group.name in found
            }
            aligned.append(permute(other, groups, orders))
        return aligned
    if by != "weights":
        raise ValueError(f'channels are matched by "weights" or "activations"; got {by!r}')
    aligned = [first, *(permute(other, groups, _match_weights([first], other, groups, seed)) for other in others)]
    for _ in range(_SWEEPS if len(others) > 1 else 0):
        changed = False
        for t in range(len(aligned)):
            rest = [network for number, network in enumerate(aligned) if number != t]
            orders = _match_weights(rest, aligned[t], groups, seed, front_to_back=False)
            if any(not np.array_equal(order, np.arange(len(order))) for order in orders.values()):
                aligned[t], changed = permute(aligned[t], groups, orders), True
        if not changed:
            break
    return aligned


@register("rebasin", needs="weights", source="S. Ainsworth et al., Git Re-Basin (arXiv 2209.04836)")
def rebasin(
    teachers: Sequence[nn.Module],
    batches: Iterable[Any],
    *,
    by: str = "weights",
    samples: int = 512,
    seed: int = 0,
) -> nn.Module:
    """The mean of the weights, with channels matched to the first teacher's by a linear assignment.

    Args:
        teachers: two or more.
        batches: of the data; of weights alone, an example of the inputs.
        by: "weights": the inner product of the parameters is made as large as can be; "activations": the sum of the
            correlations of what layers read.
        samples: for activations.
        seed: of the order in which groups are matched by weights.

    Source: S. Ainsworth et al., Git Re-Basin (arXiv 2209.04836).
    """
    family = family_of(teachers, batches, samples if by == "activations" else 2)
    return mean_of(align(family, by, seed))

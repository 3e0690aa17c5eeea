"""Channel groups: the channels that compete for the same places, where they lie in every tensor, and another order of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

SHARED = -1  # network input without any parameter of its own: the same for all teachers
OUTPUT = -2  # the network's output: averaged


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that compete for the same places.

    Attributes:
        name: readable and unique, a valid key of ``nn.ModuleDict``.
        size: places (slots) per network, n.
        channels: channels per place: 1, or more for blocks of a grouped convolution.
        producers: layers (and other parameters) that write these channels.
        consumers: layers that read them.
    """

    name: str
    size: int
    channels: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """How much there is to choose in a network.

    Attributes:
        groups: the number of channel groups.
        channels: hidden channels, each counted once for every layer that writes it; of a group that layers read more of,
            as many as the one that reads most.
        fixed: those of them in groups of one place, which are all one teacher's.
    """

    groups: int
    channels: int
    fixed: int

    @property
    def fixed_share(self) -> float:
        """The share of channels without a choice, in 0..1; 1 where there is no channel."""
        return self.fixed / self.channels if self.channels else 1.0

    @property
    def is_small(self) -> bool:
        """Whether most channels have no choice."""
        return self.fixed_share > 0.5

    def __str__(self) -> str:
        fixed = (
            f"{self.fixed} of them ({self.fixed_share:.0%}) in groups of one place, kept from one teacher as a whole"
        )
        found = f"{self.groups} channel group{'s' if self.groups != 1 else ''}, {self.channels} hidden channels"
        return f"{found}, {fixed}" if self.fixed or not self.channels else found


@dataclass(frozen=True, eq=False)
class AxisUnits:
    """Where the units lie along one dimension.

    Attributes:
        group: int64 per index; number of the group, SHARED or OUTPUT.
        place: int64 per index; the unit's place within its group, 0 where there is no group.
    """

    group: np.ndarray
    place: np.ndarray

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AxisUnits):
            return NotImplemented
        return np.array_equal(self.group, other.group) and np.array_equal(self.place, other.place)

    @property
    def numbers(self) -> list[int]:
        """The numbers of the groups that lie here, ascending."""
        return [number for number in np.unique(self.group).tolist() if number >= 0]

    def places(self, number: int, size: int) -> np.ndarray:
        """Where a group's places lie along the dimension: int64 (size, entries per place), (size, 0) where it has none here."""
        where = np.flatnonzero(self.group == number)
        return where[np.argsort(self.place[where], kind="stable")].reshape(size, -1 if len(where) else 0)


class Axis(NamedTuple):
    """A dimension of a tensor along which channels lie.

    Attributes:
        tensor: name of the parameter or buffer.
        dim: the dimension; None: the tensor as a whole belongs to one unit, or is one value that acts on several.
        units: of its entries; of a tensor as a whole, those that it belongs to or acts on.
        reads: whether it is a dimension along which a layer reads channels; else the tensor's entries are the channels' own.
    """

    tensor: str
    dim: int | None
    units: AxisUnits
    reads: bool = False


@dataclass(frozen=True)
class ChannelGroups:
    """What running a network on channel ids found.

    Iterates over its :class:`ChannelGroup` items; ``str()`` is a table.

    Attributes:
        groups: the groups, in the order of the network.
        inputs: per layer (by weight name) the units its input dimension reads.
        outputs: per layer the units its output dimension writes.
        tensors: per other parameter or buffer its units and the dimension they lie along; None: kept as a whole, or one value
            that acts on all units that there are.
        reads: per (mode, node name) of a layer call, the units it reads.
        sample_dims: per (mode, node name) of a layer call, the dimension along which the samples lie in what it reads.
        fast_samples: (mode, node name) pairs of those where the samples are the faster index of that dimension.
        kept_whole: (layer, operation) pairs that mix channels, which therefore are kept from one teacher as a whole.
        biases: per layer that has a bias, its name.
        transposed: the layers whose weights have inputs before outputs.
    """

    groups: list[ChannelGroup]
    inputs: dict[str, AxisUnits]
    outputs: dict[str, AxisUnits]
    tensors: dict[str, tuple[int | None, AxisUnits]]
    reads: dict[tuple[str, str], AxisUnits]
    sample_dims: dict[tuple[str, str], int]
    fast_samples: frozenset[tuple[str, str]] = frozenset()
    kept_whole: list[tuple[str, str]] = field(default_factory=list)
    biases: dict[str, str] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()

    @property
    def names(self) -> dict[str, int]:
        """The groups' numbers by name."""
        return {group.name: number for number, group in enumerate(self.groups)}

    def axes(self) -> Iterator[Axis]:
        """Every dimension of every parameter and buffer along which channels lie, each once.

        A grouped layer has one: its blocks, each of which is a unit.
        """
        seen = set(self.tensors)
        for weight, units in self.outputs.items():
            if weight in self.tensors:
                continue
            written = int(weight in self.transposed)
            yield Axis(weight, written, units)
            yield Axis(weight, 1 - written, self.inputs[weight], reads=True)
            bias = self.biases.get(weight)
            if bias is not None and bias not in seen:
                seen.add(bias)
                yield Axis(bias, 0, units)
        for name, (dim, units) in self.tensors.items():
            yield Axis(name, dim, units)

    def acts_on_several(self, name: str) -> bool:
        """Whether a parameter or buffer is one value that acts on several units, such as the one slope of a PReLU."""
        dim, units = self.tensors.get(name, (0, None))
        return dim is None and units is not None and len(units.group) > 1

    def __deepcopy__(self, memo: dict[int, Any]) -> ChannelGroups:
        return self  # nobody changes them

    def same_channels(self, other: ChannelGroups) -> bool:
        """Whether two runs of a network found the same groups, lying in the same places of its tensors."""
        same = self.groups == other.groups and self.tensors == other.tensors
        return same and (self.inputs, self.outputs) == (other.inputs, other.outputs)

    @property
    def choice(self) -> Choice:
        """How much there is to choose."""
        written, read = np.zeros(len(self), dtype=np.int64), np.zeros(len(self), dtype=np.int64)
        for units in self.outputs.values():
            written += self._per_group(units)
        for units in self.inputs.values():
            read = np.maximum(read, self._per_group(units))
        channels = np.maximum(written, read)
        fixed = [number for number, group in enumerate(self.groups) if group.size == 1]
        return Choice(len(self), int(channels.sum()), int(channels[fixed].sum()))

    def _per_group(self, units: AxisUnits) -> np.ndarray:
        return np.bincount(units.group[units.group >= 0], minlength=len(self))

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[ChannelGroup]:
        return iter(self.groups)

    def __getitem__(self, index: int) -> ChannelGroup:
        return self.groups[index]

    def __str__(self) -> str:
        rows = [("group", "places", "channels", "written by", "read by")]
        rows += [
            (g.name, str(g.size), str(g.channels), ", ".join(g.producers), ", ".join(g.consumers)) for g in self.groups
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            f"{row[0]:{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]} -> {row[4]}" for row in rows
        ]
        notes = [f"kept from one teacher as a whole: what {where} mixes ({what})" for where, what in self.kept_whole]
        return "\n".join([*lines, *notes])


def squares(groups: ChannelGroups, tensors: Mapping[str, Tensor]) -> Iterator[tuple[Axis, int, Tensor]]:
    """How large channels are: for each dimension along which they lie in some tensors, and each group there, the sum of squares
    of every place's entries, float64 (n,) on the CPU."""
    for axis in groups.axes():
        if axis.tensor in tensors:
            values = tensors[axis.tensor].detach().double().square()
            entries = (
                values.expand(len(axis.units.group), *values.shape) if axis.dim is None else values.movedim(axis.dim, 0)
            )
            for number in axis.units.numbers:
                places = torch.from_numpy(axis.units.places(number, groups[number].size)).to(values.device)
                yield axis, number, entries[places].flatten(1).sum(1).cpu()


def choice_warning(groups: ChannelGroups) -> str:
    """What to warn of where most channels of a network have no choice; else empty."""
    choice = groups.choice
    if not choice.is_small:
        return ""
    causes = ", ".join(f"{where} ({what})" for where, what in groups.kept_whole[:5])
    more = f" and {len(groups.kept_whole) - 5} more" if len(groups.kept_whole) > 5 else ""
    mixed = f". Operations that mix channels: {causes}{more}" if causes else ""
    return (
        f"most of this network is kept from one teacher as a whole: it has {choice}{mixed}. "
        "A merge has little to gain there; fastmerge.check(*teachers) lists all such operations"
    )


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

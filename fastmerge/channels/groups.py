"""Channel groups: the channels that compete for the same places, and where they lie in every tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

SHARED = -1  # network input without any parameter of its own: the same for all teachers
OUTPUT = -2  # the network's output: averaged


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that compete for the same places.

    Attributes:
        name: readable and unique, a valid key of ``nn.ModuleDict``.
        size: places per network, n.
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
class AxisUnits:
    """Where the units lie along one dimension.

    Attributes:
        group: int64 per index; number of the group, SHARED or OUTPUT.
        place: int64 per index; the unit's place within its group, 0 where there is no group.
    """

    group: np.ndarray
    place: np.ndarray

    @property
    def has_groups(self) -> bool:
        return bool((self.group >= 0).any())


@dataclass(frozen=True)
class ChannelGroups:
    """What running a network on channel ids found.

    Iterates over its :class:`ChannelGroup` items; ``str()`` is a table.

    Attributes:
        groups: the groups, in the order of the network.
        inputs: per layer (by weight name) the units its input dimension reads.
        outputs: per layer the units its output dimension writes.
        tensors: per other parameter or buffer its units and the dimension they lie along; None: kept as a whole.
        reads: per (mode, node name) of a layer call, the units it reads.
        sample_dims: per (mode, node name) of a layer call, the dimension along which the samples lie in what it reads.
        kept_whole: (layer, operation) pairs that mix channels, which therefore are kept from one teacher as a whole.
    """

    groups: list[ChannelGroup]
    inputs: dict[str, AxisUnits]
    outputs: dict[str, AxisUnits]
    tensors: dict[str, tuple[int | None, AxisUnits]]
    reads: dict[tuple[str, str], AxisUnits]
    sample_dims: dict[tuple[str, str], int]
    kept_whole: list[tuple[str, str]] = field(default_factory=list)

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

"""Parts of a network's depth, and which channels stand for a group whose gates are not learned yet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from fastmerge.channels.groups import ChannelGroups, squares
from fastmerge.wide.analysis import Analysis


def activation_counts(analysis: Analysis) -> list[float]:
    """Of each channel group, how many of its values layers read and write in a training forward on the traced inputs."""
    groups = analysis.groups
    found = np.zeros(len(groups))
    for node, call in analysis.calls["train"].items():
        for units, value in (
            (groups.reads.get(("train", node.name)), call.input),
            (groups.outputs.get(call.weight), node),
        ):
            shape = analysis.shapes.get(("train", value.name))
            if units is not None and shape is not None:
                own = units.group[units.group >= 0]
                found += np.bincount(own, minlength=len(groups)) / len(units.group) * math.prod(shape)
    return [float(value) for value in found]


def consecutive_parts(sizes: Sequence[float], count: int) -> list[range]:
    """Cuts a sequence into so many parts, none of them empty, whose largest sum is the least that it can be."""

    @cache
    def best(start: int, left: int) -> tuple[float, tuple[int, ...]]:
        """The largest sum of the parts from an index on, and where they end."""
        if left == 1:
            return sum(sizes[start:]), (len(sizes),)
        found = []
        for end in range(start + 1, len(sizes) - left + 2):
            largest, ends = best(end, left - 1)
            found.append((max(sum(sizes[start:end]), largest), (end, *ends)))
        return min(found)

    ends = best(0, count)[1]
    return [range(start, end) for start, end in zip((0, *ends), ends, strict=False)]


def magnitudes(groups: ChannelGroups, teacher: nn.Module) -> dict[str, Tensor]:
    """Per channel of each group the norm of the weights that write it times the norm of those that read it: (n,)."""
    sums = [torch.zeros(2, group.size, dtype=torch.float64, device="cpu") for group in groups]
    for axis, number, own in squares(groups, dict(teacher.named_parameters())):
        if axis.dim is not None:
            sums[number][int(axis.reads)] += own
    return {group.name: own.prod(0).sqrt() for group, own in zip(groups, sums, strict=True)}


def representatives(
    groups: ChannelGroups, teachers: Sequence[nn.Module], widths: Mapping[str, int]
) -> dict[str, Tensor]:
    """Of each group as many candidates as the student has, equally many of each teacher: those of the largest weights.

    Returns:
        int64 ascending, (width,) per group name; candidate t·n + j is channel j of teacher t.
    """
    each = [magnitudes(groups, teacher) for teacher in teachers]
    chosen = {}
    for group in groups:
        width = widths[group.name]
        counts = [width // len(teachers) + (t < width % len(teachers)) for t in range(len(teachers))]
        kept = [
            own[group.name].topk(n).indices + t * group.size
            for t, (own, n) in enumerate(zip(each, counts, strict=True))
        ]
        chosen[group.name] = torch.cat(kept).sort().values
    return chosen

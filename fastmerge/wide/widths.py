"""How many channels of each group a student has: as many as a teacher, fewer or more."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from fastmerge.channels.aten import LAYER_NORMS, op_name
from fastmerge.channels.groups import AxisUnits, ChannelGroups
from fastmerge.channels.written_norms import BY_WIDTH
from fastmerge.problems import Problem, UnmergeableError
from fastmerge.wide.analysis import Analysis
from fastmerge.wide.population import Population

LEAST = 0.25  # of a teacher's channels, up to all teachers' together

Keep = float | Mapping[str, float] | None


def student_widths(groups: ChannelGroups, num_teachers: int, keep: Keep) -> dict[str, int]:
    """Channels of each group that the student has.

    Args:
        groups: n channels each.
        num_teachers: T.
        keep: of a teacher's channels, as a fraction of n in 1/4..T or, as a whole number above T, their number; of all
            groups of more than one channel, or by name of the group; None: n.

    Raises:
        ValueError: a name is no group's, or a number is out of range.
    """
    if isinstance(keep, Mapping):
        unknown = [name for name in keep if name not in groups.names]
        if unknown:
            raise ValueError(
                f"keep needs names of channel groups; got {unknown[0]!r}, known are {', '.join(groups.names)}"
            )
        return {g.name: _width(g.name, g.size, num_teachers, keep.get(g.name, 1.0)) for g in groups}
    return {
        g.name: g.size if g.size == 1 else _width(g.name, g.size, num_teachers, 1.0 if keep is None else keep)
        for g in groups
    }


def _width(name: str, size: int, num_teachers: int, value: Any) -> int:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    is_count = fits and isinstance(value, int) and value > num_teachers
    if not fits or not LEAST <= (value / size if is_count else value) <= num_teachers:
        raise ValueError(
            f"keep needs a fraction of a teacher's channels, {LEAST:g}..{num_teachers}, or a whole number of channels above "
            f"{num_teachers}; group '{name}' has {size}, so {math.ceil(LEAST * size)}..{num_teachers * size}; got {value!r}"
        )
    return int(value) if is_count else max(1, round(value * size))


def check_widths(
    analysis: Analysis, population: Population, widths: Mapping[str, int], whole: Mapping[int, str]
) -> None:
    """Checks that the network's code takes other numbers of channels.

    Args:
        analysis: of the first teacher.
        population: whose candidates the student keeps some of.
        widths: by name of the group.
        whole: groups whose number of channels the code may count on, and why.

    Raises:
        ValueError: naming the group, and what counts on its channels.
    """
    groups, why = analysis.groups, dict(whole)

    def keeps_all(units: AxisUnits) -> bool:
        """Then the same gates stand for all teachers apart and for the student."""
        return population.kept(units) == population.num_teachers * len(units.group)

    for (mode, name), units in groups.reads.items():
        node = next(n for n in analysis.traced.graphs[mode].nodes if n.name == name)
        call = analysis.calls[mode].get(node)
        computed = call is not None and (call.rows is not None or call.is_tied)
        for number in units.numbers:
            if computed or node.meta.get(BY_WIDTH):
                kind = f"'{op_name(node)}'" if call is None else f"'{call.name}', whose weight is shared or computed"
                why.setdefault(number, f"is read by {kind}, which depends on the number of channels")
            elif op_name(node) in LAYER_NORMS and keeps_all(units):
                kind = f"'{op_name(node)}', which is exact only with fewer channels than all teachers have together"
                why.setdefault(number, f"is read by {kind}")
    for axis in groups.axes():
        for number in axis.units.numbers:
            if groups.acts_on_several(axis.tensor) and keeps_all(axis.units):
                why.setdefault(
                    number,
                    f"shares '{axis.tensor}', which is exact only with fewer channels than all teachers have together",
                )
            elif not _lies_in_runs(axis.units, number, groups[number].size):
                why.setdefault(
                    number, f"lies in '{axis.tensor}' in an order that another number of channels does not have"
                )
    for number, group in enumerate(groups):
        if widths[group.name] != group.size and number in why:
            width = f"{widths[group.name]} channels in place of {group.size}"
            what = f"keep can't give group '{group.name}' {width}: it {why[number]}"
            raise UnmergeableError(Problem(what, "leave it out: keep={name: width} for the others"))


def runs(units: AxisUnits) -> Iterator[tuple[int, int, int]]:
    """Pieces of a dimension as (group's number, start, end), within which places ascend; -1 and -2 where there is no group."""
    group, place = units.group, units.place
    breaks = np.flatnonzero((group[1:] != group[:-1]) | ((group[1:] >= 0) & (place[1:] < place[:-1]))) + 1
    edges = [0, *breaks.tolist(), len(group)]
    for start, end in pairwise(edges):
        if end > start:
            yield int(group[start]), start, end


def _lies_in_runs(units: AxisUnits, number: int, size: int) -> bool:
    """Whether a group's places lie in order, equally many entries of each, once or several times over."""
    for found, start, end in runs(units):
        entries = (end - start) // size
        if found == number and not np.array_equal(units.place[start:end], np.repeat(np.arange(size), max(entries, 1))):
            return False
    return True

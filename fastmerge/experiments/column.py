"""One network of each replicate of an experiment, and what it took to get there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from fastmerge.history import History

_EACH = ("networks", "values", "curves", "histories")  # of a column, an entry per replicate
_TOTALS = ("epochs", "cost", "seconds")  # of a column, of all replicates together
Curve = list[tuple[int, dict[str, float]]]


@dataclass
class Column:
    """One network of each replicate, and what it took to get there.

    Attributes:
        networks: in the order of the replicates; None for one that diverged.
        values: the recipe's metric on the test data; NaN for one that diverged.
        curves: for each replicate, figures by epoch, counting the epochs of all networks so far.
        histories: of the last stage of training.
        epochs: of all networks so far.
        cost: the same in epochs of one teacher, by counted operations.
        seconds: of training, of all networks so far.
    """

    networks: list[nn.Module | None]
    values: list[float]
    curves: list[Curve] = field(default_factory=list)
    histories: list[History | None] = field(default_factory=list)
    epochs: int = 0
    cost: float = 0.0
    seconds: float = 0.0

    @classmethod
    def lost(cls, count: int) -> Column:
        """Of so many replicates, all of which have diverged."""
        return cls([None] * count, [math.nan] * count, [[] for _ in range(count)], [None] * count)

    def only(self, rows: Sequence[int]) -> Column:
        """Some of its replicates, by their positions."""
        each: Any = {name: [getattr(self, name)[row] for row in rows] for name in _EACH}
        return replace(self, **each)

    def spread(self, rows: Sequence[int], count: int) -> Column:
        """Its replicates at their positions among more; those between have diverged."""
        each: Any = {name: getattr(Column.lost(count), name) for name in _EACH}
        for name, values in each.items():
            for row, value in zip(rows, getattr(self, name), strict=True):
                values[row] = value
        return replace(self, **each)

    def after(self, columns: Sequence[Column]) -> Column:
        """The same with what it took to get to others, from which it was made."""
        totals: Any = {name: getattr(self, name) + sum(getattr(c, name) for c in columns) for name in _TOTALS}
        return replace(self, **totals)


def joined(parts: Sequence[Column]) -> Column:
    """Columns of other replicates as one."""
    each: Any = {name: [value for part in parts for value in getattr(part, name)] for name in _EACH}
    cost, seconds = max(part.cost for part in parts), sum(part.seconds for part in parts)
    return replace(parts[0], **each, cost=cost, seconds=seconds)


def picked(columns: Sequence[Column], which: Sequence[int]) -> Column:
    """Of each replicate the network of one of the columns, by its number; it counts what all took."""
    each: Any = {name: [getattr(columns[number], name)[row] for row, number in enumerate(which)] for name in _EACH}
    each["curves"] = [[(len(columns) * epoch, figures) for epoch, figures in curve] for curve in each["curves"]]
    return Column(**each).after(columns)


def curve_of(history: History, first: int) -> Curve:
    """Figures of each epoch that was scored, after so many epochs of other networks."""
    found = []
    for number, record in enumerate(history.epochs, start=1):
        if record.val is not None:
            figures = {"train_loss": record.train.loss, "test_loss": record.val.loss}
            if record.val.accuracy is not None:
                figures["test_accuracy"] = record.val.accuracy
            found.append((first + number, figures))
    return found


def mean_curve(curves: Sequence[Curve]) -> Iterator[tuple[int, dict[str, float]]]:
    """Networks side by side: the mean of their figures, at the sum of their epochs."""
    for each in zip(*curves, strict=False):
        names = each[0][1]
        figures = {name: sum(values[name] for _, values in each) / len(each) for name in names}
        yield sum(epoch for epoch, _ in each), figures

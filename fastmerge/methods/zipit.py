"""ZipIt!: the most alike channels are merged, within a teacher too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastmerge.channels.aten import bind, op_name
from fastmerge.methods.combination import combine
from fastmerge.methods.registry import register
from fastmerge.methods.repair import reset_statistics
from fastmerge.methods.samples import family_of, second_moments


@register("zipit", needs="samples", source="G. Stoica et al., ZipIt! (arXiv 2305.03053)")
@torch.no_grad()
def zipit(
    teachers: Sequence[nn.Module],
    batches: Iterable[Any],
    *,
    samples: int = 512,
    again: float = 0.3,
    within: float = 0.125,
    recalibrate: bool = True,
) -> nn.Module:
    """The mean of channels that are the most alike on samples, of different teachers or of one.

    Args:
        teachers: two or more.
        batches: of the data.
        samples: that correlations are taken over.
        again: factor of a merged channel's correlations; below 1 it is less likely to be merged again. The paper's α.
        within: largest fraction of a teacher's merges that may join two of its own channels. The paper's β.
        recalibrate: whether BatchNorm gets the statistics of the samples; else the means of its teachers'.

    Source: G. Stoica et al., ZipIt! (arXiv 2305.03053).
    """
    family = family_of(teachers, batches, samples)
    found = second_moments(family, teachers, weighted=False)
    places = {}
    for group in family.groups:
        correlations = found.get(group.name, torch.eye(group.size, device="cpu").repeat(len(teachers), len(teachers)))
        places[group.name] = zipped(correlations, len(teachers), again, within)
    result = combine(teachers, family.groups, places)
    for moment in family.run([result]) if recalibrate else ():
        if op_name(moment.node) == "batch_norm" and bind(moment.node)["running_mean"] is not None:
            reset_statistics(moment, result)
    return result


def zipped(correlations: Tensor, count: int, again: float, within: float) -> Tensor:
    """Merges the most alike candidates until as many are left as a teacher has.

    Args:
        correlations: (T·n, T·n).
        count: T.
        again: see :func:`zipit`.
        within: likewise.

    Returns:
        int64 (T, n): the place of each candidate, places in the order of their first candidates.
    """
    alike = correlations.double().cpu().numpy().copy()
    total, size = len(alike), len(alike) // count
    np.fill_diagonal(alike, -np.inf)
    free = alike.copy()  # without a budget
    owner, cluster, left = np.arange(total) // size, np.arange(total), np.ones(total, dtype=bool)
    budget = np.full(count, int((total - size) // count * within + 1e-4))
    for t in range(count):
        if budget[t] <= 0:
            alike[np.ix_(owner == t, owner == t)] = -np.inf
    best = alike.argmax(1)
    for _ in range(total - size):
        highest = alike[np.arange(total), best]
        highest[~left] = -np.inf
        if highest.max() == -np.inf:  # of three networks and more the budgets can leave no pair
            alike, budget = free, np.full(count, total)
            best = alike.argmax(1)
            highest = np.where(left, alike[np.arange(total), best], -np.inf)
        a = int(highest.argmax())
        a, b = sorted((a, int(best[a])))
        within_one = owner[a] == owner[b]
        cluster[cluster == b], left[b] = a, False
        for table in (free, alike):
            merged = np.minimum(table[a], table[b])
            merged = np.where(np.isfinite(merged), again * merged, -np.inf)
            merged[[a, b]] = -np.inf
            table[a], table[:, a], table[b], table[:, b] = merged, merged, -np.inf, -np.inf
        changed = left & ((best == a) | (best == b) | (merged > alike[np.arange(total), best]))
        if within_one:
            budget[owner[a]] -= 1
            if budget[owner[a]] <= 0:
                own = left & (owner == owner[a])
                alike[np.ix_(own, own)] = -np.inf
                changed |= own
        changed[a] = True
        best[changed] = alike[changed].argmax(1)
    _, places = np.unique(cluster, return_inverse=True)
    return torch.from_numpy(places.reshape(count, size))

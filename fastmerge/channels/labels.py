"""Numbers for ids: of the component they belong to, of their order among equals, hashes of what they go through."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def connected(count: int, pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The smallest member of each id's connected component.

    Args:
        count: number of ids.
        pairs: edges, as two int64 arrays of equal length each.
    """
    label = np.arange(count)
    if not pairs:
        return label
    a, b = (np.concatenate(side) for side in zip(*pairs, strict=True))
    while True:
        la, lb = label[a], label[b]
        if np.array_equal(la, lb):
            return label
        low = np.minimum(la, lb)
        np.minimum.at(label, la, low)
        np.minimum.at(label, lb, low)
        while not np.array_equal(label[label], label):
            label = label[label]


def occurrence(values: np.ndarray) -> np.ndarray:
    """For each element, how many equal ones stand before it."""
    order = np.argsort(values, kind="stable")
    sorted_values = values[order]
    starts = np.r_[True, np.diff(sorted_values) != 0] if len(values) else np.zeros(0, dtype=bool)
    index = np.arange(len(values))
    result = np.empty(len(values), dtype=np.int64)
    result[order] = index - np.maximum.accumulate(np.where(starts, index, 0)) if len(values) else 0
    return result


def mix(*values: Any) -> np.ndarray:
    """A 64-bit hash of equally long integer arrays, element by element (splitmix64 rounds)."""
    h: NDArray[np.uint64] = np.array(0x9E3779B97F4A7C15, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for value in values:
            h = h ^ np.asarray(value).astype(np.uint64)
            h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            h = h ^ (h >> np.uint64(31))
    return h

"""What paired trials share: seeds, batches, scores with standard errors, and a file that grows by a record each replicate."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from fastmerge.environment import environment
from fastmerge.files import atomic

Data = tuple[Tensor, Tensor]


class Shuffled:
    """Batches of images in another order in each pass."""

    def __init__(self, data: Data, batch: int, seed: int) -> None:
        self.data, self.batch = data, batch
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.data[1]) // self.batch

    def __iter__(self) -> Iterator[Data]:
        order = torch.randperm(len(self.data[1]), generator=self.generator)
        for index in order[: len(self) * self.batch].split(self.batch):
            yield self.data[0][index], self.data[1][index]


def hash_of(*parts: object) -> int:
    """A seed that depends on nothing but its parts."""
    number = 0
    for byte in repr(parts).encode():
        number = (number * 257 + byte) % (2**31 - 1)
    return number


def accuracy(model: Callable[[Tensor], Tensor], data: Data) -> float:
    with torch.no_grad():
        right = sum(
            (model(x).argmax(1) == y).sum() for x, y in zip(data[0].split(500), data[1].split(500), strict=True)
        )
    return float(right) / len(data[1])


def error(values: Sequence[float]) -> float:
    """The standard error of a mean."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan


def mean_text(found: Sequence[float]) -> str:
    """A mean with its standard error; empty without any."""
    return "" if not found else f"{fmean(found):.2f} ± {error(found):.2f}"


def made_with(made: Mapping[str, Any]) -> str:
    """PyTorch, processor and commit of an environment; a copy of the sources has no commit."""
    commit = f", commit {made['commit'][:10]}" if made["commit"] else ""
    return f"PyTorch {made['torch']}, {made['cpu']['name']}, one core{commit}"


def gaps_text(found: Sequence[float]) -> str:
    """A mean difference with its sign and standard error; empty without any."""
    return "" if not found else f"{fmean(found):+.2f} ± {error(found):.2f}"


def verdict_of(gaps: Sequence[float], ahead: str, behind: str) -> str:
    """Which of two words holds of paired differences that lie more than two standard errors from 0, or neither."""
    if not abs(fmean(gaps)) > 2 * error(gaps):  # of one, whose error is not known, nothing can be told
        return "no clear difference"
    return ahead if fmean(gaps) > 0 else behind


def load_records(path: Path) -> dict[str, Any]:
    """The records of a file, none where nothing was measured."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {"replicates": []}


def measure_missing(
    path: Path, seeds: Sequence[int], measure: Callable[[int], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Adds a record to a file for each seed that has none there, and gives it when it is written."""
    kept = load_records(path)
    for seed in seeds:
        if any(record["seed"] == seed for record in kept["replicates"]):
            continue
        record = measure(seed)
        kept["replicates"].append(record)
        kept["environment"] = environment()
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        yield record

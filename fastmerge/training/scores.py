"""How good the networks of a stack are on test data, and what is remembered of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from fastmerge.data.dataset import Dataset
from fastmerge.training.stack import Stack
from fastmerge.training.stacks import Stacks
from fastmerge.training.stage import Criterion

_VALUES_AT_ONCE = 2**20  # of input or of a hidden layer like the sine's, in all networks together


def score(stack: Stack | Stacks, data: Dataset, criterion: Criterion) -> dict[str, Tensor]:
    """Tests every network, in eval mode.

    Returns:
        ``test_loss`` and, where targets are classes, ``test_accuracy`` in 0..1, each (R,), on the CPU.
    """
    per_sample = len(stack) * max(100, math.prod(data.test_inputs.shape[1:]))
    count = max(1, _VALUES_AT_ONCE // per_sample)
    sums: dict[str, Tensor] = {}
    for inputs, targets in zip(data.test_inputs.split(count), data.test_targets.split(count), strict=True):
        outputs = stack(data.normalise(inputs))
        values = {"test_loss": vmap(criterion, in_dims=(0, None))(outputs, targets) * len(inputs)}
        if data.classes is not None:
            values["test_accuracy"] = (outputs.argmax(2) == targets).sum(1)
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + value.double()
    return {name: (value / len(data.test_inputs)).cpu() for name, value in sums.items()}


class Curves:
    """Values per epoch of a strategy, one per replicate, as the plots read them.

    Args:
        replicates: how many.
    """

    def __init__(self, replicates: int) -> None:
        self.replicates = replicates
        self.epochs: list[int] = []
        self.series: dict[str, list[list[float]]] = {}

    def add(self, epoch: int, values: Mapping[str, Tensor]) -> None:
        """Appends one value per replicate to every series."""
        self.epochs.append(epoch)
        for name, value in values.items():
            self.series.setdefault(name, []).append([float(f"{number:.6g}") for number in value.tolist()])

    def to_dict(self) -> dict[str, Any]:
        """``{"epochs": [...], series: [[one per replicate] per epoch]}``."""
        return {"epochs": self.epochs, **self.series}

    def restore(self, saved: dict[str, Any]) -> None:
        """Becomes what a :meth:`to_dict` tells."""
        self.series = {name: values for name, values in saved.items() if name != "epochs"}
        self.epochs = saved["epochs"]


def spread(values: Tensor, rows: list[int], size: int) -> Tensor:
    """Puts values of some replicates in their places among all; NaN stands for the others.

    Args:
        values: (len(rows), ...).
        rows: the places.
        size: how many replicates there are.
    """
    full = torch.full((size, *values.shape[1:]), math.nan, dtype=values.dtype)
    full[rows] = values
    return full

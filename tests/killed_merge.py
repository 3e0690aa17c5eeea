"""A merge that can be killed at so many calls of its criterion.

Its network draws random numbers, its data is changed at random in the main process and in a DataLoader's, and it links in
the middle of the merge stage, so that going on bit for bit takes every part of the state.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from fastmerge import History, merge
from killing import die
from small_task import VAL, X, Y

STEPS = 4  # per epoch
EPOCHS = {"merge_epochs": 4, "finetune_epochs": 3}


class DropNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.norm(self.conv(x)).relu().flatten(1)))


class Noisy(Dataset):
    def __len__(self) -> int:
        return 16 * STEPS

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return X[index] + 0.1 * torch.randn(()), Y[index]


class TwiceNoisy(DataLoader):
    """Noise from torch in the loader's process, from Python and NumPy in this one."""

    def __iter__(self) -> Any:
        for x, y in super().__iter__():
            yield x * (1 + 0.1 * random.random()) + 0.1 * np.random.rand(), y


def run(directory: Path | None, calls: int | None = None, act: Callable[[], None] | None = None, **options: Any) -> Any:
    """Merges; calls ``act`` at so many calls of the criterion."""
    made = 0

    def criterion(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        nonlocal made
        made += 1
        if made == calls and act is not None:
            act()
        return cross_entropy(output, target)

    random.seed(0)
    np.random.seed(0)
    teachers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        teachers.append(DropNet().eval())
    loader = TwiceNoisy(Noisy(), 16, shuffle=True, num_workers=options.pop("num_workers", 1))
    options = {"link_at": 0.5, "lam_step": 3.0, "momentum": 0.9, "seed": 5, "progress": False, **EPOCHS, **options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "P.g>0.")
        result: tuple[nn.Module, History] = merge(
            teachers, loader, val_loader=VAL, criterion=criterion, checkpoint_dir=directory, **options
        )
    return result


def run_until(directory: Path, calls: int) -> None:
    """Goes on with the merge and dies."""
    run(directory, calls, die, checkpoint_seconds=0, resume=True, num_workers=0)

"""A comparison of strategies that can be killed, small enough to train in a second."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmerge.data.dataset import Dataset
from fastmerge.recipes.sine import sine
from fastmerge.training.recipe import Recipe
from fastmerge.training.strategies import run
from killing import die

BRIGHTNESS = 0.0


class Net(nn.Module):
    """Draws random numbers (dropout), and has statistics."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3 * width, 3), nn.BatchNorm2d(3 * width)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(12 * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.conv(x)).relu().flatten(1)))


def wide_net(width: int) -> Net:
    return Net(4 * width)


def images(path: Path | None, seed: int, on_bad_image: str = "raise") -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    x, y = BRIGHTNESS + torch.randn(36, 1, 4, 4, generator=generator), torch.arange(36) % 3
    return Dataset(x[:24], y[:24], x[24:], y[24:])


def noisy(x: Tensor, generator: torch.Generator) -> Tensor:
    return x + 0.1 * torch.randn(x.shape, generator=generator)


def recipe(**changes: Any) -> Recipe:
    choices = {
        "metric": "test_accuracy",
        "make_network": Net,
        "load_data": images,
        "criterion": F.cross_entropy,
        "epochs": 12,
        "batch_size": 8,
        "augment": noisy,
        "link_at": 0.5,
        "test_every": 2,
        "stack": 2,
        "curve": None,
        "finetune_milestones": (1,),
    }
    return replace(sine(), **choices | changes)


def train(directory: Path | None, epochs: int = 0, act: Callable[[], None] = die, **options: Any) -> dict[str, Any]:
    """Trains; calls ``act`` when so many epochs have been told of."""
    told = 0

    def note(values: dict[str, Any]) -> None:
        nonlocal told
        told += 1
        if told == epochs:
            act()

    checkpoints = None if directory is None else directory / "checkpoints"
    options = {"replicates": 2, "workers": 1, "resume": True, "checkpoint_seconds": 0} | options
    options = {"out": directory, "progress": False, "note": note, "checkpoint_dir": checkpoints} | options
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*P.g>0.")
        return run(options.pop("recipe", None) or recipe(), options.pop("strategies", ("student", "one")), **options)

"""A comparison of strategies that can be killed, small enough to train in a second."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmerge.data.dataset import Dataset
from fastmerge.experiments.recipes import Recipe, sine
from fastmerge.experiments.run import run
from fastmerge.merging.options import Options, Plan
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


def net(classes: int, width: int) -> Net:
    return Net(width)


def wide_net(classes: int, width: int) -> Net:
    return Net(4 * width)


def images(path: Path | None, seed: int, on_bad_image: str = "raise") -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    x, y = BRIGHTNESS + torch.randn(36, 1, 4, 4, generator=generator), torch.arange(36) % 3
    return Dataset(x[:24], y[:24], x[24:], y[24:])


def noisy(x: Tensor, generator: torch.Generator) -> Tensor:
    return x + 0.1 * torch.randn(x.shape, generator=generator)


def recipe(make_network: Any = net, unit: int = 2, **changes: Any) -> Recipe:
    """Of 24 images, of which networks train on 22, in batches of 8."""
    merge = {"merge_epochs": unit, "finetune_epochs": unit, "milestones": (1,), "link_at": 0.5, "gate_lr": 0.1}
    return replace(
        sine(),
        metric="test_accuracy",
        make_network=make_network,
        load_data=images,
        teacher=Plan(epochs=2 * unit, lr=0.01),
        long=Plan(epochs=6 * unit, lr=0.01),
        merge=Options(**merge | {"lam_step": 0.05} | changes),
        batch_size=8,
        augment=noisy,
        test_every=2,
        stack=2,
        curve=None,
    )


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

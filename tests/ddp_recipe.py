"""A recipe over loaders by several processes, with gates that draw 0 or 1 for sure and a network without BatchNorm."""

from __future__ import annotations

import os
import signal
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddp_merge import fixed_gates
from fastmerge import HardConcrete
from fastmerge.data.augmentation import Augmentation
from fastmerge.experiments import lab
from fastmerge.experiments.recipes import Recipe, resnet18_imagewoof
from fastmerge.experiments.run import run as run_recipe
from fastmerge.merging.trainer import Trainer


def network(classes: int, width: int) -> nn.Module:
    layers = [nn.Conv2d(3, 6 * width, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(49 * 6 * width, classes)]
    return nn.Sequential(*layers)


def recipe(**changes: Any) -> Recipe:
    """Two teachers of four epochs, two epochs of the merge, two of fine-tuning; three steps each."""
    base = resnet18_imagewoof()
    small = replace(
        base, make_network=network, image_size=16, batch_size=4, augmentation=Augmentation(shift=1), held_out=1 / 3
    )
    return replace(small.scaled(0.02), **changes)


def run(rank: int, size: int, tree: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Trains the student; returns the teachers' and the student's weights, and what was told."""
    seen: dict[str, Any] = {"told": []}
    merge, reset = lab.merge_by, HardConcrete.reset_parameters

    def spy(options: Any, teachers: list[nn.Module], *rest: Any, **more: Any) -> Any:
        student, history = merge(options, teachers, *rest, **more)
        seen.update(teachers=[weights(teacher) for teacher in teachers], student=weights(student))
        return student, history

    lab.merge_by, HardConcrete.reset_parameters = spy, fixed_gates  # type: ignore[assignment, method-assign]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*P.g>0.")
            results = run_recipe(
                recipe(),
                ["student"],
                **{
                    "replicates": 1,
                    "data_path": tree,
                    "progress": False,
                    "loader": "device",
                    "checkpoint_dir": out,
                    "resume": True,
                    "note": seen["told"].append if rank == 0 else None,
                    **options,
                },
            )
    finally:
        lab.merge_by, HardConcrete.reset_parameters = merge, reset  # type: ignore[method-assign]
    return seen | {"value": results["strategies"]["student"]["values"][0]}


def weights(network: nn.Module) -> dict[str, Any]:
    return {name: value.numpy() for name, value in network.state_dict().items()}


# Work for a process.


def trained(rank: int, size: int, tree: Path, out: Path, parallel: bool = False) -> dict[str, Any]:
    return run(rank, size, tree, out, teachers_in_parallel=parallel)


def killed(rank: int, size: int, tree: Path, out: Path, parallel: bool, epochs: int) -> dict[str, Any]:
    """The last process dies before it has trained so many epochs."""
    epoch, begun = Trainer.epoch, 0

    def spy(*arguments: Any) -> None:
        nonlocal begun
        begun += 1
        if begun == epochs and rank == size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        epoch(*arguments)

    Trainer.epoch = spy  # type: ignore[method-assign]
    return run(rank, size, tree, out, teachers_in_parallel=parallel, checkpoint_seconds=0)


def diverging(rank: int, size: int, tree: Path, out: Path) -> dict[str, Any]:
    """The second teacher alone comes upon NaN."""
    make = lab.train_by

    def spy(options: Any, *arguments: Any, title: str, **more: Any) -> Any:
        if title.endswith(" 1"):
            options = replace(options, finetune_lr=float(2**120))
        return make(options, *arguments, title=title, **more)

    lab.train_by = spy
    return run(rank, size, tree, out, teachers_in_parallel=True)


def tensors(arrays: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in arrays.items()}

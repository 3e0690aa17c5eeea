"""Where and how the networks of an experiment over loaders train, and what they read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from fastmerge.data.loading import ImageLoaders, image_loaders
from fastmerge.evaluation import Setting
from fastmerge.merging.execution import Execution
from fastmerge.processes import Processes, share_of
from fastmerge.training.loader_recipe import LoaderRecipe
from fastmerge.training.seeds import seed_for


@dataclass(frozen=True)
class Place:
    """Where and how a run's networks train.

    Attributes:
        data: image tree, CIFAR folder or .npz.
        device: of the networks.
        seed: of the run.
        loader: "auto", "dali", "device" or "torch".
        workers: that decode images; None is one per core.
        autocast: dtype of mixed precision, or None.
        on_bad_image: "raise" or "skip".
        checkpoints: a directory, or None for none.
        checkpoint_seconds: at least so many between two checkpoints.
        resume: whether to go on from those that are there.
        progress: whether to show a bar; None on a terminal.
        execution: how steps are run.
        group: the processes that train, where they are not all.
        opened: the loaders that were made, by what they read: the images of a run are read once.
    """

    data: Path
    device: torch.device
    seed: int
    loader: str = "auto"
    workers: int | None = None
    autocast: torch.dtype | None = None
    on_bad_image: Any = "raise"
    checkpoints: Path | None = None
    checkpoint_seconds: float = 300.0
    resume: bool = False
    progress: bool | None = None
    execution: Execution = field(default_factory=Execution)
    group: Processes | None = None
    opened: dict[Any, ImageLoaders] = field(default_factory=dict, compare=False, repr=False)

    @property
    def processes(self) -> Processes:
        """Those that train a network together."""
        return Processes(self.device) if self.group is None else self.group

    @property
    def setting(self) -> Setting:
        """How networks and the criterion are run."""
        return Setting(self.device, cross_entropy, self.autocast, channels_last=True)

    def loaders(self, recipe: LoaderRecipe, *path: int | str, planned: int | None = None) -> ImageLoaders:
        """Loaders with an order and changes of their own, of images that are read when they are first asked for.

        Args:
            recipe: the experiment.
            path: names the network that they are for.
            planned: processes to share the images with that are not there yet.

        Raises:
            ValueError, FileNotFoundError, ImportError: as :func:`~fastmerge.data.loading.image_loaders`, and where there
                are more classes than the recipe has, or images without three channels.
        """
        rank, size = (self.processes.rank, self.processes.size) if planned is None else (0, planned)
        batch_size, seed = (
            share_of(recipe.batch_size, size, self.execution.accumulate),
            seed_for(self.seed, "images", *path),
        )
        key = (self.data, self.device, self.loader, recipe.image_size, recipe.augmentation)
        if key in self.opened:
            return self.opened[key].again(batch_size, seed, rank, size)
        made = image_loaders(
            self.data,
            batch_size,
            image_size=recipe.image_size,
            augmentation=recipe.augmentation,
            loader=self.loader,
            device=self.device,
            seed=seed,
            workers=self.workers,
            on_bad_image=self.on_bad_image,
            shard=rank,
            shards=size,
        )
        if made.classes > recipe.most_classes:
            raise ValueError(
                f"{recipe.name} needs images of at most {recipe.most_classes} classes; {self.data} has {made.classes}"
            )
        if made.channels != 3:
            raise ValueError(f"{recipe.name} needs images of 3 channels; those of {self.data} have {made.channels}")
        self.opened[key] = made
        return made

    def checkpoint(self, *path: int | str) -> Path | None:
        """The directory for the checkpoints of one network or merge."""
        return None if self.checkpoints is None else self.checkpoints / "-".join(map(str, path))


def check_data(recipe: LoaderRecipe, path: Path | None) -> Path:
    """Where the data is.

    Raises:
        ValueError: It was not said.
    """
    if path is None:
        raise ValueError(
            f"{recipe.name} needs data: a tree train/<class>/<image>, val/<class>/<image>, CIFAR's folder or an .npz"
        )
    return path

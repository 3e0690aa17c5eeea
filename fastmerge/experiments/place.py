"""Where and how the networks of an experiment train, and what they read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmerge.data.dataset import Dataset, SameForAll, StackedBatches, held_out
from fastmerge.data.loading import ImageLoaders, image_loaders
from fastmerge.evaluation import Setting
from fastmerge.experiments.recipes import Recipe
from fastmerge.merging.options import Options
from fastmerge.processes import Processes, share_of


class Loaders(NamedTuple):
    """What a network, or a stack, trains on, is tested on, and is chosen by."""

    train: Any
    test: Any
    held_out: Any


def asked_for(options: dict[str, Any]) -> dict[str, Any]:
    """Those options that were not left at what changes nothing: off, one, or none."""
    return {name: value for name, value in options.items() if value is True or value not in (None, False, 1)}


@dataclass(frozen=True)
class Place:
    """Where and how a run's networks train.

    Attributes:
        recipe: with the epochs of the run.
        data: image tree, CIFAR folder or .npz; None where the recipe makes its data.
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
        steps: options of how steps are run: accumulate, compile, sync_batch_norm.
        group: the processes that train a network, where they are not all.
        dataset: of a recipe in memory.
        opened: the loaders that were made: the images of a run are read once.
    """

    recipe: Recipe
    data: Path | None
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
    steps: dict[str, Any] = field(default_factory=dict)
    group: Processes | None = None
    dataset: tuple[Dataset, Dataset] | None = None
    opened: dict[str, ImageLoaders] = field(default_factory=dict, compare=False, repr=False)

    @property
    def processes(self) -> Processes:
        """Those that train a network together; of a stack one alone."""
        if self.group is not None:
            return self.group
        return Processes.alone(self.device) if self.recipe.in_memory else Processes(self.device)

    @property
    def setting(self) -> Setting:
        """How networks and the criterion are run."""
        return Setting(self.device, self.recipe.criterion, self.autocast, not self.recipe.in_memory)

    def opened_here(self) -> Place:
        """The same with its data read.

        Raises:
            ValueError, FileNotFoundError, ImportError: it is missing, or not what the recipe needs.
        """
        recipe = self.recipe
        if not recipe.in_memory:
            self.images("check")
            return self
        given = {"loader": self.loader != "auto", "autocast": self.autocast is not None, **self.steps}
        if wrong := asked_for(given):
            raise ValueError(
                f"recipe {recipe.name} trains stacks of networks in float32 on data in memory; it takes no "
                f"{', '.join(f'--{name}'.replace('_', '-') for name in wrong)}"
            )
        assert recipe.load_data is not None
        data = recipe.load_data(self.data, seed_for(self.seed, "data"), self.on_bad_image)
        return replace(self, dataset=held_out(data, recipe.held_out))

    def loaders(self, replicates: Sequence[int], order: str, number: int = 0) -> Loaders:
        """What one network of each replicate reads, in an order of its own that ``order`` and its number decide."""
        if self.dataset is None:
            (replicate,) = replicates
            images = self.images(order, replicate, number)
            return Loaders(images.train, images.val, images.held_out)
        data, held = (each.to(self.device) for each in self.dataset)
        orders = [generator_for(self.seed, "order", order, replicate, number) for replicate in replicates]
        noise = generator_for(self.seed, "noise", order, replicates[0], number, device=self.device)
        train = StackedBatches(data, self.recipe.batch_size, orders, self.recipe.augment, noise)
        return Loaders(train, SameForAll(data, len(replicates)), SameForAll(held, len(replicates)))

    def images(self, *path: int | str, planned: int | None = None) -> ImageLoaders:
        """Loaders with an order and changes of their own, of images that are read when they are first asked for.

        Args:
            path: names the network that they are for.
            planned: processes to share the images with that are not there yet.

        Raises:
            ValueError, FileNotFoundError, ImportError: as :func:`~fastmerge.data.loading.image_loaders`, and where the data
                was not named, there are more classes than the recipe has, or images without three channels.
        """
        recipe = self.recipe
        self.check_data()
        rank, size = (self.processes.rank, self.processes.size) if planned is None else (0, planned)
        batch_size = share_of(recipe.batch_size, size, self.steps.get("accumulate", 1))
        seed = seed_for(self.seed, "images", *path)
        if "made" in self.opened:
            return self.opened["made"].again(batch_size, seed, rank, size)
        made = image_loaders(
            Path(str(self.data)),
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
            held_out=recipe.held_out,
        )
        if made.classes > recipe.most_classes:
            raise ValueError(
                f"{recipe.name} needs images of at most {recipe.most_classes} classes; {self.data} has {made.classes}"
            )
        if made.channels != 3:
            raise ValueError(f"{recipe.name} needs images of 3 channels; those of {self.data} have {made.channels}")
        self.opened["made"] = made
        return made

    def check_data(self) -> None:
        """Raises a ValueError where a recipe needs images and was not told where they are."""
        if self.data is None and not self.recipe.in_memory:
            raise ValueError(
                f"{self.recipe.name} needs data: a tree train/<class>/<image>, val/<class>/<image>, CIFAR's folder or an .npz"
            )

    @property
    def classes(self) -> int:
        """Of the data; 0 for a regression."""
        if self.dataset is not None:
            return self.dataset[0].classes or 0
        return self.opened["made"].classes

    @property
    def samples(self) -> tuple[int, int]:
        """Training and test samples; of all processes."""
        if self.dataset is not None:
            return len(self.dataset[0].train_inputs), len(self.dataset[0].test_inputs)
        made = self.opened["made"]
        train, test = self.processes.sum([made.train.samples, made.val.samples])
        return int(train), int(test)

    @property
    def example(self) -> Tensor:
        """Two samples as networks read them, on the CPU."""
        if self.dataset is not None:
            return self.dataset[0].normalise(self.dataset[0].train_inputs[:2]).cpu()
        return torch.zeros(2, 3, self.recipe.image_size, self.recipe.image_size)

    def placed(self, options: Options, path: Sequence[int | str], **more: Any) -> Options:
        """Options of a training, here: with the device, checkpoints and random numbers that its path names.

        Args:
            options: of the recipe.
            path: names the training; its seed and checkpoints follow from it.
            more: other options.
        """
        where = None if self.checkpoints is None else self.checkpoints / "-".join(map(str, path))
        return replace(
            options,
            device=self.device,
            autocast=self.autocast,
            channels_last=not self.recipe.in_memory,
            seed=seed_for(self.seed, "draws", *path),
            progress=False if self.recipe.in_memory else self.progress,
            checkpoint_dir=where,
            checkpoint_seconds=self.checkpoint_seconds,
            resume=self.resume and where is not None,
            val_every=self.recipe.test_every,
            **self.steps,
            **more,
        )


def seed_for(*path: int | str) -> int:
    """A seed for what a path names, such as ``(0, "student", "weights", 3)``: 63 bits of its hash."""
    digest = hashlib.sha256(repr(path).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator_for(*path: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator started with :func:`seed_for`."""
    return torch.Generator(device).manual_seed(seed_for(*path))

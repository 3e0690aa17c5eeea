"""The networks of an experiment over loaders: trained one at a time, with checkpoints that a killed run goes on from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastmerge.data.loading import ImageLoaders, image_loaders
from fastmerge.evaluation import Setting
from fastmerge.history import EpochRecord, History
from fastmerge.merging import merge
from fastmerge.merging.checks import check_checkpoints
from fastmerge.merging.execution import Execution
from fastmerge.merging.plan import MergePlan, describe_options
from fastmerge.merging.progress import Progress
from fastmerge.merging.stages import finetune
from fastmerge.merging.state import MergeState
from fastmerge.merging.trainer import Trainer
from fastmerge.processes import Processes, share_of
from fastmerge.resuming.fingerprint import fingerprints
from fastmerge.resuming.snapshots import Snapshots
from fastmerge.resuming.stop_requests import StopRequests
from fastmerge.training.loader_recipe import LoaderRecipe, Plan
from fastmerge.training.seeds import seed_for

Tell = Callable[[str, EpochRecord, int], object]  # the stage, an epoch of it, and which of several networks


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

    @property
    def processes(self) -> Processes:
        """Those that train a network together."""
        return Processes(self.device) if self.group is None else self.group

    def loaders(self, recipe: LoaderRecipe, *path: int | str, planned: int | None = None) -> ImageLoaders:
        """Loaders with an order and changes of their own.

        Args:
            recipe: the experiment.
            path: names the network that they are for.
            planned: processes to share the images with that are not there yet.

        Raises:
            ValueError, FileNotFoundError, ImportError: as :func:`~fastmerge.data.loading.image_loaders`, and where there
                are more classes than the recipe has, or images without three channels.
        """
        rank, size = (self.processes.rank, self.processes.size) if planned is None else (0, planned)
        made = image_loaders(
            self.data,
            share_of(recipe.batch_size, size, self.execution.accumulate),
            image_size=recipe.image_size,
            augmentation=recipe.augmentation,
            loader=self.loader,
            device=self.device,
            seed=seed_for(self.seed, "images", *path),
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


def train_network(
    recipe: LoaderRecipe, plan: Plan, place: Place, loaders: ImageLoaders, width: int, tell: Tell, *path: int | str
) -> tuple[nn.Module, History]:
    """Trains one network from scratch.

    Args:
        recipe: the experiment.
        plan: how long, at which learning rates.
        place: where.
        loaders: of this network alone.
        width: of the network.
        tell: told of every epoch, with the stage's name.
        path: names the network, and ends with its number among others of its kind; its seeds and checkpoints follow from it.

    Raises:
        FloatingPointError: The loss became NaN or Inf.
        Interrupted: A signal came, and a checkpoint was written.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(place.seed, "weights", *path))
        network = recipe.make_network(loaders.classes, width)
    setting = Setting(place.device, cross_entropy, place.autocast, channels_last=True)
    numbers = _numbers(recipe, plan)
    snapshots, directory = None, place.checkpoint(*path)
    if directory is not None:
        others = describe_options({"autocast": place.autocast, "seed": place.seed})
        others |= {"sync_batch_norm": True} if place.execution.sync_batch_norm else {}
        snapshots = Snapshots(directory, numbers.options() | others | fingerprints([network]))
        check_checkpoints(snapshots, place.resume)
    setting.place(network)
    history, processes = History(1), place.processes
    state = MergeState(snapshots, place.checkpoint_seconds, place.device, loaders.train, history, processes)
    title, shown = " ".join(map(str, path)), place.progress if Processes(place.device).is_first else False

    def note(record: EpochRecord) -> None:
        tell(str(path[0]), record, int(path[-1]))

    with (
        StopRequests(enabled=snapshots is not None) as stop,
        _Titled(title, shown) as bar,
    ):
        if place.resume:
            state.load()
        trainer = Trainer(
            loaders.train,
            loaders.val,
            setting,
            history,
            state,
            stop,
            processes,
            place.execution,
            bar,
            note,
            val_every=recipe.test_every,
        )
        finetune(network, numbers, plan.schedule, trainer)
    return network.eval(), history


def train_merge(
    recipe: LoaderRecipe, place: Place, loaders: ImageLoaders, teachers: list[nn.Module], tell: Tell, *path: int | str
) -> tuple[nn.Module, History]:
    """Merges teachers and fine-tunes the student; arguments and errors as :func:`train_network`'s."""
    return merge(
        teachers,
        loaders.train,
        val_loader=loaders.val,
        **merge_numbers(recipe),
        schedule=recipe.finetune.schedule,
        device=place.device,
        autocast=place.autocast,
        channels_last=True,
        seed=seed_for(place.seed, "gates", *path),
        progress=place.progress,
        val_every=recipe.test_every,
        callback=lambda record: tell(record.stage, record, 0),
        checkpoint_dir=place.checkpoint(*path),
        checkpoint_seconds=place.checkpoint_seconds,
        resume=place.resume,
        **asdict(place.execution),
    )


def merge_numbers(recipe: LoaderRecipe) -> dict[str, Any]:
    """The numbers of a recipe's merge, under the names of :func:`fastmerge.merge`."""
    return {
        "merge_epochs": recipe.merge.epochs,
        "finetune_epochs": recipe.finetune.epochs,
        "link_at": recipe.link_at,
        "lr": recipe.merge.lr,
        "merge_milestones": recipe.merge.milestones or None,
        "momentum": recipe.momentum,
        "weight_decay": recipe.weight_decay,
        "gate_lr": recipe.gate_lr,
        "lam_start": recipe.lam_start,
        "lam_step": recipe.lam_step,
        "gate_schedule": recipe.gate_schedule,
        "compact_at": recipe.compact_at,
        "finetune_lr": recipe.finetune.lr,
    }


class _Titled(Progress):
    """A bar that names a network instead of a stage."""

    def __init__(self, title: str, show: bool | None) -> None:
        super().__init__(show)
        self.title = title

    def start(self, stage: str, epochs: int, loader: object, done: int = 0) -> None:
        super().start(self.title, epochs, loader, done)


def _numbers(recipe: LoaderRecipe, plan: Plan) -> MergePlan:
    """The plan of plain training, which is a merge's fine-tuning."""
    return MergePlan(
        merge_epochs=1,
        finetune_epochs=plan.epochs,
        link_at=0.0,
        lr=plan.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        gate_lr=recipe.gate_lr,
        lam_start=0.0,
        lam_step=0.0,
        finetune_lr=plan.lr,
        milestones=plan.milestones,
    )

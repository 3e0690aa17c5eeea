"""The networks of an experiment over loaders: trained one at a time, with checkpoints that a killed run goes on from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from fastmerge.data.loading import ImageLoaders
from fastmerge.history import EpochRecord, History
from fastmerge.merging import merge
from fastmerge.merging.checks import check_checkpoints
from fastmerge.merging.plan import MergePlan, describe_options
from fastmerge.merging.progress import Progress
from fastmerge.merging.stages import finetune
from fastmerge.merging.state import MergeState
from fastmerge.merging.trainer import Trainer
from fastmerge.processes import Processes
from fastmerge.resuming.fingerprint import fingerprints
from fastmerge.resuming.snapshots import Snapshots
from fastmerge.resuming.stop_requests import StopRequests
from fastmerge.training.loader_place import Place
from fastmerge.training.loader_recipe import LoaderRecipe, Plan
from fastmerge.training.seeds import seed_for

Tell = Callable[[str, EpochRecord, int], object]  # the stage, an epoch of it, and which of several networks


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
    numbers = _numbers(recipe, plan)
    snapshots, directory = None, place.checkpoint(*path)
    if directory is not None:
        others = describe_options({"autocast": place.autocast, "seed": place.seed})
        others |= {"sync_batch_norm": place.execution.sync_batch_norm}
        snapshots = Snapshots(directory, numbers.options() | others | fingerprints([network]))
        check_checkpoints(snapshots, place.resume)
    place.setting.place(network)
    history = History(1)
    with trainer_of(
        recipe,
        place,
        loaders,
        history,
        " ".join(map(str, path)),
        snapshots=snapshots,
        note=lambda record: tell(str(path[0]), record, int(path[-1])),
    ) as trainer:
        finetune(network, numbers, plan.schedule, trainer)
    return network.eval(), history


@contextmanager
def trainer_of(
    recipe: LoaderRecipe,
    place: Place,
    loaders: ImageLoaders,
    history: History,
    title: str,
    *,
    snapshots: Snapshots | None = None,
    note: Callable[[EpochRecord], object] | None = None,
    validate: bool = True,
) -> Iterator[Trainer]:
    """What trains a stage of :mod:`fastmerge.merging.stages`.

    Args:
        recipe: the experiment.
        place: where.
        loaders: of the stage.
        history: where its epochs go.
        title: of the progress bar.
        snapshots: its checkpoints, gone on from where the place says so; None for none.
        note: called after every epoch.
        validate: whether the networks are scored now and then.
    """
    processes = place.processes
    state = MergeState(
        snapshots,
        place.checkpoint_seconds,
        place.device,
        loaders.train,
        history,
        processes,
        place.execution.accumulate,
    )
    shown = place.progress if Processes(place.device).is_first else False
    with StopRequests(enabled=snapshots is not None) as stop, _Titled(title, shown) as bar:
        if place.resume and snapshots is not None:
            state.load()
        yield Trainer(
            loaders.train,
            loaders.val if validate else None,
            place.setting,
            history,
            state,
            stop,
            processes,
            place.execution,
            bar,
            note,
            val_every=recipe.test_every,
        )


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
        "recalibrate": recipe.recalibrate,
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
        gate_lr=None,
        lam_start=0.0,
        lam_step=0.0,
        finetune_lr=plan.lr,
        milestones=plan.milestones,
    )

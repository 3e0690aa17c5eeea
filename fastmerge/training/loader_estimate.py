"""What a comparison of strategies over loaders will take, from a few timed steps of each of its networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from fastmerge.data.loading import ImageLoaders
from fastmerge.evaluation import Setting
from fastmerge.merging.checks import check_loader
from fastmerge.merging.estimate import (
    Estimate,
    Part,
    checkpoint_bytes,
    estimate,
    scores,
    time_reading,
    time_training,
    time_validation,
)
from fastmerge.merging.plan import MergePlan
from fastmerge.training.loader_networks import merge_numbers
from fastmerge.training.loader_place import Place
from fastmerge.training.loader_recipe import LoaderRecipe, Plan
from fastmerge.training.loader_results import TEACHERS
from fastmerge.training.strategies import check_strategies

_KEPT = 2  # checkpoints of a network that is finished, until the run is


def estimate_run(
    recipe: LoaderRecipe,
    strategies: Sequence[str],
    place: Place,
    *,
    replicates: int = 1,
    budget: float = 1.0,
    processes: int = 1,
) -> tuple[ImageLoaders, Estimate]:
    """Checks options, data and networks as a run does before its first epoch, and times some batches of each kind.

    Args:
        recipe: the experiment.
        strategies, replicates, budget: of the run.
        place: where.
        processes: that will train; what one of them does is timed.

    Returns:
        The loaders of one process, and the estimate.

    Raises:
        ValueError, FileNotFoundError, ImportError: as the run would.
    """
    check_strategies(strategies, replicates, place.seed)
    recipe = recipe.scaled(budget)
    loaders = place.loaders(recipe, "check", planned=processes)
    setting = place.setting
    found = Estimate()
    devices = [place.device] if place.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        for strategy in strategies:
            make = _student if strategy == "student" else _plain
            part = make(recipe, strategy, loaders, setting)
            found.parts += [
                replace(each, name=f"{strategy}: {each.name}", epochs=replicates * each.epochs) for each in part.parts
            ]
            found.kept += replicates * part.kept
            found.reading = part.reading
    return loaders, found


def _student(recipe: LoaderRecipe, strategy: str, loaders: ImageLoaders, setting: Setting) -> Estimate:
    teachers = [recipe.make_network(loaders.classes, 1) for _ in range(TEACHERS)]
    plan = MergePlan(**merge_numbers(recipe), milestones=None)
    merge = estimate(teachers, loaders.train, loaders.val, setting, plan, recipe.test_every)
    before = _network(recipe, teachers[0], TEACHERS, recipe.teacher, "teachers", loaders, setting)
    return Estimate(before.parts + merge.parts, merge.reading, before.kept + merge.kept)


def _plain(recipe: LoaderRecipe, strategy: str, loaders: ImageLoaders, setting: Setting) -> Estimate:
    network = recipe.make_network(loaders.classes, 2 if strategy.endswith("-big") else 1)
    check_loader("train_loader", loaders.train, network, setting)
    check_loader("val_loader", loaders.val, network, setting)
    count, plan = (1, recipe.long) if strategy.startswith("one") else (3, recipe.third)
    return _network(recipe, network, count, plan, "training", loaders, setting)


def _network(
    recipe: LoaderRecipe,
    network: nn.Module,
    count: int,
    plan: Plan,
    name: str,
    loaders: ImageLoaders,
    setting: Setting,
) -> Estimate:
    """So many networks of one kind."""
    network = setting.place(network)
    parts: list[Part] = [time_training(name, count * plan.epochs, network, loaders.train, setting)]
    scored = count * scores(plan.epochs, recipe.test_every)
    parts += time_validation("validation", scored, network, loaders.val, setting)
    return Estimate(parts, time_reading(loaders.train, setting), count * _KEPT * checkpoint_bytes(network))

"""What a comparison of strategies will take: each runs as ever, in a lab that times a few steps instead of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastmerge.data.loading import ImageLoaders
from fastmerge.experiments.column import Column
from fastmerge.experiments.lab import Lab
from fastmerge.experiments.place import Place
from fastmerge.experiments.run import check_strategies, teacher
from fastmerge.experiments.strategies import STRATEGIES
from fastmerge.merging.checks import check_loader
from fastmerge.merging.estimate import (
    Estimate,
    checkpoint_bytes,
    estimate,
    scores,
    time_reading,
    time_training,
    time_validation,
)
from fastmerge.merging.options import Plan

_KEPT = 2  # checkpoints of a network that is finished, until the run is


def estimate_run(
    place: Place, strategies: Sequence[str], *, replicates: int = 1, processes: int = 1
) -> tuple[ImageLoaders, Estimate]:
    """Checks options, data and networks as a run does before its first epoch, and times some batches of each kind.

    Args:
        place: where, with a recipe of the run's epochs.
        strategies, replicates: of the run.
        processes: that will train; what one of them does is timed.

    Returns:
        The loaders of one process, and the estimate.

    Raises:
        ValueError, FileNotFoundError, ImportError: as the run would.
    """
    check_strategies(strategies, replicates, place.seed)
    recipe = place.recipe
    loaders = place.images("check", planned=processes)
    found = Estimate(reading=time_reading(loaders.train, place.setting))
    devices = [place.device] if place.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        wanted = max(STRATEGIES[name].teachers(recipe) for name in strategies)
        teachers = [teacher(Rehearsal(place, "teachers", loaders, found, replicates), n) for n in range(wanted)]
        for name in strategies:
            chosen = STRATEGIES[name]
            chosen.run(Rehearsal(place, name, loaders, found, replicates), teachers[: chosen.teachers(recipe)])
    return loaders, found


class Rehearsal(Lab):
    """A lab that adds what its trainings would take to an estimate, and gives back networks as they were.

    Args:
        place, name: as :class:`Lab`'s.
        loaders: that every network reads.
        found: the estimate.
        times: how many replicates there will be.
    """

    def __init__(self, place: Place, name: str, loaders: ImageLoaders, found: Estimate, times: int) -> None:
        super().__init__(place, [0], name)
        self.images, self.found, self.times = loaders, found, times

    def train(
        self,
        networks: Sequence[nn.Module | None],
        plan: Plan,
        stage: str = "training",
        number: int = 0,
        after: Sequence[Column] = (),
        teachers: Sequence[Column] = (),
        **options: Any,
    ) -> Column:
        """Times a training; without what teachers say, which takes the time of their forward passes more."""
        (network,) = networks
        assert network is not None
        train, val, setting = self.images.train, self.images.val, self.place.setting
        check_loader("train_loader", train, network, setting, trained=True)
        check_loader("val_loader", val, network, setting)
        setting.place(network)
        part = Estimate([time_training("training", plan.epochs, network, train, setting)])
        looks = scores(plan.epochs, self.recipe.test_every)
        part.parts += time_validation("validation", looks, network, val, setting)
        part.kept = _KEPT * checkpoint_bytes(network)
        cost = plan.epochs * (self.operations(network) / self._unit + len(teachers) / 3)
        return self._add(part, network, after, plan.epochs, cost)

    def merge(self, teachers: Sequence[Column], stage: str = "student", number: int = 0, **options: Any) -> Column:
        """Times a merge."""
        networks = [network for column in teachers for network in column.networks if network is not None]
        chosen = replace(self.recipe.merge, val_every=self.recipe.test_every, **options)
        train, val = self.images.train, self.images.val
        part = estimate(networks, train, val, self.place.setting, chosen)
        epoch = 1 + len(teachers) / 3 if chosen.distill else 1.0
        cost = self.merging_cost(len(teachers), **options) + chosen.finetune_epochs * epoch
        return self._add(part, networks[0], teachers, chosen.merge_epochs + chosen.finetune_epochs, cost)

    def best(self, columns: Sequence[Column]) -> Column:
        """The first, after all."""
        return self.scored(columns[0].networks, columns)

    def ranks(self, column: Column) -> list[tuple[float, float]]:
        """None is better than another."""
        return [(0.0, 0.0)]

    def apply(self, method: str, teachers: Sequence[Column], **options: Any) -> Column:
        """The first teacher: what methods take is not timed."""
        return self.scored(teachers[0].networks, teachers)

    def recalibrated(self, networks: Sequence[nn.Module]) -> list[nn.Module]:
        """The networks."""
        return list(networks)

    def scored(
        self, networks: Sequence[nn.Module | None], after: Sequence[Column], cost: float = 0.0, seconds: float = 0.0
    ) -> Column:
        """The networks, which are not scored."""
        return Column([*networks], [math.nan], [[]], [None], cost=cost).after(after)

    def _add(self, part: Estimate, network: nn.Module, after: Sequence[Column], epochs: int, cost: float) -> Column:
        for each in part.parts:
            self.found.add(replace(each, name=f"{self.name}: {each.name}", epochs=self.times * each.epochs))
        self.found.kept += self.times * part.kept
        column = self.scored([network], after, cost)
        return replace(column, epochs=column.epochs + epochs)

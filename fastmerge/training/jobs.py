"""What a strategy has to do for some of its replicates, and the parts that all strategies share."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastmerge.training.recipe import Recipe
from fastmerge.training.scores import Curves
from fastmerge.training.seeds import generator_for, seed_for
from fastmerge.training.stack import Stack


class Reporter(Protocol):
    """Where a job tells how far it is."""

    def epoch(self, stage: str, done: int, total: int, weight: int, values: dict[str, Any] | None = None) -> None:
        """One more epoch of a stage, worth ``weight`` epochs of one network, and what the log tells of it."""

    def skip(self, stage: str, weight: int) -> None:
        """Epochs that were done before the run was interrupted."""

    def warn(self, message: str) -> None:
        """Something the user should know."""


@dataclass(frozen=True)
class Job:
    """Some replicates of one strategy, trained as one stack.

    Attributes:
        strategy: its name.
        replicates: their numbers in the run.
        recipe: with the epochs of the run.
        seed: of the run.
        device: where to train.
        checkpoints: where the checkpoints of all jobs of the run are, or None for none.
        checkpoint_seconds: at least so many between two of them.
        resume: whether to go on from what is there.
    """

    strategy: str
    replicates: tuple[int, ...]
    recipe: Recipe
    seed: int
    device: torch.device
    checkpoints: Path | None = None
    checkpoint_seconds: float = 300.0
    resume: bool = False

    def seed_for(self, *path: int | str) -> int:
        """A seed of this run and strategy."""
        return seed_for(self.seed, self.strategy, *path)

    def orders(self, replicates: Collection[int], networks: int, stage: str) -> list[torch.Generator]:
        """Generators of the data orders: for each replicate, one per network."""
        return [
            generator_for(self.seed, self.strategy, "order", stage, replicate, network)
            for replicate in replicates
            for network in range(networks)
        ]

    def fresh_networks(self, networks: int, width: int) -> list[nn.Module]:
        """Networks with weights of their own: for each replicate, as many as asked for, one after another."""
        return [
            self._fresh_network(replicate, network, width)
            for replicate in self.replicates
            for network in range(networks)
        ]

    def _fresh_network(self, replicate: int, network: int, width: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed_for("weights", replicate, network))
            return self.recipe.make_network(width).to(self.device)


@dataclass
class Outcome:
    """What a job brings back; every list has one entry per replicate.

    Attributes:
        values: the metric on the test data; NaN for a replicate that diverged.
        curves: values per epoch.
        networks: state dicts of the final networks, on the CPU; None for a replicate that diverged.
        predictions: the recipe's curve as the final networks have it, (replicates, points), or None.
        student: what only the student strategy has, if any replicate came to the merge stage: λ and open probabilities per
            epoch, scores at the borders of stages, origins of the kept channels.
        seconds: how long it took.
    """

    values: list[float]
    curves: Curves
    networks: list[dict[str, Tensor] | None]
    predictions: Tensor | None = None
    student: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def state_on_cpu(network: nn.Module) -> dict[str, Tensor]:
    """A network's state dict with tensors of its own on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}


def predictions(job: Job, stack: Stack) -> Tensor | None:
    """The recipe's curve as each network has it, (R, points), if the recipe has one."""
    if job.recipe.curve is None:
        return None
    x, _ = job.recipe.curve()
    return stack(x.to(job.device)).squeeze(2).cpu()

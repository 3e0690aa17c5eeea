"""What a strategy has to do for some of its replicates, and the parts that all strategies share."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastmerge.data.dataset import Dataset
from fastmerge.gate_budget import GateBudget
from fastmerge.schedules import QuadraticLambda
from fastmerge.training.recipe import Recipe
from fastmerge.training.scores import Curves
from fastmerge.training.seeds import generator_for, seed_for
from fastmerge.training.stack import Stack
from fastmerge.training.stacked import EpochLosses, Stage, train


class Reporter(Protocol):
    """Where a job tells how far it is."""

    def epoch(self, stage: str, done: int, total: int, weight: int) -> None:
        """One more epoch of a stage, worth ``weight`` epochs of one network."""

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
    """

    strategy: str
    replicates: tuple[int, ...]
    recipe: Recipe
    seed: int
    device: torch.device

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


def train_stage(
    job: Job,
    stack: Stack,
    data: Dataset,
    stage: Stage,
    rows: list[int],
    reporter: Reporter,
    lam: QuadraticLambda | GateBudget | None = None,
    gates: Collection[str] = (),
    done: int = 0,
    total: int | None = None,
) -> Iterator[EpochLosses]:
    """Trains a stage, reports every epoch, and warns when a replicate's loss is no longer finite.

    Args:
        job: whose stage it is.
        stack: as many networks for each row as there are in the stage, replicate by replicate.
        data: on the job's device.
        stage: how.
        rows: which of the job's replicates are in the stack.
        reporter: where to report to.
        lam, gates: as :func:`~fastmerge.training.stacked.train`.
        done, total: epochs of the stage before this part of it, and of all its parts.
    """
    networks = len(stack) // len(rows)
    replicates = [job.replicates[row] for row in rows]
    orders = job.orders(replicates, networks, f"{stage.name} {done}")
    noise = generator_for(job.seed, job.strategy, "noise", stage.name, done, replicates[0], device=stack.device)
    torch.manual_seed(job.seed_for("gates", stage.name, done, replicates[0]))
    lost: set[int] = set()
    for losses in train(stack, data, stage, orders, noise, lam, gates):
        reporter.epoch(stage.name, done + losses.epoch, total or stage.epochs, len(stack))
        finite = losses.loss.isfinite().view(len(rows), networks).all(1)
        for replicate, fine in zip(replicates, finite.tolist(), strict=True):
            if not fine and replicate not in lost:
                lost.add(replicate)
                reporter.warn(
                    f"{job.strategy}: the loss of replicate {replicate} is no longer finite after epoch "
                    f"{done + losses.epoch} of stage {stage.name}; the learning rate {job.recipe.lr:g} may be too high"
                )
        yield losses


def state_on_cpu(network: nn.Module) -> dict[str, Tensor]:
    """A network's state dict with tensors of its own on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}


def predictions(job: Job, stack: Stack) -> Tensor | None:
    """The recipe's curve as each network has it, (R, points), if the recipe has one."""
    if job.recipe.curve is None:
        return None
    x, _ = job.recipe.curve()
    return stack(x.to(job.device)).squeeze(2).cpu()

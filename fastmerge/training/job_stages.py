"""A stage of a job: trained, reported, and written down for the case that the run is killed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch

from fastmerge.data.dataset import Dataset
from fastmerge.gate_budget import GateBudget
from fastmerge.schedules import QuadraticLambda
from fastmerge.training.job_state import JobState
from fastmerge.training.jobs import Job, Reporter
from fastmerge.training.seeds import generator_for
from fastmerge.training.stack import Stack
from fastmerge.training.stacked import StackTraining
from fastmerge.training.stacks import Stacks, StacksTraining
from fastmerge.training.stage import EpochLosses, Stage


def train_stage(
    job: Job,
    stack: Stack | Stacks,
    data: Dataset,
    stage: Stage,
    rows: list[int],
    reporter: Reporter,
    state: JobState,
    records: Callable[[], dict[str, Any]],
    lam: QuadraticLambda | GateBudget | None = None,
    gates: Collection[str] = (),
    done: int = 0,
    total: int | None = None,
) -> Iterator[EpochLosses]:
    """Trains a stage, reports every epoch, and warns when a replicate's loss is no longer finite.

    What the caller does with an epoch is done when a checkpoint is written after it.

    Args:
        job: whose stage it is.
        stack: as many networks for each row as there are in the stage, replicate by replicate.
        data: on the job's device.
        stage: how.
        rows: which of the job's replicates are in the stack.
        reporter: where to report to.
        state: the job's, which may have done some of the epochs, or all.
        records: what the strategy has recorded, for a checkpoint.
        lam, gates: as :func:`~fastmerge.training.stacked.train`.
        done, total: epochs of the stage before this part of it, and of all its parts.
    """
    networks = len(stack) // len(rows)
    replicates = [job.replicates[row] for row in rows]
    orders = job.orders(replicates, networks, f"{stage.name} {done}")
    noise = generator_for(job.seed, job.strategy, "noise", stage.name, done, replicates[0], device=stack.device)
    torch.manual_seed(job.seed_for("gates", stage.name, done, replicates[0]))
    name, training = f"{stage.name} {done}", _training(stack, data, stage, orders, noise, lam, gates)
    if state.is_over(name):
        reporter.skip(stage.name, stage.epochs * len(stack))
        return
    state.begin(training)
    reporter.skip(stage.name, training.done * len(stack))
    lost: set[int] = set()
    for losses in training.epochs():
        values = _values(job, stage, done, losses)
        reporter.epoch(stage.name, done + losses.epoch, total or stage.epochs, len(stack), values)
        finite = losses.loss.isfinite().view(len(rows), networks).all(1)
        for replicate, fine in zip(replicates, finite.tolist(), strict=True):
            if not fine and replicate not in lost:
                lost.add(replicate)
                reporter.warn(
                    f"{job.strategy}: the loss of replicate {replicate} is no longer finite after epoch "
                    f"{done + losses.epoch} of stage {stage.name}; the learning rate {job.recipe.lr:g} may be too high"
                )
        yield losses
        state.end_epoch(name, training, records)


def _training(stack: Stack | Stacks, *arguments: Any) -> StackTraining | StacksTraining:
    return StacksTraining(stack, *arguments) if isinstance(stack, Stacks) else StackTraining(stack, *arguments)


def _values(job: Job, stage: Stage, done: int, losses: EpochLosses) -> dict[str, Any]:
    values = {
        "strategy": job.strategy,
        "replicates": list(job.replicates),
        "stage": stage.name,
        "epoch": done + losses.epoch,
        "lr": stage.lr_at(losses.epoch - 1),
        "train_loss": losses.loss.tolist(),
    }
    if losses.gate_loss is not None:
        values |= {"lam": losses.lam, "gate_loss": losses.gate_loss.tolist()}
    return values

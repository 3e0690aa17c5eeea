"""Strategies without a merge: the best of three networks, and one network trained as long as three."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmerge.data.dataset import Dataset
from fastmerge.training.job_stages import train_stage
from fastmerge.training.job_state import JobState
from fastmerge.training.jobs import Job, Outcome, Reporter, predictions, state_on_cpu
from fastmerge.training.scores import Curves, score
from fastmerge.training.stack import Stack
from fastmerge.training.stage import EpochLosses


def best_of_three(job: Job, data: Dataset, reporter: Reporter, state: JobState, width: int) -> Outcome:
    """Three networks for a third of the epochs each; the one that is best by the recipe's metric counts."""
    return _PlainRun(job, data, reporter, state, networks=3, width=width).run()


def one(job: Job, data: Dataset, reporter: Reporter, state: JobState, width: int) -> Outcome:
    """One network for all epochs."""
    return _PlainRun(job, data, reporter, state, networks=1, width=width).run()


class _PlainRun:
    """One job of a strategy without a merge; ``best`` is each replicate's best network as of the last test."""

    def __init__(self, job: Job, data: Dataset, reporter: Reporter, state: JobState, networks: int, width: int) -> None:
        self.job, self.data, self.reporter, self.state, self.recipe = job, data, reporter, state, job.recipe
        self.networks, self.width = networks, width
        self.curves = Curves(len(job.replicates))
        self.best = torch.zeros(len(job.replicates), dtype=torch.int64)
        self.scores: dict[str, Tensor] = {}
        if state.records is not None:
            self.curves.restore(state.records["curves"])
            self.best, self.scores = state.records["best"], state.records["scores"]

    def run(self) -> Outcome:
        recipe, replicates, networks = self.recipe, len(self.job.replicates), self.networks
        stage = recipe.long_stage() if networks == 1 else recipe.teacher_stage()
        stack = Stack(self.job.fresh_networks(networks, self.width))
        rows = list(range(replicates))
        for losses in train_stage(self.job, stack, self.data, stage, rows, self.reporter, self.state, self._records):
            if losses.epoch % recipe.test_every == 0 or losses.epoch == stage.epochs:
                self._test(stack, losses)
        chosen = [row * networks + index for row, index in enumerate(self.best.tolist())]
        final = self.scores[recipe.metric].gather(1, self.best[:, None])[:, 0]
        drawn = predictions(self.job, stack)
        return Outcome(
            values=final.tolist(),
            curves=self.curves,
            networks=[
                state_on_cpu(stack.network(index)) if finite else None
                for index, finite in zip(chosen, final.isfinite().tolist(), strict=True)
            ],
            predictions=None if drawn is None else drawn[chosen],
        )

    def _test(self, stack: Stack, losses: EpochLosses) -> None:
        found = score(stack, self.data, self.recipe.criterion)
        self.scores = {name: value.view(-1, self.networks) for name, value in found.items()}
        self.best = _best(self.scores[self.recipe.metric], self.recipe.metric)
        values = {name: value.gather(1, self.best[:, None])[:, 0] for name, value in self.scores.items()}
        train_loss = losses.loss.view(-1, self.networks).mean(1)
        self.curves.add(self.networks * losses.epoch, {"train_loss": train_loss, **values})

    def _records(self) -> dict[str, Any]:
        return {"curves": self.curves.to_dict(), "best": self.best, "scores": self.scores}


def _best(values: Tensor, metric: str) -> Tensor:
    """The better column in each row; a network that diverged is never better than one that did not."""
    losses = values if metric == "test_loss" else -values
    return losses.nan_to_num(nan=torch.inf).argmin(1)

"""Strategies without a merge: the best of three networks, and one network trained as long as three."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmerge.data.dataset import Dataset
from fastmerge.training.jobs import Job, Outcome, Reporter, predictions, state_on_cpu, train_stage
from fastmerge.training.scores import Curves, score
from fastmerge.training.stack import Stack


def best_of_three(job: Job, data: Dataset, reporter: Reporter, width: int) -> Outcome:
    """Three networks for a third of the epochs each; the one that is best by the recipe's metric counts."""
    return _train(job, data, reporter, networks=3, width=width)


def one(job: Job, data: Dataset, reporter: Reporter, width: int) -> Outcome:
    """One network for all epochs."""
    return _train(job, data, reporter, networks=1, width=width)


def _train(job: Job, data: Dataset, reporter: Reporter, networks: int, width: int) -> Outcome:
    recipe, replicates = job.recipe, len(job.replicates)
    stage = recipe.long_stage() if networks == 1 else recipe.teacher_stage()
    stack = Stack(job.fresh_networks(networks, width))
    curves = Curves(replicates)
    best = torch.zeros(replicates, dtype=torch.int64)
    scores: dict[str, Tensor] = {}
    for losses in train_stage(job, stack, data, stage, list(range(replicates)), reporter):
        if losses.epoch % recipe.test_every == 0 or losses.epoch == stage.epochs:
            scores = {name: value.view(-1, networks) for name, value in score(stack, data, recipe.criterion).items()}
            best = _best(scores[recipe.metric], recipe.metric)
            values = {name: value.gather(1, best[:, None])[:, 0] for name, value in scores.items()}
            curves.add(networks * losses.epoch, {"train_loss": losses.loss.view(-1, networks).mean(1), **values})
    chosen = [row * networks + index for row, index in enumerate(best.tolist())]
    final = scores[recipe.metric].gather(1, best[:, None])[:, 0]
    drawn = predictions(job, stack)
    return Outcome(
        values=final.tolist(),
        curves=curves,
        networks=[
            state_on_cpu(stack.network(index)) if finite else None
            for index, finite in zip(chosen, final.isfinite().tolist(), strict=True)
        ],
        predictions=None if drawn is None else drawn[chosen],
    )


def _best(values: Tensor, metric: str) -> Tensor:
    """The better column in each row; a network that diverged is never better than one that did not."""
    losses = values if metric == "test_loss" else -values
    return losses.nan_to_num(nan=torch.inf).argmin(1)

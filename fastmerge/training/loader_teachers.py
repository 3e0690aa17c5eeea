"""The teachers of a merge over loaders: one after another, or side by side, each by its share of the processes."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

from torch import nn

from fastmerge.history import History
from fastmerge.processes import Processes, Split
from fastmerge.training import loader_networks
from fastmerge.training.loader_networks import Tell
from fastmerge.training.loader_place import Place
from fastmerge.training.loader_recipe import LoaderRecipe
from fastmerge.training.loader_results import TEACHERS


def split_for_teachers(processes: Processes) -> Split | None:
    """A group of processes for each teacher; None, with a warning, where they can't be divided evenly."""
    if processes.size % TEACHERS == 0:
        return processes.split(TEACHERS)
    if processes.is_first:
        warnings.warn(
            f"teachers train side by side with a multiple of {TEACHERS} processes; with {processes.size} they train one "
            "after another",
            stacklevel=3,
        )
    return None


def train_teachers(
    recipe: LoaderRecipe, place: Place, number: int, split: Split | None, tell: Tell
) -> tuple[list[nn.Module], list[History]]:
    """Trains the teachers of one replicate.

    Args:
        recipe: the experiment.
        place: where.
        number: of the replicate.
        split: the processes by teacher, to train them side by side; None: one after another, by all.
        tell: told of every epoch.

    Returns:
        The same teachers and histories in every process.

    Raises:
        FloatingPointError: The loss of one became NaN or Inf; in all processes.
        Interrupted: A signal came, and a checkpoint was written.
    """
    if split is not None:
        return _side_by_side(recipe, place, number, split, tell)
    each = [_train(recipe, place, number, index, tell) for index in range(TEACHERS)]
    return [network for network, _ in each], [history for _, history in each]


def _train(recipe: LoaderRecipe, place: Place, number: int, index: int, tell: Tell) -> tuple[nn.Module, History]:
    path = ("teacher", number, index)
    loaders = place.loaders(recipe, *path)
    return loader_networks.train_network(recipe, recipe.teacher, place, loaders, 1, tell, *path)


def _side_by_side(
    recipe: LoaderRecipe, place: Place, number: int, split: Split, tell: Tell
) -> tuple[list[nn.Module], list[History]]:
    with split.waiting.together(FloatingPointError):
        network, history = _train(recipe, replace(place, group=split.own), number, split.number, tell)
    records = split.waiting.gather(history.record())
    teachers, histories = [], []
    for index in range(TEACHERS):
        first = split.first_of(index)
        teacher = network if index == split.number else copy.deepcopy(network)
        place.processes.share_tensors([*teacher.parameters(), *teacher.buffers()], first)
        teachers.append(teacher)
        histories.append(History(1))
        histories[-1].restore(records[first])
        if index != split.number:
            for record in histories[-1].epochs:
                tell("teacher", record, index)
    return teachers, histories

"""Runs a recipe of either kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fastmerge.data.decoding import OnBadImage
from fastmerge.merging.checks import check_compact_at
from fastmerge.merging.execution import Execution
from fastmerge.merging.plan import CompactAt
from fastmerge.schedules import PAPERS_GATE_LR
from fastmerge.training import loader_strategies, strategies
from fastmerge.training.loader_recipe import LoaderRecipe
from fastmerge.training.recipe import Recipe

AnyRecipe = Recipe | LoaderRecipe


def varied(
    recipe: AnyRecipe,
    *,
    paper: bool = False,
    link_at: float | None = None,
    gate_schedule: Any = None,
    compact_at: CompactAt = None,
    batch_size: int | None = None,
) -> AnyRecipe:
    """A recipe with other choices for its merge stage, or another batch size in all stages.

    Args:
        recipe: the experiment.
        paper: takes the paper's: linked from the start, quadratic λ, gates that learn as slowly in a short stage as in a
            long one, no channels dropped before compression, BatchNorm's statistics as compression gives them.
        link_at, gate_schedule, compact_at: as :func:`fastmerge.merge`; None is the recipe's own. A recipe in memory drops
            channels once, at that fraction.
        batch_size: images per step, of each network; of all processes together where they share a network. Learning rates
            stay as they are. None is the recipe's own.

    Raises:
        ValueError: the paper's choices and another are asked for, or one is out of range.
    """
    chosen = {"link_at": link_at, "gate_schedule": gate_schedule, "compact_at": compact_at}
    changes = {name: value for name, value in chosen.items() if value is not None}
    if paper and changes:
        raise ValueError(f"the paper's setting has its own {', '.join(chosen)}; leave them out, or --paper")
    if link_at is not None and not 0 <= link_at <= 1:
        raise ValueError(f"link_at is a fraction of the merge stage, in 0..1; got {link_at}")
    check_compact_at(compact_at)
    if compact_at is not None and not isinstance(recipe, LoaderRecipe):
        if compact_at == "settled":
            raise ValueError(f"{recipe.name} stacks its networks, which drop channels together: give a fraction")
        changes["compact_at"] = (compact_at,)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"a recipe needs a batch_size of at least 1; got {batch_size}")
    if paper:
        changes = {"link_at": 0.0, "gate_schedule": "quadratic", "compact_at": None}
        if recipe.gate_lr is None:
            changes["gate_lr"] = PAPERS_GATE_LR
        if isinstance(recipe, LoaderRecipe):
            changes["recalibrate"] = False
    if batch_size is not None:
        changes["batch_size"] = batch_size
    return replace(recipe, **changes)


def run_recipe(
    recipe: AnyRecipe,
    chosen: Sequence[str],
    *,
    loader: str = "auto",
    autocast: torch.dtype | None = None,
    on_bad_image: OnBadImage = "raise",
    execution: Execution | None = None,
    teachers_in_parallel: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Trains strategies at equal epochs: see ``run`` of :mod:`~fastmerge.training.strategies` and
    :mod:`~fastmerge.training.loader_strategies`.

    Args:
        recipe: the experiment.
        chosen: strategies.
        loader, autocast, execution, teachers_in_parallel: for recipes over loaders alone.
        on_bad_image, options: of either.

    Raises:
        ValueError: as they do, and where an option is for the other kind of recipe.
    """
    execution = Execution() if execution is None else execution
    given: dict[str, Any] = {
        "loader": loader,
        "autocast": autocast,
        "execution": execution,
        "teachers_in_parallel": teachers_in_parallel,
    }
    if isinstance(recipe, LoaderRecipe):
        return loader_strategies.run(recipe, chosen, on_bad_image=on_bad_image, **given, **options)
    if tuple(given.values()) != ("auto", None, Execution(), False):
        raise ValueError(
            f"{recipe.name} has its data in memory and trains in float32; a loader, autocast and how steps run on several "
            "devices are for recipes over images that don't fit"
        )
    return strategies.run(recipe, chosen, on_bad_image=on_bad_image, **options)

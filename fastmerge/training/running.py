"""Runs a recipe of either kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fastmerge.training import loader_strategies, strategies
from fastmerge.training.loader_recipe import LoaderRecipe
from fastmerge.training.recipe import Recipe

AnyRecipe = Recipe | LoaderRecipe


def varied(
    recipe: AnyRecipe, *, paper: bool = False, link_at: float | None = None, gate_schedule: Any = None
) -> AnyRecipe:
    """A recipe with other choices for its merge stage.

    Args:
        recipe: the experiment.
        paper: takes the paper's: linked from the start, quadratic λ.
        link_at, gate_schedule: as :func:`fastmerge.merge`; None is the recipe's own.

    Raises:
        ValueError: the paper's choices and another are asked for, or one is out of range.
    """
    if paper and not (link_at is None and gate_schedule is None):
        raise ValueError("the paper's setting has its own link_at and gate_schedule; leave them out, or --paper")
    if link_at is not None and not 0 <= link_at <= 1:
        raise ValueError(f"link_at is a fraction of the merge stage, in 0..1; got {link_at}")
    changes: dict[str, Any] = {"link_at": 0.0, "gate_schedule": "quadratic"} if paper else {}
    changes |= {} if link_at is None else {"link_at": link_at}
    changes |= {} if gate_schedule is None else {"gate_schedule": gate_schedule}
    return replace(recipe, **changes)


def run_recipe(
    recipe: AnyRecipe,
    chosen: Sequence[str],
    *,
    loader: str = "auto",
    autocast: torch.dtype | None = None,
    on_bad_image: str = "raise",
    **options: Any,
) -> dict[str, Any]:
    """Trains strategies at equal epochs: see ``run`` of :mod:`~fastmerge.training.strategies` and
    :mod:`~fastmerge.training.loader_strategies`.

    Args:
        recipe: the experiment.
        chosen: strategies.
        loader, autocast, on_bad_image: for recipes over loaders alone.
        options: of either.

    Raises:
        ValueError: as they do, and where an option is for the other kind of recipe.
    """
    if isinstance(recipe, LoaderRecipe):
        given: dict[str, Any] = {"loader": loader, "autocast": autocast, "on_bad_image": on_bad_image}
        return loader_strategies.run(recipe, chosen, **given, **options)
    if (loader, autocast, on_bad_image) != ("auto", None, "raise"):
        raise ValueError(
            f"{recipe.name} has its data in memory and trains in float32; a loader, autocast and on_bad_image are for "
            "recipes over images that don't fit"
        )
    return strategies.run(recipe, chosen, **options)

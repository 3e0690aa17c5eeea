"""The experiments, by name: functions that return a :class:`~fastmerge.training.recipe.Recipe`."""

from __future__ import annotations

from collections.abc import Callable

from fastmerge.recipes.digits import digits
from fastmerge.recipes.lenet_imagewoof import lenet_imagewoof
from fastmerge.recipes.sine import sine
from fastmerge.training.recipe import Recipe

RECIPES: dict[str, Callable[[], Recipe]] = {"sine": sine, "digits": digits, "lenet-imagewoof": lenet_imagewoof}

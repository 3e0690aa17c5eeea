"""The experiments, by name: functions that return a recipe, on data in memory or over loaders."""

from __future__ import annotations

from collections.abc import Callable

from fastmerge.recipes.digits import digits
from fastmerge.recipes.lenet_imagewoof import lenet_imagewoof
from fastmerge.recipes.resnet18_imagenet import resnet18_imagenet
from fastmerge.recipes.resnet18_imagewoof import resnet18_imagewoof
from fastmerge.recipes.resnet20_cifar100 import resnet20_cifar100
from fastmerge.recipes.sine import sine
from fastmerge.training.loader_recipe import LoaderRecipe
from fastmerge.training.recipe import Recipe

IN_MEMORY: dict[str, Callable[[], Recipe]] = {
    "sine": sine,
    "digits": digits,
    "lenet-imagewoof": lenet_imagewoof,
}
OVER_LOADERS: dict[str, Callable[[], LoaderRecipe]] = {
    "resnet20-cifar100": resnet20_cifar100,
    "resnet18-imagewoof": resnet18_imagewoof,
    "resnet18-imagenet": resnet18_imagenet,
}
RECIPES: dict[str, Callable[[], Recipe | LoaderRecipe]] = {**IN_MEMORY, **OVER_LOADERS}

"""Recipes so small that a strategy takes seconds."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from fastmerge.data.dataset import Dataset
from fastmerge.experiments.recipes import Recipe, sine
from fastmerge.experiments.run import run
from fastmerge.networks import small_lenet


def tiny_points(path, seed, on_bad_image="raise"):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(60, 1, generator=generator)
    return Dataset(x[:40], torch.sin(6 * x[:40]), x[40:], torch.sin(6 * x[40:]))


def tiny_images(path, seed, on_bad_image="raise"):
    """Images of one bright column each, which is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(60) % 4
    images = 0.3 * torch.randn(60, 1, 8, 8, generator=generator)
    images[torch.arange(60), 0, :, 2 * labels] += 1
    return Dataset(images[:40], labels[:40], images[40:], labels[40:])


def four_classes(classes, width):
    return small_lenet(4, width)


def points_recipe(**options) -> Recipe:
    """Of twelve epochs, on 36 of 40 points; ``options`` are of the merge."""
    recipe = sine().scaled(1 / 75)
    return replace(
        recipe,
        load_data=tiny_points,
        batch_size=16,
        test_every=2,
        stack=2,
        merge=replace(recipe.merge, **{"lam_step": 0.05} | options),
    )


def images_recipe(lr=0.1, **options) -> Recipe:
    recipe = points_recipe(**{"lr": lr, "criterion": F.cross_entropy} | options)
    return replace(
        recipe,
        name="columns",
        metric="test_accuracy",
        make_network=four_classes,
        load_data=tiny_images,
        curve=None,
        teacher=replace(recipe.teacher, lr=lr),
        long=replace(recipe.long, lr=lr),
        batch_size=20,
        stack=3,
    )


def run_quietly(recipe, strategies=("student",), **options):
    return run(recipe, strategies, **{"replicates": 3, "workers": 1, "progress": False, **options})

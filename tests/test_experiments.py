"""The experiments of docs/results/: their share of the images, and strategies put together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import experiments
from fastmerge.data.arrays import load_npz
from fastmerge.recipes import RECIPES
from fastmerge.reporting import results as results_files
from fastmerge.training.loader_recipe import LoaderRecipe


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_each_is_a_recipe_over_loaders_at_equal_epochs(name: str) -> None:
    experiment, recipe = experiments.EXPERIMENTS[name], RECIPES[name]()
    assert isinstance(recipe, LoaderRecipe)
    assert experiment.replicates >= 3
    scaled = recipe.scaled(experiment.budget)
    assert scaled.epochs == 2 * scaled.teacher.epochs + scaled.merge.epochs + scaled.finetune.epochs
    # Milestones stay apart, or the learning rate would skip a step of its schedule.
    for plan in (scaled.teacher, scaled.merge, scaled.finetune, scaled.long):
        assert sorted({0, plan.epochs, *plan.milestones}) == [0, *plan.milestones, plan.epochs]


def test_batch_size_and_learning_rate_are_the_experiments_or_the_recipes() -> None:
    recipe = RECIPES["resnet20-cifar100"]()
    assert isinstance(recipe, LoaderRecipe)
    experiment = experiments.EXPERIMENTS["resnet20-cifar100"]
    changed = replace(experiment, batch_size=5, lr=0.7).sized(recipe)
    assert changed.batch_size == 5
    assert {getattr(changed, name).lr for name in experiments.PLANS} == {0.7}
    same = replace(experiment, batch_size=None, lr=None).sized(recipe)
    assert replace(same, test_every=recipe.test_every) == recipe
    assert experiment.sized(recipe).scaled(experiment.budget).test_every == experiment.test_every


def test_a_share_has_the_first_images_of_each_class(tmp_path: Path) -> None:
    labels = np.array([2, 0, 1, 0, 2, 0, 1, 1])
    images = np.arange(8, dtype=np.uint8).repeat(48).reshape(8, 4, 4, 3)
    np.savez(
        tmp_path / "all.npz", train_images=images, train_labels=labels, test_images=images[:5], test_labels=labels[:5]
    )
    experiment = replace(experiments.EXPERIMENTS["resnet20-cifar100"], per_class=2, classes=None)
    experiments.save_subset(tmp_path / "all.npz", tmp_path / "share.npz", experiment)
    share = load_npz(tmp_path / "share.npz")
    assert share.train_images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 6]
    assert share.train_labels.tolist() == [2, 0, 1, 0, 2, 1]
    assert np.array_equal(share.test_images, images[:5])
    experiments.save_subset(tmp_path / "all.npz", tmp_path / "share.npz", replace(experiment, classes=2))
    share = load_npz(tmp_path / "share.npz")
    assert share.train_labels.tolist() == [0, 1, 0, 1]
    assert np.array_equal(share.test_images, images[[1, 2, 3]])


def test_strategies_are_put_together(tmp_path: Path) -> None:
    for number, name in enumerate(experiments.STRATEGIES):
        results_files.write(
            tmp_path / name,
            {
                "recipe": "resnet20-cifar100",
                "metric": "test_accuracy",
                "strategies": {name: {"values": [number / 10], "epochs": 3, "seconds": 1.0}},
                "environment": {},
                "config": {"budget": 0.1},
            },
            {"curves": {name: {"epochs": [1], "test_accuracy": [[number / 10]]}}},
        )
    experiments.join(tmp_path)
    results, history = results_files.read(tmp_path)
    assert {name: part["values"] for name, part in results["strategies"].items()} == {
        "student": [0],
        "bo3": [0.1],
        "one": [0.2],
    }
    assert history is not None
    assert set(history["curves"]) == set(experiments.STRATEGIES)

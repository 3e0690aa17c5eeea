"""The experiments of docs/results/: their share of the images, and strategies put together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import experiments
from fastmerge.data.arrays import load_npz
from fastmerge.experiments.recipes import RECIPES


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_each_is_a_recipe_over_loaders_at_equal_epochs(name: str) -> None:
    experiment, recipe = experiments.EXPERIMENTS[name], RECIPES[name]()
    assert experiment.replicates >= 3
    scaled = recipe.scaled(experiment.budget)
    assert scaled.epochs == 3 * scaled.teacher.epochs
    # Milestones stay apart, or the learning rate would skip a step of its schedule.
    for plan in (scaled.teacher, scaled.merge.merge_plan, scaled.merge.finetune_plan, scaled.long):
        assert sorted({0, plan.epochs, *plan.milestones}) == [0, *plan.milestones, plan.epochs]


def test_batch_size_and_learning_rate_are_the_experiments_or_the_recipes() -> None:
    recipe = RECIPES["resnet20-cifar100"]()
    experiment = experiments.EXPERIMENTS["resnet20-cifar100"]
    changed = replace(experiment, batch_size=5, lr=0.7).sized(recipe)
    assert changed.batch_size == 5
    plans = (changed.teacher, changed.long, changed.best_of, changed.merge.merge_plan, changed.merge.finetune_plan)
    assert {plan.lr for plan in plans} == {0.7}
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

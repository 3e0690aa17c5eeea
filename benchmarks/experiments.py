"""Experiments on real images at the budget of a machine with a few cores: what docs/results/ shows of the larger recipes.

``python -m benchmarks.experiments resnet20-cifar100 --data cifar-100-python --out runs/resnet20-cifar100``

The recipe is the paper's, with a fraction of its epochs and of its images, and the batch size and learning rate that so few
images need. A run that was stopped goes on with the same command.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fastmerge.data.arrays import ImageArrays, find_cifar, load_cifar, load_npz
from fastmerge.experiments.recipes import RECIPES, Recipe
from fastmerge.experiments.run import run
from fastmerge.reporting.report import write_report


@dataclass(frozen=True)
class Experiment:
    """A recipe and how much of it is run.

    Attributes:
        budget: fraction of the recipe's epochs.
        per_class: training images of each class, the first ones of the data; test images are all there are.
        replicates: of each strategy.
        test_every: epochs between two looks at the test images.
        autocast: dtype of mixed precision.
        classes: how many, the first ones; None is all. The test images are those of these classes.
        batch_size: images per step; None is the recipe's. With few images the recipe's leaves few steps.
        lr: learning rate of all weights, before it is divided; None is the recipe's.
    """

    budget: float
    per_class: int
    replicates: int
    test_every: int
    autocast: torch.dtype
    classes: int | None = None
    batch_size: int | None = None
    lr: float | None = None

    def sized(self, recipe: Recipe) -> Recipe:
        """The recipe with this batch size and learning rate, and as few looks at the test images."""
        # The recipe's own number shrinks with the epochs, and a look costs as much as half an epoch of so few images.
        recipe = replace(recipe, test_every=round(self.test_every / self.budget))
        if self.lr is not None:
            plans = {name: replace(getattr(recipe, name), lr=self.lr) for name in ("teacher", "long")}
            recipe = replace(recipe, merge=replace(recipe.merge, lr=self.lr, finetune_lr=None), **plans)
        return recipe if self.batch_size is None else replace(recipe, batch_size=self.batch_size)


# What decides is whether the teachers have converged: the long run must gain as little by its length as the paper's.
EXPERIMENTS = {"resnet20-cifar100": Experiment(1 / 2, 50, 3, 10, torch.bfloat16, classes=10, batch_size=16, lr=0.05)}


def main() -> None:
    """Runs an experiment and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR's folder, or an .npz")
    parser.add_argument("--out", type=Path, required=True, help="directory for the results")
    options = parser.parse_args()
    experiment = EXPERIMENTS[options.name]
    options.out.mkdir(parents=True, exist_ok=True)
    save_subset(options.data, options.out / "images.npz", experiment)
    run_experiment(options.name, options.out / "images.npz", options.out)
    print(write_report(options.out))


def run_experiment(name: str, data: Path, out: Path) -> None:
    """Trains all strategies, from the checkpoints in ``out`` if there are any."""
    experiment = EXPERIMENTS[name]
    run(
        experiment.sized(RECIPES[name]()),
        replicates=experiment.replicates,
        budget=experiment.budget,
        out=out,
        data_path=data,
        autocast=experiment.autocast,
        checkpoint_dir=out / "checkpoints",
        resume=(out / "checkpoints").is_dir(),
    )


def save_subset(source: Path, target: Path, experiment: Experiment) -> None:
    """Writes an experiment's share of the training images, and all test images of its classes, as an .npz."""
    arrays: ImageArrays = load_cifar(source) if find_cifar(source) else load_npz(source)
    labels, classes = arrays.train_labels, experiment.classes or arrays.classes
    chosen = np.sort(np.concatenate([np.flatnonzero(labels == c)[: experiment.per_class] for c in range(classes)]))
    tested = arrays.test_labels < classes
    np.savez(
        target,
        train_images=arrays.train_images[chosen],
        train_labels=labels[chosen],
        test_images=arrays.test_images[tested],
        test_labels=arrays.test_labels[tested],
    )


if __name__ == "__main__":
    main()

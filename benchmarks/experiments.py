"""Experiments on real images at the budget of a machine with a few cores: what docs/results/ shows of the larger recipes.

``python -m benchmarks.experiments resnet20-cifar100 --data cifar-100-python --out runs/resnet20-cifar100``

The recipe is the paper's, with a fraction of its epochs and of its images, and the batch size and learning rate that so few
images need. Strategies train beside each other, one core each; a run that was stopped goes on with the same command.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmerge.data.arrays import ImageArrays, load_npz
from fastmerge.data.cifar import find_cifar, load_cifar
from fastmerge.recipes import OVER_LOADERS
from fastmerge.reporting import results as results_files
from fastmerge.reporting.report import write_report
from fastmerge.training.loader_recipe import LoaderRecipe
from fastmerge.training.loader_strategies import run

STRATEGIES = ("student", "bo3", "one")
PLANS = ("teacher", "merge", "finetune", "long", "third")


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

    def sized(self, recipe: LoaderRecipe) -> LoaderRecipe:
        """The recipe with this batch size and learning rate, and as few looks at the test images."""
        # The recipe's own number shrinks with the epochs, and a look costs as much as half an epoch of so few images.
        recipe = replace(recipe, test_every=round(self.test_every / self.budget))
        if self.lr is not None:
            plans = {name: replace(getattr(recipe, name), lr=self.lr) for name in PLANS}
            recipe = replace(recipe, **plans)
        return recipe if self.batch_size is None else replace(recipe, batch_size=self.batch_size)


# What decides is whether the teachers have converged: the long run must gain as little by its length as the paper's.
EXPERIMENTS = {"resnet20-cifar100": Experiment(1 / 2, 50, 3, 10, torch.bfloat16, classes=10, batch_size=16, lr=0.05)}


def main() -> None:
    """Runs an experiment, or one strategy of it, and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR's folder, or an .npz")
    parser.add_argument("--out", type=Path, required=True, help="directory for the results")
    parser.add_argument("--strategy", choices=STRATEGIES, help="this one alone, in this process")
    options = parser.parse_args()
    if options.strategy:
        run_strategy(options.name, options.data, options.out, options.strategy)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    save_subset(options.data, options.out / "images.npz", EXPERIMENTS[options.name])
    command = [sys.executable, "-m", "benchmarks.experiments", options.name, "--data", str(options.out / "images.npz")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        calls = [[*command, "--strategy", name, "--out", str(options.out / name)] for name in STRATEGIES]
        codes = list(pool.map(lambda call: subprocess.call(call, env=environment), calls))
    if any(codes):
        sys.exit("a strategy failed; the same command goes on with it")
    join(options.out)
    print(write_report(options.out))


def run_strategy(name: str, data: Path, out: Path, strategy: str) -> None:
    """Trains the replicates of one strategy, from the checkpoints in ``out`` if there are any."""
    experiment = EXPERIMENTS[name]
    run(
        experiment.sized(OVER_LOADERS[name]()),
        [strategy],
        experiment.replicates,
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


def join(out: Path) -> None:
    """Puts the strategies' files together as if one run had trained them all."""
    results: dict[str, Any] = {}
    history: dict[str, Any] = {}
    for strategy in STRATEGIES:
        part, its_history = results_files.read(out / strategy)
        # All else is the same in each of them.
        results = {**part, **results, "strategies": results.get("strategies", {}) | part["strategies"]}
        for key, value in (its_history or {}).items():
            history[key] = history.get(key, {}) | value
    results_files.write(out, results, history)


if __name__ == "__main__":
    main()

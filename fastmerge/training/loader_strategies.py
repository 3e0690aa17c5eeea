"""Strategies at equal epochs over loaders, one network after another."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastmerge.environment import environment
from fastmerge.history import EpochRecord
from fastmerge.merging.compiling import LOG
from fastmerge.merging.execution import Execution
from fastmerge.processes import Split
from fastmerge.training import loader_networks
from fastmerge.training.loader_place import Place, check_data
from fastmerge.training.loader_recipe import LoaderRecipe
from fastmerge.training.loader_results import TEACHERS, Trained, accuracy_of, mean_curve, write
from fastmerge.training.loader_teachers import split_for_teachers, train_teachers
from fastmerge.training.strategies import check_device, check_strategies


def run(
    recipe: LoaderRecipe,
    strategies: Sequence[str] = ("student", "bo3", "one"),
    replicates: int = 1,
    budget: float = 1.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    out: Path | str | None = None,
    data_path: Path | None = None,
    progress: bool | None = None,
    loader: str = "auto",
    workers: int | None = None,
    autocast: torch.dtype | None = None,
    on_bad_image: str = "raise",
    checkpoint_dir: Path | str | None = None,
    checkpoint_seconds: float = 300.0,
    resume: bool = False,
    note: Callable[[dict[str, Any]], None] | None = None,
    execution: Execution | None = None,
    teachers_in_parallel: bool = False,
) -> dict[str, Any]:
    """Trains strategies at equal epochs and writes what came of them.

    Every network has weights, data order and changes of its own, all derived from the seed.

    Args:
        recipe: the experiment.
        strategies, replicates, budget, seed, device: as :func:`fastmerge.training.strategies.run`.
        out: directory for ``results.json``, ``history.json`` and the students as safetensors; None for no files.
        data_path: a tree of images with ``train/`` and ``val/``, CIFAR's folder, or an .npz.
        progress: whether to show a bar; None on a terminal.
        loader: what reads the images: "auto", "dali", "device" or "torch".
        workers: that decode images; None is one per core.
        autocast: dtype of mixed precision, or None.
        on_bad_image: "raise", or "skip" to leave out files that can't be read, with a warning.
        checkpoint_dir, checkpoint_seconds, resume: as :func:`fastmerge.merge`; each network and merge has a directory of
            its own in it, and what was finished is not trained again.
        note: told of every epoch.
        execution: how steps are run.
        teachers_in_parallel: with several processes, whether the teachers train side by side, each by its share of the
            processes; of teachers that other processes train, ``note`` is told when all are trained.

    Returns:
        What ``results.json`` holds.

    Raises:
        ValueError: a strategy is unknown or named twice, a number is out of range, the device can't be used, or the data
            is missing or not what the recipe needs.
        FloatingPointError: every replicate of a strategy diverged.
        Interrupted: a signal came, and a checkpoint was written.
    """
    check_strategies(strategies, replicates, seed)
    place = Place(
        data=check_data(recipe, data_path),
        device=check_device(device),
        seed=seed,
        loader=loader,
        workers=workers,
        autocast=autocast,
        on_bad_image=on_bad_image,
        checkpoints=None if checkpoint_dir is None else Path(checkpoint_dir),
        checkpoint_seconds=checkpoint_seconds,
        resume=resume,
        progress=progress,
        execution=Execution() if execution is None else execution,
    )
    split = split_for_teachers(place.processes) if teachers_in_parallel else None
    scaled = recipe.scaled(budget)
    sizes = place.loaders(scaled, "check")
    if place.processes.is_first:
        LOG.info("%s", sizes.why)
    samples = [int(n) for n in place.processes.sum([sizes.train.samples, sizes.val.samples])]
    found: dict[str, list[Trained]] = {}
    for strategy in strategies:
        found[strategy] = [
            _Replicate(scaled, place, strategy, number, split, note).run() for number in range(replicates)
        ]
        if not any(math.isfinite(trained.value) for trained in found[strategy]):
            raise FloatingPointError(f"{recipe.name}: every replicate of {strategy} diverged")
    left_out = place.processes.joined(sizes.bad_images.found)
    results = {
        "recipe": recipe.name,
        "metric": recipe.metric,
        "strategies": {
            name: {
                "values": [trained.value for trained in parts],
                "epochs": scaled.epochs,
                "seconds": round(sum(trained.seconds for trained in parts), 2),
            }
            for name, parts in found.items()
        },
        "left_out": left_out,
        "environment": environment(),
        "config": {
            **scaled.config(),
            "replicates": replicates,
            "budget": budget,
            "seed": seed,
            "device": str(place.device),
            "loader": sizes.loader,
            "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
            "train_samples": samples[0],
            "test_samples": samples[1],
            **({"images_left_out": len(left_out)} if left_out else {}),
        },
    }
    if out is not None:
        write(Path(out), scaled, results, found)
    return results


class _Replicate:
    """One replicate of one strategy."""

    def __init__(
        self,
        recipe: LoaderRecipe,
        place: Place,
        strategy: str,
        number: int,
        split: Split | None,
        note: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self.recipe, self.place, self.strategy, self.number = recipe, place, strategy, number
        self.split, self.note = split, note
        self.width = 2 if strategy.endswith("-big") else 1

    def run(self) -> Trained:
        start = time.perf_counter()
        try:
            trained = self._student() if self.strategy == "student" else self._plain()
        except FloatingPointError as error:
            warnings.warn(f"{self.recipe.name}, {self.strategy}, replicate {self.number}: {error}", stacklevel=3)
            trained = Trained()
        trained.seconds = time.perf_counter() - start
        return trained

    def _plain(self) -> Trained:
        recipe = self.recipe
        count, plan = (1, recipe.long) if self.strategy.startswith("one") else (3, recipe.third)
        networks, histories = [], []
        for index in range(count):
            path = (self.strategy, self.number, index)
            loaders = self.place.loaders(recipe, *path)
            network, history = loader_networks.train_network(
                recipe, plan, self.place, loaders, self.width, self._tell, *path
            )
            networks.append(network)
            histories.append(history)
        finals = [accuracy_of(history.epochs[-1]) for history in histories]
        best = max(range(count), key=finals.__getitem__)
        curve = mean_curve(histories, lambda values: max(values))
        return Trained(finals[best], networks[best], curve)

    def _student(self) -> Trained:
        recipe = self.recipe
        teachers, histories = train_teachers(recipe, self.place, self.number, self.split, self._tell)
        path = ("student", self.number, 0)
        student, history = loader_networks.train_merge(
            recipe, self.place, self.place.loaders(recipe, *path), teachers, self._tell, *path
        )
        curve = mean_curve(histories, lambda values: sum(values) / len(values))
        first = TEACHERS * recipe.teacher.epochs
        for name, pairs in mean_curve([history], lambda values: values[0]).items():
            curve[name] += [(first + epoch, value) for epoch, value in pairs]
        final = history.borders["student"].accuracy
        return Trained(math.nan if final is None else final, student, curve, history)

    def _tell(self, stage: str, record: EpochRecord, index: int) -> None:
        if self.note is not None:
            values: dict[str, Any] = {"strategy": self.strategy, "replicates": [self.number], "stage": stage}
            values |= {"network": index, "epoch": record.epoch, "lr": record.lr, "train_loss": [record.train.loss]}
            if record.val is not None:
                values |= {"test_loss": [record.val.loss], "test_accuracy": [accuracy_of(record)]}
            of_the_merge = {
                "lam": record.lam,
                "gate_loss": None if record.gate_loss is None else [record.gate_loss],
                "open_probability": record.open_probability,
                "linked": record.linked,
            }
            values |= {name: value for name, value in of_the_merge.items() if value is not None}
            self.note(values | {"images_per_second": record.images_per_second})

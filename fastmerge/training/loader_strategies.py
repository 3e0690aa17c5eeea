"""Strategies at equal epochs over loaders, one network after another, and the files of such a comparison."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastmerge.checkpoints import save_weights
from fastmerge.environment import environment
from fastmerge.history import EpochRecord, History
from fastmerge.processes import Processes
from fastmerge.reporting import results as results_files
from fastmerge.training.loader_networks import Place, train_merge, train_network
from fastmerge.training.loader_recipe import LoaderRecipe
from fastmerge.training.strategies import check_device, check_strategies

TEACHERS = 2


@dataclass
class Trained:
    """What one replicate of a strategy came to.

    Attributes:
        value: accuracy on the validation images; NaN where a loss was no longer finite.
        network: the final one; None where there is none.
        curve: by name of a series, (epoch, value) pairs; epochs are those of all networks together.
        history: of the merge, for the student.
        seconds: how long it took.
    """

    value: float = math.nan
    network: nn.Module | None = None
    curve: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    history: History | None = None
    seconds: float = 0.0


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

    Returns:
        What ``results.json`` holds.

    Raises:
        ValueError: a strategy is unknown or named twice, a number is out of range, the device can't be used, or the data
            is missing or not what the recipe needs.
        FloatingPointError: every replicate of a strategy diverged.
        Interrupted: a signal came, and a checkpoint was written.
    """
    check_strategies(strategies, replicates, seed)
    if data_path is None:
        raise ValueError(f"{recipe.name} needs data: a tree train/<class>/<image>, val/<class>/<image>, or an .npz")
    place = Place(
        data=data_path,
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
    )
    scaled = recipe.scaled(budget)
    sizes = place.loaders(scaled, "check")
    samples = [int(n) for n in Processes(place.device).sum([sizes.train.samples, sizes.val.samples])]
    found: dict[str, list[Trained]] = {}
    for strategy in strategies:
        found[strategy] = [_Replicate(scaled, place, strategy, number, note).run() for number in range(replicates)]
        if not any(math.isfinite(trained.value) for trained in found[strategy]):
            raise FloatingPointError(f"{recipe.name}: every replicate of {strategy} diverged")
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
        },
    }
    if out is not None:
        _write(Path(out), scaled, results, found)
    return results


class _Replicate:
    """One replicate of one strategy."""

    def __init__(
        self,
        recipe: LoaderRecipe,
        place: Place,
        strategy: str,
        number: int,
        note: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self.recipe, self.place, self.strategy, self.number, self.note = recipe, place, strategy, number, note
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
            network, history = train_network(recipe, plan, self.place, loaders, self.width, self._tell, *path)
            networks.append(network)
            histories.append(history)
        finals = [_accuracy(history.epochs[-1]) for history in histories]
        best = max(range(count), key=finals.__getitem__)
        curve = _mean_curve(histories, lambda values: max(values))
        return Trained(finals[best], networks[best], curve)

    def _student(self) -> Trained:
        recipe, teachers, histories = self.recipe, [], []
        for index in range(TEACHERS):
            path = ("teacher", self.number, index)
            loaders = self.place.loaders(recipe, *path)
            network, history = train_network(recipe, recipe.teacher, self.place, loaders, 1, self._tell, *path)
            teachers.append(network)
            histories.append(history)
        path = ("student", self.number, 0)
        student, history = train_merge(
            recipe, self.place, self.place.loaders(recipe, *path), teachers, self._tell, *path
        )
        curve = _mean_curve(histories, lambda values: sum(values) / len(values))
        first = TEACHERS * recipe.teacher.epochs
        for name, pairs in _mean_curve([history], lambda values: values[0]).items():
            curve[name] += [(first + epoch, value) for epoch, value in pairs]
        final = history.borders["student"].accuracy
        return Trained(math.nan if final is None else final, student, curve, history)

    def _tell(self, stage: str, record: EpochRecord) -> None:
        if self.note is not None:
            values = {"strategy": self.strategy, "replicates": [self.number], "stage": stage, "epoch": record.epoch}
            values |= {"lr": record.lr, "train_loss": [record.train.loss]}
            if record.val is not None:
                values["test_accuracy"] = [_accuracy(record)]
            self.note(values)


def _accuracy(record: EpochRecord) -> float:
    return math.nan if record.val is None or record.val.accuracy is None else record.val.accuracy


def _mean_curve(histories: list[History], choose: Callable[[list[float]], float]) -> dict[str, list[tuple[int, float]]]:
    """Series of networks trained for equally many epochs each; ``choose`` makes one accuracy of theirs.

    There is an entry for every epoch that looked at the test data.
    """
    curve: dict[str, list[tuple[int, float]]] = {"train_loss": [], "test_loss": [], "test_accuracy": []}
    for index, records in enumerate(zip(*(history.epochs for history in histories), strict=True)):
        losses = [record.val.loss for record in records if record.val is not None]
        if not losses:
            continue
        epoch = len(records) * (index + 1)
        curve["train_loss"].append((epoch, sum(record.train.loss for record in records) / len(records)))
        curve["test_loss"].append((epoch, sum(losses) / len(losses)))
        curve["test_accuracy"].append((epoch, choose([_accuracy(record) for record in records])))
    return curve


def _write(out: Path, recipe: LoaderRecipe, results: dict[str, Any], found: dict[str, list[Trained]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for stale in out.glob("student-*.safetensors"):  # of an earlier run with more replicates
        stale.unlink()
    for index, trained in enumerate(found.get("student", [])):
        if trained.network is not None:
            save_weights(trained.network, out / f"student-{index}.safetensors")
    results_files.write(out, results, _history(recipe, found))


def _history(recipe: LoaderRecipe, found: dict[str, list[Trained]]) -> dict[str, Any]:
    curves = {}
    for strategy, parts in found.items():
        whole = next(trained for trained in parts if trained.curve)
        curves[strategy] = {"epochs": [epoch for epoch, _ in whole.curve["train_loss"]]} | {
            name: [[_at(trained, name, index) for trained in parts] for index in range(len(pairs))]
            for name, pairs in whole.curve.items()
        }
    history: dict[str, Any] = {"curves": curves}
    merged = [trained.history for trained in found.get("student", []) if trained.history is not None]
    if merged:
        first = TEACHERS * recipe.teacher.epochs
        history["stages"] = {"student": {"merge": first, "fine-tune": first + recipe.merge.epochs}}
        gates = [each.to_dict()["gates"] for each in merged]
        history["gates"] = gates[0] | {
            "open_probability": {
                name: [list(row) for row in zip(*(each["open_probability"][name] for each in gates), strict=True)]
                for name in gates[0]["open_probability"]
            }
        }
        history["replicates"] = {
            "borders": {name: [each.borders[name].accuracy for each in merged] for name in merged[0].borders},
            "kept": [each.kept for each in merged],
        }
    return history


def _at(trained: Trained, name: str, index: int) -> float:
    return trained.curve[name][index][1] if trained.curve else math.nan

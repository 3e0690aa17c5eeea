"""What strategies over loaders came to, and the files of such a comparison."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from fastmerge.checkpoints import save_weights
from fastmerge.history import EpochRecord, History
from fastmerge.reporting import results as results_files
from fastmerge.training.loader_recipe import LoaderRecipe

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


def accuracy_of(record: EpochRecord) -> float:
    """Of the validation images after an epoch; NaN where they were not looked at."""
    return math.nan if record.val is None or record.val.accuracy is None else record.val.accuracy


def mean_curve(histories: list[History], choose: Callable[[list[float]], float]) -> dict[str, list[tuple[int, float]]]:
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
        curve["test_accuracy"].append((epoch, choose([accuracy_of(record) for record in records])))
    return curve


def write(out: Path, recipe: LoaderRecipe, results: dict[str, Any], found: dict[str, list[Trained]]) -> None:
    """Writes ``results.json``, ``history.json`` and the students."""
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

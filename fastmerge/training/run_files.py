"""The files that a comparison of strategies leaves behind."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmerge.checkpoints import save_weights
from fastmerge.files import atomic
from fastmerge.reporting import results as results_files
from fastmerge.training.jobs import Outcome
from fastmerge.training.recipe import Recipe
from fastmerge.training.student_strategy import TEACHERS


def write_run(out: Path, recipe: Recipe, results: dict[str, Any], found: dict[str, list[Outcome]]) -> None:
    """Writes ``results.json`` and ``history.json``, the students as safetensors, and ``curves.npz`` if the recipe has a curve.

    Args:
        out: directory, made if missing; files of an earlier run in it are replaced.
        recipe: with the epochs of the run.
        results: for ``results.json``, which comes last.
        found: what the jobs of each strategy brought back.
    """
    out.mkdir(parents=True, exist_ok=True)
    for stale in [*out.glob("student-*.safetensors"), out / "curves.npz"]:  # of an earlier run with more replicates
        stale.unlink(missing_ok=True)
    students = [network for part in found.get("student", []) for network in part.networks]
    for index, network in enumerate(students):
        if network is not None:
            save_weights(network, out / f"student-{index}.safetensors")
    if recipe.curve is not None:
        x, true = recipe.curve()
        arrays: dict[str, Any] = {name: _predictions(parts, len(x)) for name, parts in found.items()}
        with atomic(out / "curves.npz") as temporary:
            np.savez(temporary, **arrays, x=x.squeeze(1).numpy(), true=true.squeeze(1).numpy())
    results_files.write(out, results, _history(recipe, found))


def _predictions(parts: list[Outcome], points: int) -> np.ndarray:
    """(replicates, points); NaN for replicates that diverged."""
    rows = [
        torch.full((len(part.values), points), math.nan) if part.predictions is None else part.predictions
        for part in parts
    ]
    return torch.cat(rows).numpy()


def _history(recipe: Recipe, found: dict[str, list[Outcome]]) -> dict[str, Any]:
    """What the jobs of each strategy recorded, joined along the replicates."""
    curves = {}
    for name, parts in found.items():
        whole = max((part.curves for part in parts), key=lambda curve: len(curve.epochs))
        columns = {
            series: _joined(parts, [part.curves.series.get(series, []) for part in parts]) for series in whole.series
        }
        curves[name] = {"epochs": whole.epochs, **columns}
    history: dict[str, Any] = {"curves": curves}
    parts = found.get("student", [])
    merged = [part.student for part in parts if part.student]  # none of a job whose replicates all diverged as teachers
    if merged:
        merge_from = 2 * TEACHERS * recipe.unit
        history["stages"] = {"student": {"merge": merge_from, "fine-tune": merge_from + recipe.unit}}
        lam, groups, borders = merged[0]["lam"], merged[0]["open_probability"], merged[0]["borders"]
        history["gates"] = {
            "epochs": list(range(1, len(lam) + 1)),
            "lam": lam,
            "target": 1 / TEACHERS,
            "open_probability": {
                name: _joined(parts, [part.student["open_probability"][name] if part.student else [] for part in parts])
                for name in groups
            },
        }
        history["replicates"] = {
            "borders": {
                name: _joined(parts, [[part.student["borders"][name]] if part.student else [] for part in parts])[0]
                for name in borders
            },
            "kept": [kept for part in parts for kept in part.student.get("kept", [None] * len(part.values))],
        }
        if compacted := merged[0]["compactions"]:
            history["compactions"] = [
                {"epoch": each["epoch"], "left": [left for part in parts for left in _left(part, number)]}
                for number, each in enumerate(compacted)
            ]
    return history


def _left(part: Outcome, number: int) -> list[dict[str, int] | None]:
    """How many channels of each group the replicates had left after a compaction; None for one that diverged before."""
    found: list[dict[str, int] | None] = [None] * len(part.values)
    return part.student["compactions"][number]["left"] if part.student else found


def _joined(parts: list[Outcome], rows: list[list[list[float]]]) -> list[list[float]]:
    """Joins values per epoch and replicate along the replicates; where a job stopped early, NaN stands for its values."""
    length = max(len(each) for each in rows)
    full = [
        each + [[math.nan] * len(part.values)] * (length - len(each)) for part, each in zip(parts, rows, strict=True)
    ]
    return [[value for row in epoch for value in row] for epoch in zip(*full, strict=True)]

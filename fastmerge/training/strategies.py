"""Strategies at equal epochs, over replicates: what merging is compared with, and the files of such a comparison."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmerge.checkpoints import save_weights
from fastmerge.data.dataset import Dataset
from fastmerge.environment import environment
from fastmerge.files import atomic
from fastmerge.reporting import results as results_files
from fastmerge.training.jobs import Job, Outcome, Reporter
from fastmerge.training.plain_strategies import best_of_three, one
from fastmerge.training.recipe import Recipe
from fastmerge.training.seeds import seed_for
from fastmerge.training.student_strategy import TEACHERS, student
from fastmerge.training.workers import run_jobs

# In the order of their cost, so that processes that share the jobs end together.
_RUN: dict[str, Callable[[Job, Dataset, Reporter], Outcome]] = {
    "one-big": partial(one, width=2),
    "bo3-big": partial(best_of_three, width=2),
    "student": student,
    "one": partial(one, width=1),
    "bo3": partial(best_of_three, width=1),
}
STRATEGIES = ("student", "bo3", "one", "bo3-big", "one-big")


def run(
    recipe: Recipe,
    strategies: Sequence[str] = ("student", "bo3", "one"),
    replicates: int = 5,
    budget: float = 1.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    out: Path | str | None = None,
    data_path: Path | None = None,
    progress: bool = True,
    workers: int | None = None,
) -> dict[str, Any]:
    """Trains strategies at equal epochs and writes what came of them.

    Every network of every strategy and replicate has its own weights, data order and random numbers, all derived from
    the
    seed: no strategy profits from another's networks. On the CPU the jobs run in processes of their own, so a script
        that calls this needs the usual ``if __name__ == "__main__":``, or ``workers=1``.

    Args:
        recipe: the experiment.
        strategies: some of ``student``, ``bo3``, ``one``, ``bo3-big``, ``one-big``.
        replicates: of each strategy.
        budget: fraction of the recipe's epochs.
        seed: the same seed gives the same results on the same kind of machine.
        device: where to train.
        out: directory for ``results.json``, ``history.json``, ``student-0.safetensors`` and so on, and ``curves.npz``
            for a regression of one variable; nothing is written before all is trained. None for no files.
        data_path: the data set, for recipes that need one.
        progress: whether to show a bar.
        workers: processes on the CPU; None for one per core.

    Returns:
        What ``results.json`` holds.

    Raises:
        ValueError: a strategy is unknown or named twice, a number is out of range, the device can't be used, or the
            data is not what the recipe needs.
        FloatingPointError: every replicate of a strategy diverged.
    """
    _check(strategies, replicates, seed)
    place = _check_device(device)
    scaled = recipe.scaled(budget)
    data = recipe.load_data(data_path, seed_for(seed, "data"))
    jobs = [
        Job(strategy, chunk, scaled, seed, place)
        for strategy in _RUN
        if strategy in strategies
        for chunk in _chunks(replicates, scaled.stack)
    ]
    outcomes = run_jobs(_run_job, jobs, data, workers, progress)
    found = {
        strategy: [outcome for job, outcome in zip(jobs, outcomes, strict=True) if job.strategy == strategy]
        for strategy in strategies
    }
    results = {
        "recipe": recipe.name,
        "metric": recipe.metric,
        "strategies": {name: _summary(recipe, scaled, name, parts) for name, parts in found.items()},
        "environment": environment(),
        "config": {
            **scaled.config(),
            "replicates": replicates,
            "budget": budget,
            "seed": seed,
            "device": str(place),
            "train_samples": len(data.train_inputs),
            "test_samples": len(data.test_inputs),
        },
    }
    if out is not None:
        _write(Path(out), scaled, results, found)
    return results


def _run_job(job: Job, data: Dataset, reporter: Reporter) -> Outcome:
    start = time.perf_counter()
    outcome = _RUN[job.strategy](job, data, reporter)
    return replace(outcome, seconds=time.perf_counter() - start)


def _check(strategies: Sequence[str], replicates: int, seed: int) -> None:
    if not strategies or len(set(strategies)) != len(strategies):
        raise ValueError(f"needs at least one strategy, each once; got {', '.join(strategies) or 'none'}")
    if unknown := [name for name in strategies if name not in STRATEGIES]:
        raise ValueError(f"unknown strategy {', '.join(unknown)}; there are {', '.join(STRATEGIES)}")
    if replicates < 1 or seed < 0:
        raise ValueError(f"needs replicates of at least 1 and a seed of at least 0; got {replicates=}, {seed=}")


def _check_device(device: torch.device | str) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"can't train on device {device}: {str(error).splitlines()[0]}") from error
    return place


def _chunks(replicates: int, size: int) -> list[tuple[int, ...]]:
    return [tuple(range(start, min(start + size, replicates))) for start in range(0, replicates, size)]


def _summary(recipe: Recipe, scaled: Recipe, strategy: str, parts: list[Outcome]) -> dict[str, Any]:
    values = [value for part in parts for value in part.values]
    if not np.isfinite(values).any():
        raise FloatingPointError(
            f"{recipe.name}: every replicate of {strategy} diverged; the learning rate {recipe.lr:g} may be too high"
        )
    return {"values": values, "epochs": scaled.epochs, "seconds": round(sum(part.seconds for part in parts), 2)}


def _write(out: Path, recipe: Recipe, results: dict[str, Any], found: dict[str, list[Outcome]]) -> None:
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
    return history


def _joined(parts: list[Outcome], rows: list[list[list[float]]]) -> list[list[float]]:
    """Joins values per epoch and replicate along the replicates; where a job stopped early, NaN stands for its values."""
    length = max(len(each) for each in rows)
    full = [
        each + [[math.nan] * len(part.values)] * (length - len(each)) for part, each in zip(parts, rows, strict=True)
    ]
    return [[value for row in epoch for value in row] for epoch in zip(*full, strict=True)]

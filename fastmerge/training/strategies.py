"""Strategies at equal epochs, over replicates: what merging is compared with, and the files of such a comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmerge.data.dataset import Dataset
from fastmerge.data.decoding import OnBadImage
from fastmerge.environment import environment
from fastmerge.processes import Processes
from fastmerge.resuming.stop_requests import StopRequests
from fastmerge.training.job_bar import Note
from fastmerge.training.job_state import JobState
from fastmerge.training.jobs import Job, Outcome, Reporter
from fastmerge.training.plain_strategies import best_of_three, one
from fastmerge.training.recipe import Recipe
from fastmerge.training.run_files import write_run
from fastmerge.training.seeds import seed_for
from fastmerge.training.student_strategy import student
from fastmerge.training.workers import run_jobs

# In the order of their cost, so that processes that share the jobs end together.
_RUN: dict[str, Callable[[Job, Dataset, Reporter, JobState], Outcome]] = {
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
    progress: bool | None = True,
    workers: int | None = None,
    checkpoint_dir: Path | str | None = None,
    checkpoint_seconds: float = 300.0,
    resume: bool = False,
    note: Callable[[dict[str, Any]], None] | None = None,
    on_bad_image: OnBadImage = "raise",
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
        progress: whether to show a bar; None on a terminal.
        workers: processes on the CPU; None for one per core. Of processes that torchrun started, each does its part of the
            jobs, by itself unless it is given workers too; of the other processes' jobs ``note`` is told at the end.
        checkpoint_dir: for the run's checkpoints. Each job writes them between epochs and at the end of a stage, keeps
            the last two, and keeps its results when it is finished.
        checkpoint_seconds: at least so many between two of a job's checkpoints.
        resume: whether to go on from them, on the CPU bit for bit as if the run had not been interrupted; what has none
            yet, begins.
        note: told of every epoch of every job; after a crash some come again.
        on_bad_image: "raise", or "skip" to leave out files that can't be read, with a warning.

    Returns:
        What ``results.json`` holds.

    Raises:
        ValueError: a strategy is unknown or named twice, a number is out of range, the device can't be used, or the
            data is not what the recipe needs.
        FloatingPointError: every replicate of a strategy diverged.
        Interrupted: a KeyboardInterrupt: Ctrl-C or SIGTERM came, and checkpoints were written.
    """
    check_strategies(strategies, replicates, seed)
    place = check_device(device)
    data = recipe.load_data(data_path, seed_for(seed, "data"), on_bad_image)
    scaled = recipe.scaled(budget).fitted(len(data.train_inputs))
    checkpoints = None if checkpoint_dir is None else Path(checkpoint_dir)
    jobs = [
        Job(strategy, chunk, scaled, seed, place, checkpoints, checkpoint_seconds, resume)
        for strategy in _RUN
        if strategy in strategies
        for chunk in _chunks(replicates, scaled.stack)
    ]
    outcomes = _shared_out(jobs, data, workers, progress, note)
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
        write_run(Path(out), scaled, results, found)
    return results


def _shared_out(
    jobs: list[Job], data: Dataset, workers: int | None, progress: bool | None, note: Note | None
) -> list[Outcome]:
    """Does the jobs, each in one of the processes of torch.distributed, if there are several; all get all outcomes."""
    processes = Processes(torch.device("cpu"))
    if processes.size == 1:
        return run_jobs(_run_job, jobs, data, workers, progress, note)
    waiting = processes.patient()
    told: list[dict[str, Any]] = []
    mine = jobs[processes.rank :: processes.size]
    note = note if processes.is_first else told.append
    own = run_jobs(_run_job, mine, data, workers or 1, progress if processes.is_first else False, note)
    each = waiting.gather((own, told))
    if processes.is_first and note is not None:
        for _, values in each:
            for value in values:
                note(value)
    return [each[index % processes.size][0][index // processes.size] for index in range(len(jobs))]


def _run_job(job: Job, data: Dataset, reporter: Reporter) -> Outcome:
    with StopRequests(enabled=job.checkpoints is not None) as stop:
        state = JobState(job, data, stop)
        outcome = state.outcome()
        if outcome is None:
            outcome = _RUN[job.strategy](job, data, reporter, state)
            outcome = replace(outcome, seconds=state.seconds)
            state.finish(outcome)
        else:
            reporter.skip("finished", job.recipe.epochs * len(job.replicates))
    return outcome


def check_strategies(strategies: Sequence[str], replicates: int, seed: int) -> None:
    if not strategies or len(set(strategies)) != len(strategies):
        raise ValueError(f"needs at least one strategy, each once; got {', '.join(strategies) or 'none'}")
    if unknown := [name for name in strategies if name not in STRATEGIES]:
        raise ValueError(f"unknown strategy {', '.join(unknown)}; there are {', '.join(STRATEGIES)}")
    if replicates < 1 or seed < 0:
        raise ValueError(f"needs replicates of at least 1 and a seed of at least 0; got {replicates=}, {seed=}")


def check_device(device: torch.device | str) -> torch.device:
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

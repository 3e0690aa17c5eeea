"""Runs a recipe: the teachers of all replicates once, then every strategy, and the files that are left behind."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmerge.environment import environment
from fastmerge.experiments.column import Column
from fastmerge.experiments.lab import Lab, Note
from fastmerge.experiments.place import Place, asked_for
from fastmerge.experiments.recipes import Recipe
from fastmerge.experiments.strategies import STRATEGIES
from fastmerge.experiments.workers import Job, run_jobs
from fastmerge.files import atomic
from fastmerge.history import History
from fastmerge.merging.checks import check_device
from fastmerge.merging.compiling import LOG
from fastmerge.processes import Processes, Split
from fastmerge.reporting.results import write as write_results
from fastmerge.weights import save_weights


def run(
    recipe: Recipe,
    strategies: Sequence[str] = ("student", "bo3", "one"),
    replicates: int = 5,
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
    note: Note | None = None,
    teachers_in_parallel: bool = False,
    first: int = 0,
    **steps: Any,
) -> dict[str, Any]:
    """Trains strategies at equal epochs, or at equal cost, and writes what came of them.

    Within a replicate all strategies start from the same teachers, read their data in the same order and are tested on the
    same samples, so that their differences are paired. On the CPU, recipes in memory train in processes of their own, so a
    script that calls this needs the usual ``if __name__ == "__main__":``, or ``workers=1``.

    Args:
        recipe: the experiment.
        strategies: some of those that are registered.
        replicates: of each strategy.
        budget: fraction of the recipe's epochs.
        seed: the same seed gives the same results on the same kind of machine.
        device: where to train.
        out: directory for ``results.json``, ``history.json``, ``student-0.safetensors`` and so on, and ``curves.npz``
            for a regression of one variable; nothing is written before all is trained. None for no files.
        data_path: the data set, for recipes that need one.
        progress: whether to show a bar; None on a terminal.
        loader: what reads images: "auto", "dali", "device" or "torch".
        workers: processes that share the training on the CPU, or that decode images; None for one per core. Of processes
            that torchrun started, each trains its part of a recipe in memory, by itself unless it is given workers too.
        autocast: dtype of mixed precision, or None; not for recipes in memory.
        on_bad_image: "raise", or "skip" to leave out files that can't be read, with a warning.
        checkpoint_dir, checkpoint_seconds, resume: as :func:`fastmerge.merge`; each network or stack of them has a
            directory of its own in it, and what was finished is not trained again.
        note: told of every epoch; after a crash some come again.
        teachers_in_parallel: with several processes, whether the teachers train side by side, each by its share of them;
            of teachers that other processes train, ``note`` is told when all are trained.
        first: the number of the first replicate: a run's replicates depend on their numbers, not on how many there are.
        steps: ``accumulate``, ``compile`` and ``sync_batch_norm``, as :func:`fastmerge.merge`; not for recipes in memory.

    Returns:
        What ``results.json`` holds.

    Raises:
        ValueError: a strategy is unknown or named twice, a number is out of range, the device can't be used, or the data
            is missing or not what the recipe needs.
        FloatingPointError: every replicate of a strategy diverged.
        Interrupted: a KeyboardInterrupt: Ctrl-C or SIGTERM came, and checkpoints were written.
    """
    check_strategies(strategies, replicates, seed)
    scaled = recipe.scaled(budget)
    place = Place(
        recipe=scaled,
        data=data_path,
        device=check_device(device, torch.nn.Identity()),
        seed=seed,
        loader=loader,
        workers=workers,
        autocast=autocast,
        on_bad_image=on_bad_image,
        checkpoints=None if checkpoint_dir is None else Path(checkpoint_dir),
        checkpoint_seconds=checkpoint_seconds,
        resume=resume,
        progress=progress,
        steps=asked_for(steps),
    )
    if teachers_in_parallel and recipe.in_memory:
        raise ValueError(f"recipe {recipe.name} trains stacks of networks; it takes no --teachers-in-parallel")
    place = place.opened_here()
    if not place.classes and (wrong := [name for name in strategies if STRATEGIES[name].classifies]):
        raise ValueError(f"{recipe.name} has no classes; strategies {', '.join(wrong)} are only for classifiers")
    images = place.opened.get("made")
    if images is not None and place.processes.is_first:
        LOG.info("%s", images.why)
    split = _split(place.processes, scaled.teachers) if teachers_in_parallel else None
    train_samples, test_samples = place.samples
    numbers = range(first, first + replicates)
    found = _found(place, strategies, numbers, workers, progress, note, split)
    left_out = {} if images is None else place.processes.joined(images.bad_images.found)
    results = {
        "recipe": recipe.name,
        "metric": recipe.metric,
        "strategies": {name: _summary(recipe, name, column) for name, column in found.items()},
        "left_out": left_out,
        "environment": environment(),
        "config": {
            **scaled.config(),
            "replicates": replicates,
            "budget": budget,
            "seed": seed,
            "device": str(place.device),
            **({} if images is None else {"loader": images.loader}),
            "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
            "train_samples": train_samples,
            "test_samples": test_samples,
            **({"images_left_out": len(left_out)} if left_out else {}),
        },
    }
    if out is not None:
        write(Path(out), scaled, results, found)
    return results


def check_strategies(strategies: Sequence[str], replicates: int, seed: int) -> None:
    """Raises a ValueError where a run can't be of these."""
    if not strategies or len(set(strategies)) != len(strategies):
        raise ValueError(f"--strategy needs at least one strategy, each once; got {', '.join(strategies) or 'none'}")
    if unknown := [name for name in strategies if name not in STRATEGIES]:
        raise ValueError(f"unknown strategy {', '.join(unknown)}; there are {', '.join(STRATEGIES)}")
    if replicates < 1 or seed < 0:
        raise ValueError(f"needs replicates of at least 1 and a seed of at least 0; got {replicates=}, {seed=}")


@dataclass(frozen=True)
class Part:
    """A teacher or a strategy, of some replicates.

    Attributes:
        strategy: its name; None for a teacher.
        number: of the teacher.
    """

    place: Place
    replicates: tuple[int, ...]
    strategy: str | None = None
    number: int = 0


def do(part: Part, given: list[Column], note: Note) -> Column:
    """Trains a part of a run."""
    if part.strategy is None:
        return teacher(Lab(part.place, part.replicates, "teachers", note), part.number)
    return follow(Lab(part.place, part.replicates, part.strategy, note), part.strategy, given)


def teacher(lab: Lab, number: int) -> Column:
    """One of the networks that strategies start from."""
    return lab.train(lab.fresh(number), lab.recipe.teacher, "teacher", number)


def follow(lab: Lab, name: str, teachers: Sequence[Column]) -> Column:
    """A strategy, for those replicates of which no teacher has diverged."""
    count = len(lab.replicates)
    rows = [row for row in range(count) if all(math.isfinite(column.values[row]) for column in teachers)]
    if not rows:
        return Column.lost(count)
    if len(rows) == count:
        return STRATEGIES[name].run(lab, teachers)
    return STRATEGIES[name].run(lab.only(rows), [column.only(rows) for column in teachers]).spread(rows, count)


def _found(
    place: Place,
    strategies: Sequence[str],
    replicates: range,
    workers: int | None,
    progress: bool | None,
    note: Note | None,
    split: Split | None,
) -> dict[str, list[Column]]:
    """What the strategies came to, a column for each chunk of replicates."""
    recipe = place.recipe
    size = recipe.stack if recipe.in_memory else 1
    chunks = [tuple(replicates[start : start + size]) for start in range(0, len(replicates), size)]
    counts = {name: STRATEGIES[name].teachers(recipe) for name in strategies}
    jobs = [job for chunk in chunks for job in _jobs(place, chunk, counts)]
    if recipe.in_memory:
        workers = workers if place.device.type == "cpu" else 1
        results = _shared_out(jobs, chunks, workers, progress, place.samples[0], note)
    else:
        results = {}
        for job in jobs:
            part: Part = job.arguments
            if split is not None and part.strategy is None and part.number < recipe.teachers:
                if part.number == 0:
                    results |= _side_by_side(place, part.replicates, split, note)
                continue
            results[job.name] = do(part, [results[name] for name in job.needs], note or (lambda values: None))
    return {name: [results[_named(name, chunk)] for chunk in chunks] for name in strategies}


def _jobs(place: Place, chunk: tuple[int, ...], counts: dict[str, int]) -> list[Job]:
    """The teachers of a chunk of replicates and the strategies, the longest first as far as their needs allow."""
    recipe, saves = place.recipe, place.checkpoints is not None
    alone = [name for name, count in counts.items() if not count]
    teachers = [Part(place, chunk, None, number) for number in range(max(counts.values()))]
    jobs = [
        Job(_named("teacher", chunk, part.number), do, part, (), len(chunk) * recipe.teacher.epochs, saves)
        for part in teachers
    ]
    first, rest = jobs[: recipe.teachers], jobs[recipe.teachers :]
    for name in [*alone, *(name for name in counts if name not in alone)]:
        needs = tuple(_named("teacher", chunk, number) for number in range(counts[name]))
        epochs = recipe.epochs - counts[name] * recipe.teacher.epochs
        job = Job(_named(name, chunk), do, Part(place, chunk, name), needs, len(chunk) * max(0, epochs), saves)
        (first if name in alone else rest).append(job)
    return first + rest


def _named(name: str, chunk: tuple[int, ...], number: int | None = None) -> str:
    which = f" {number}" if number is not None else ""
    return f"{name}{which}, replicates {chunk[0]}..{chunk[-1]}"


def _shared_out(
    jobs: list[Job],
    chunks: Sequence[tuple[int, ...]],
    workers: int | None,
    progress: bool | None,
    samples: int,
    note: Note | None,
) -> dict[str, Any]:
    """Does the jobs, each chunk's in one of the processes of torch.distributed, if there are several; all get all results."""
    processes = Processes(torch.device("cpu"))
    if processes.size == 1:
        return run_jobs(jobs, workers, progress, samples, note)
    waiting = processes.patient()
    told: list[dict[str, Any]] = []
    own = chunks[processes.rank :: processes.size]
    mine = [job for job in jobs if job.arguments.replicates in own]
    shown = progress if processes.is_first else False
    results = run_jobs(mine, workers or 1, shown, samples, note if processes.is_first else told.append)
    each = waiting.gather((results, told))
    if processes.is_first and note is not None:
        for value in (value for _, values in each for value in values):
            note(value)
    return {name: result for part, _ in each for name, result in part.items()}


def _split(processes: Processes, teachers: int) -> Split | None:
    """A group of processes for each teacher; None, with a warning, where they can't be divided evenly."""
    if processes.size % teachers == 0:
        return processes.split(teachers)
    if processes.is_first:
        warnings.warn(
            f"--teachers-in-parallel needs a multiple of {teachers} processes; with {processes.size} the teachers train one "
            "after another",
            stacklevel=3,
        )
    return None


def _side_by_side(place: Place, replicates: tuple[int, ...], split: Split, note: Note | None) -> dict[str, Column]:
    """Teachers that train at the same time, each by one group of the processes; all get all of them."""
    lab = Lab(replace(place, group=split.own), replicates, "teachers", note)
    own = teacher(lab, split.number)
    own.networks = [network and network.cpu() for network in own.networks]
    columns: list[Any] = split.waiting.gather(own)
    found = {}
    for number in range(place.recipe.teachers):
        column = columns[split.first_of(number)]
        column.networks = [network and copy.deepcopy(network).to(place.device) for network in column.networks]
        found[_named("teacher", replicates, number)] = column
        if number != split.number and note is not None and column.histories[0] is not None:
            for record in column.histories[0].epochs:
                note(lab._noted(record, "teacher", number))
    return found


def _summary(recipe: Recipe, name: str, columns: Sequence[Column]) -> dict[str, Any]:
    values = [value for column in columns for value in column.values]
    if not np.isfinite(values).any():
        raise FloatingPointError(f"{recipe.name}: every replicate of {name} diverged; a learning rate may be too high")
    whole = max(columns, key=lambda column: column.epochs)
    at_once = [_at_once(history, recipe) for column in columns for history in column.histories]
    return {
        "values": values,
        "losses": [curve[-1][1]["test_loss"] if curve else math.nan for column in columns for curve in column.curves],
        **({"at_once": at_once} if any(value is not None for value in at_once) else {}),
        "epochs": whole.epochs,
        "cost": round(max(column.cost for column in columns), 2),
        "seconds": round(sum(column.seconds for column in columns), 2),
    }


def write(out: Path, recipe: Recipe, results: dict[str, Any], found: dict[str, list[Column]]) -> None:
    """Writes ``results.json`` and ``history.json``, the students as safetensors, and ``curves.npz`` if the recipe has a curve.

    Args:
        out: directory, made if missing; files of an earlier run in it are replaced.
        recipe: with the epochs of the run.
        results: for ``results.json``, which comes last.
        found: what the strategies came to.
    """
    out.mkdir(parents=True, exist_ok=True)
    for stale in [*out.glob("student-*.safetensors"), out / "curves.npz"]:  # of an earlier run with more replicates
        stale.unlink(missing_ok=True)
    students = [network for column in found.get("student", []) for network in column.networks]
    for index, network in enumerate(students):
        if network is not None:
            save_weights(network, out / f"student-{index}.safetensors")
    if recipe.curve is not None:
        x, true = recipe.curve()
        arrays: dict[str, Any] = {name: _drawn(columns, x) for name, columns in found.items()}
        with atomic(out / "curves.npz") as temporary:
            np.savez(temporary, **arrays, x=x.squeeze(1).numpy(), true=true.squeeze(1).numpy())
    write_results(out, results, _history(recipe, found))


@torch.no_grad()
def _drawn(columns: Sequence[Column], x: torch.Tensor) -> np.ndarray:
    """(replicates, points) as the networks have them; NaN for replicates that diverged."""
    networks = [network for column in columns for network in column.networks]
    nothing = torch.full((len(x),), math.nan)
    rows = [nothing if network is None else network.cpu().eval()(x).squeeze(1) for network in networks]
    return torch.stack(rows).numpy()


def _history(recipe: Recipe, found: dict[str, list[Column]]) -> dict[str, Any]:
    """Figures by epoch, those of all replicates beside each other."""
    curves = {}
    for name, columns in found.items():
        each = [curve for column in columns for curve in column.curves]
        whole = max(each, key=len)
        curves[name] = {"epochs": [epoch for epoch, _ in whole]} | {
            series: [
                [curve[index][1][series] if index < len(curve) else math.nan for curve in each]
                for index in range(len(whole))
            ]
            for series in (whole[0][1] if whole else {})
        }
    history: dict[str, Any] = {"curves": curves}
    students = [history for column in found.get("student", []) for history in column.histories]
    first = next((each for each in students if each is not None), None)
    if first is None:
        return history
    merge_from = recipe.teachers * recipe.teacher.epochs
    gates: dict[str, Any] = first.to_dict()["gates"]
    history["stages"] = {"student": {"merge": merge_from, "fine-tune": merge_from + recipe.merge.merge_epochs}}
    history["gates"] = gates | {
        "open_probability": {
            name: [[_opened(each, epoch, name) for each in students] for epoch in range(len(gates["epochs"]))]
            for name in gates["open_probability"]
        }
    }
    history["replicates"] = {
        "borders": {name: [_border(each, name, recipe) for each in students] for name in first.borders},
        "kept": [each and each.kept for each in students],
    }
    if any(each is not None and each.compactions for each in students):
        history["compactions"] = [each and each.compactions for each in students]
    return history


def _opened(history: History | None, epoch: int, group: str) -> float:
    return math.nan if history is None else (history.stage("merge")[epoch].open_probability or {})[group]


def _at_once(history: History | None, recipe: Recipe) -> Any:
    """How good a merged network was before its fine-tuning; None where there is none."""
    return None if history is None or "compressed" not in history.borders else _border(history, "compressed", recipe)


def _border(history: History | None, name: str, recipe: Recipe) -> Any:
    if history is None or name not in history.borders:
        return math.nan
    score = history.borders[name]
    return score.loss if recipe.metric == "test_loss" else score.accuracy

"""Train strategies at equal epochs or equal cost and compare them: the paper's experiments, and a quick one on digits.

DIR gets results.json, history.json, log.jsonl, the networks of the strategy student as safetensors, report.md and plots.

Killed or interrupted, a run goes on with: fastmerge run --out DIR --resume
Several GPUs: torchrun --nproc-per-node 8 -m fastmerge run ... trains each network by all of them; recipes in memory share
out their stacks of networks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastmerge.cli import resume
from fastmerge.cli.arguments import STEPS, add_options, chosen, fraction, integer, names, precision
from fastmerge.cli.dry_run import add_planning, checked_images, plan
from fastmerge.cli.torchrun import at_work
from fastmerge.data.loading import LOADERS
from fastmerge.experiments.place import Place
from fastmerge.experiments.recipes import RECIPES, Recipe
from fastmerge.experiments.rehearsal import estimate_run
from fastmerge.experiments.run import run
from fastmerge.experiments.strategies import STRATEGIES
from fastmerge.merging.checks import check_device
from fastmerge.processes import Processes
from fastmerge.reporting.report import write_report
from fastmerge.reporting.results import EpochLog

SUMMARY = "run an experiment: train teachers, merge them, and compare with other uses of the same epochs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fastmerge run``."""
    add = resume.adder(parser)
    add("recipe", nargs="?", required=True, choices=list(RECIPES), metavar="RECIPE", help=", ".join(RECIPES))
    add(
        "--strategy",
        type=names,
        default=["student", "bo3", "one"],
        metavar="A,B,..",
        help=f"some of {', '.join(STRATEGIES)}; default student,bo3,one",
    )
    add("--replicates", type=integer(1), default=5, metavar="N", help="of each strategy; default 5")
    add("--budget", type=fraction, default=1.0, metavar="F", help="fraction of the recipe's epochs, 0..1; default 1")
    add(
        "--batch-size",
        type=integer(1),
        metavar="N",
        help="images per step, of all processes that share a network; default the recipe's, as are the learning rates",
    )
    add("--data", type=Path, metavar="PATH", help="image tree or .npz, for recipes that need one")
    add("--seed", type=integer(0), default=0, metavar="S", help="default 0")
    add(
        "--device",
        metavar="D",
        help="cpu, cuda, cuda:1, ...; default cpu, for recipes that read images cuda where there is one",
    )
    add("--out", type=Path, metavar="DIR", help="default runs/RECIPE")
    add(
        "--workers",
        type=integer(1),
        metavar="N",
        help="processes that share the training on the CPU; default one per core",
    )
    add("--paper", action="store_true", help="the paper's setting where the recipe's own differs")
    add_options(add, varying=True)
    add("--loader", default="auto", choices=("auto", *LOADERS), help="of recipes that read images")
    add("--autocast", choices=("bfloat16", "float16"), help="mixed precision of recipes that read images")
    add("--on-bad-image", default="raise", choices=("raise", "skip"), help="what a file that can't be read does")
    add_options(add, names=STEPS)
    add(
        "--teachers-in-parallel",
        action="store_true",
        help="with several processes, train the teachers of recipes that read images side by side, each by its share of them",
    )
    add_planning(add)
    resume.add_tensorboard(add)
    add("--quiet", action="store_true", help="no progress bar")


def command(options: argparse.Namespace) -> None:
    """Runs the recipe and prints its table."""
    recipe = RECIPES[options.recipe]().varied(options.paper, options.batch_size, **chosen(options, varying=True))
    by_itself = "cuda" if not recipe.in_memory and torch.cuda.is_available() else "cpu"
    with at_work(options, options.device or by_itself) as (device, processes):
        _run(options, recipe, device, processes)


def _run(options: argparse.Namespace, recipe: Recipe, device: str, processes: Processes) -> None:
    out: Path = options.out
    if options.dry_run:
        resume.check(options)
        print(_plan(options, recipe, device))
        return
    if resume.begin(options, processes):
        if processes.is_first:
            print(f"the run in {out} is finished\n\n{write_report(out)}")
        return
    with resume.epoch_log(options, processes, ("strategy", "replicates", "stage", "network", "epoch")) as log:
        run(
            recipe,
            options.strategy,
            loader=options.loader,
            autocast=precision(options),
            on_bad_image=options.on_bad_image,
            teachers_in_parallel=options.teachers_in_parallel,
            replicates=options.replicates,
            budget=options.budget,
            seed=options.seed,
            device=device,
            out=out if processes.is_first else None,
            data_path=options.data,
            progress=False if options.quiet else None,
            workers=options.workers,
            checkpoint_dir=out / resume.CHECKPOINTS,
            checkpoint_seconds=options.checkpoint_seconds,
            resume=options.resume,
            note=None if log is None else _noting(log),
            **{name: getattr(options, name) for name in STEPS},
        )
    if processes.is_first:
        print(write_report(out))
        students = "students, " if "student" in options.strategy else ""
        print(f"\nresults, {students}log.jsonl, report.md and plots in {out}")
        resume.finish(options)


def _plan(options: argparse.Namespace, recipe: Recipe, device: str) -> str:
    if recipe.in_memory:
        raise ValueError(f"{recipe.name} has its data in memory; --dry-run is only for recipes that read images")
    place = Place(
        recipe=recipe.scaled(options.budget),
        data=options.data,
        device=check_device(device, torch.nn.Identity()),
        seed=options.seed,
        loader=options.loader,
        workers=options.workers,
        autocast=precision(options),
        on_bad_image=options.on_bad_image,
        steps={name: getattr(options, name) for name in STEPS},
    )
    place.check_data()
    images = checked_images(options, options.data)
    loaders, found = estimate_run(place, options.strategy, replicates=options.replicates, processes=options.processes)
    return plan(options, images, loaders.why, found)


def _noting(log: EpochLog) -> Callable[[dict[str, Any]], None]:
    def note(values: dict[str, Any]) -> None:
        network = f"-{values['network']}" if values.get("network") else ""
        stage = f"{values['stage']}{network}"
        log.write(values, values["epoch"], f"{values['strategy']}-{values['replicates'][0]}/{stage}")

    return note

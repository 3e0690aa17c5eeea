"""Train strategies at equal epochs and compare them: the paper's experiments, and a quick one on digits.

DIR gets results.json, history.json, log.jsonl, the students as safetensors, report.md and plots.

Killed or interrupted, a run goes on with: fastmerge run --out DIR --resume
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

from fastmerge.cli import continuing
from fastmerge.cli.arguments import fraction, integer, names
from fastmerge.recipes import RECIPES
from fastmerge.reporting.epoch_log import EpochLog
from fastmerge.reporting.report import write_report
from fastmerge.training import strategies

SUMMARY = "an experiment: teachers, merge, student, and what else the epochs could have bought"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fastmerge run``."""
    add = continuing.adder(parser)
    add("recipe", nargs="?", required=True, choices=list(RECIPES), metavar="RECIPE", help=", ".join(RECIPES))
    add(
        "--strategy",
        type=names,
        default=["student", "bo3", "one"],
        metavar="A,B,..",
        help=f"some of {', '.join(strategies.STRATEGIES)}; default student,bo3,one",
    )
    add("--replicates", type=integer(1), default=5, metavar="N", help="of each strategy; default 5")
    add("--budget", type=fraction, default=1.0, metavar="F", help="fraction of the recipe's epochs, 0..1; default 1")
    add("--data", type=Path, metavar="PATH", help="image tree or .npz, for recipes that need one")
    add("--seed", type=integer(0), default=0, metavar="S", help="default 0")
    add("--device", default="cpu", metavar="D", help="cpu, cuda, cuda:1, ...; default cpu")
    add("--out", type=Path, metavar="DIR", help="default runs/RECIPE")
    add(
        "--workers",
        type=integer(1),
        metavar="N",
        help="processes that share the training on the CPU; default one per core",
    )
    add("--quiet", action="store_true", help="no progress bar")


def command(options: argparse.Namespace) -> None:
    """Runs the recipe and prints its table."""
    out: Path = options.out
    if continuing.begin(options):
        print(f"the run in {out} is finished\n\n{write_report(out)}")
        return
    key = ("strategy", "replicates", "stage", "epoch")
    log = EpochLog(out / "log.jsonl", key, options.resume, out / "tensorboard" if options.tensorboard else None)

    def note(values: dict[str, Any]) -> None:
        log.write(values, values["epoch"], f"{values['strategy']}-{values['replicates'][0]}/{values['stage']}")

    with contextlib.closing(log):
        strategies.run(
            RECIPES[options.recipe](),
            options.strategy,
            replicates=options.replicates,
            budget=options.budget,
            seed=options.seed,
            device=options.device,
            out=out,
            data_path=options.data,
            progress=not options.quiet,
            workers=options.workers,
            checkpoint_dir=out / continuing.CHECKPOINTS,
            checkpoint_seconds=options.checkpoint_seconds,
            resume=options.resume,
            note=note,
        )
    print(write_report(out))
    print(f"\nresults, students, log.jsonl, report.md and plots in {out}")
    continuing.finish(options)

"""Train strategies at equal epochs and compare them: the paper's experiments, and a quick one on digits.

DIR gets results.json, history.json, the students as safetensors, report.md and plots.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastmerge.cli.arguments import fraction, integer, names
from fastmerge.recipes import RECIPES
from fastmerge.reporting.report import write_report
from fastmerge.training import strategies

SUMMARY = "an experiment: teachers, merge, student, and what else the epochs could have bought"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fastmerge run``."""
    parser.add_argument("recipe", choices=list(RECIPES), metavar="RECIPE", help=", ".join(RECIPES))
    parser.add_argument(
        "--strategy",
        type=names,
        default=["student", "bo3", "one"],
        metavar="A,B,..",
        help=f"some of {', '.join(strategies.STRATEGIES)}; default student,bo3,one",
    )
    parser.add_argument("--replicates", type=integer(1), default=5, metavar="N", help="of each strategy; default 5")
    parser.add_argument(
        "--budget", type=fraction, default=1.0, metavar="F", help="fraction of the recipe's epochs, 0..1; default 1"
    )
    parser.add_argument("--data", type=Path, metavar="PATH", help="image tree or .npz, for recipes that need one")
    parser.add_argument("--seed", type=integer(0), default=0, metavar="S", help="default 0")
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda, cuda:1, ...; default cpu")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default runs/RECIPE")
    parser.add_argument(
        "--workers",
        type=integer(1),
        metavar="N",
        help="processes that share the training on the CPU; default one per core",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def command(options: argparse.Namespace) -> None:
    """Runs the recipe and prints its table."""
    out = options.out or Path("runs") / options.recipe
    out.mkdir(parents=True, exist_ok=True)  # what can't be written to is better known before the training
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
    )
    print(write_report(out))
    print(f"\nresults, students, report.md and plots in {out}")

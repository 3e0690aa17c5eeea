"""Run several methods to make one network of the same trained networks, and compare what comes out.

  fastmerge compare --model resnet18 --teachers a.safetensors b.pt --data imagewoof/ --methods repair,zipit,gates --out out/
  fastmerge compare ... --methods rebasin,reconstruct --set rebasin.by=activations reconstruct.samples=256

Each method gets the same teachers and data; its network is scored at once and again after the same fine-tuning. DIR gets
compare.json, compare.md, compare.png and each network as NAME.safetensors. Rows are written as they come.

Killed or interrupted, it goes on with: fastmerge compare --out DIR --resume

On a recipe, which trains teachers of its own, n times, and compares at equal cost, in pairs:

  fastmerge compare digits --methods gates,repair,zipit --replicates 12

is ``fastmerge run digits --strategy ours-plain,repair,zipit --replicates 12``, whose options it takes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastmerge.cli import resume
from fastmerge.cli.arguments import add_images, add_options, add_teachers, integer, load_teachers, method_option, names
from fastmerge.data.loading import image_loaders
from fastmerge.environment import environment
from fastmerge.evaluation import Setting
from fastmerge.experiments.recipes import RECIPES
from fastmerge.experiments.strategies import STRATEGIES
from fastmerge.merging.checks import check_device
from fastmerge.merging.options import Options
from fastmerge.methods import METHODS
from fastmerge.methods.comparison import Row, compare
from fastmerge.methods.cost import predict
from fastmerge.processes import Processes
from fastmerge.reporting.report import write_report
from fastmerge.reporting.results import read_comparison, write_json
from fastmerge.weights import save_weights

SUMMARY = "compare methods on your own trained networks"
# What is read of the options of fastmerge merge, which may name a method, too.
READS = {"model", "model_args", "teachers", "classes", "ema", "data", "out", "finetune_epochs", "batch_size", "lr"}
READS |= {"momentum", "weight_decay", "warmup", "image_size", "augmentation", "mean", "std", "device", "seed"}
READS |= {"quiet", "resume", "checkpoint_seconds", "set"}
# The strategy that merges by gates and, as those of the other methods, learns from no teachers; and all methods of a recipe.
GATES = "ours-plain"
ON_RECIPES = ("gates", *(name for name in METHODS if name in STRATEGIES))


def as_run(words: Sequence[str]) -> list[str]:
    """What ``fastmerge run`` is told for ``fastmerge compare RECIPE``; other words as they are."""
    command, *rest = words or [""]
    if command != "compare" or not rest or rest[0].startswith("-"):
        return list(words)
    told = ["run"]
    for word in rest:
        flag, equals, value = word.partition("=")
        before = told[-1] == "--strategy"
        if flag == "--methods":
            told += ["--strategy", *([_strategies(value)] if equals else [])]
        else:
            told.append(_strategies(word) if before else word)
    if {"--strategy", "--resume"} & {*told}:
        return told
    recipe = RECIPES[rest[0]]() if rest[0] in RECIPES else None
    classes = recipe is None or recipe.metric == "test_accuracy"
    usual = [name for name in ON_RECIPES if name == "gates" or classes or not STRATEGIES[name].classifies]
    return [*told, "--strategy", _strategies(",".join(usual))]


def _strategies(methods: str) -> str:
    return ",".join(GATES if name.strip() == "gates" else name for name in methods.split(","))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fastmerge compare``."""
    add = resume.adder(parser)
    add_teachers(add)
    add("--data", type=Path, required=True, metavar="PATH", help="image tree or .npz")
    add("--out", type=Path, required=True, metavar="DIR", help="where tables and networks go")
    methods = f"of {', '.join(METHODS)}, or your own that the module of --model registers; default all but your own"
    add("--methods", type=names, default=list(METHODS), metavar="NAMES", help=methods)
    add_method_options(add)
    add("--epochs", type=integer(1), metavar="N", help="epochs of methods that train; default each method's own")
    add_options(add, names=("finetune_epochs", "lr", "momentum", "weight_decay", "warmup"))
    add_images(add)
    add("--seed", type=integer(0), default=0, metavar="S", help="of the data's order and all else; default 0")
    add("--quiet", action="store_true", help="no progress bar")


def add_method_options(add: Callable[..., object]) -> None:
    """Adds ``--set``, which :func:`run` reads."""
    add(
        "--set",
        nargs="+",
        type=method_option,
        default=[],
        metavar="METHOD.OPTION=VALUE",
        help="options of methods, as in Python: rebasin.by=activations reconstruct.samples=256",
    )


def command(options: argparse.Namespace) -> None:
    """Runs the methods, prints the table and writes it."""
    run(options, options.methods, options.epochs)


def run(options: argparse.Namespace, methods: Sequence[str], epochs: int | None, student: str | None = None) -> int:
    """Runs methods as options of a command say.

    Args:
        options: of the command.
        methods: names.
        epochs: of those that train; None: of each as many as it has by default.
        student: what the file of the one method's network is called; None: each has its method's name, beside a baseline.

    Returns:
        Exit status: 1 where ``student`` is wanted and its method or fine-tuning failed.

    Raises:
        ValueError: DIR holds another run, or one is at work there; or torchrun started several processes.
    """
    if (several := os.environ.get("WORLD_SIZE", "1")) != "1" and "RANK" in os.environ:
        raise ValueError(
            f"methods are compared, and all but gates run, in one process; start fastmerge without torchrun, not {several} "
            "times"
        )
    processes = Processes(torch.device("cpu"))
    with resume.alone(options, processes):
        finished = resume.begin(options, processes)
        if not finished:
            _run(options, methods, epochs, student)
        table = write_report(options.out)
        print(f"the comparison in {options.out} is finished\n\n{table}" if finished else f"\n{table}")
        rows = read_comparison(options.out)["rows"]
        failed = [row for row in rows if row["error"]]
        if not finished:
            if not failed:
                resume.finish(options)
            made = [each for each in ("compare.json", "compare.md", "compare.png", student) if each is not None]
            there = [name for name in made if (options.out / name).exists()]
            print(f"\n{', '.join(there)}{' and networks' if student is None else ''} in {options.out}")
            if failed:
                print(
                    f"failed: {', '.join(row['name'] for row in failed)}{resume.how_to_go_on(options)}, which tries again"
                )
    if student is None or not failed:
        return 0
    print(f"fastmerge: error: there is no {student}; {failed[0]['name']}: {failed[0]['error']}", file=sys.stderr)
    return 1


def _run(options: argparse.Namespace, methods: Sequence[str], epochs: int | None, student: str | None) -> None:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device, nn.Identity())
    loaders = image_loaders(
        options.data,
        options.batch_size,
        image_size=options.image_size,
        augmentation=options.augmentation,
        device=device,
        seed=options.seed or 0,
        mean=options.mean,
        std=options.std,
    )
    teachers = [teacher.to(device).eval() for teacher in load_teachers(options, loaders.classes)]
    rows: list[Row] = []
    given = _by_method(options.set)
    chosen = {name: given.get(name, {}) for name in methods}
    made_by = {"config": resume.config(options), "environment": environment()}

    def note(row: Row, network: nn.Module | None) -> None:
        if not rows:  # all is checked by now
            print(_cost(teachers, loaders.train, chosen, options.finetune_epochs, epochs, alone=student is not None))
        rows.append(row)
        print(_line(row), flush=True)
        if row.name in METHODS and network is not None:
            save_weights(network, options.out / (student or f"{row.name}.safetensors"))
        write_json(options.out / "compare.json", {"rows": [r.to_dict() for r in rows]} | made_by)

    compare(
        teachers,
        loaders.train,
        loaders.val,
        methods,
        finetune_epochs=options.finetune_epochs,
        epochs=epochs,
        lr=options.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        warmup=options.warmup,
        options=given,
        seed=options.seed or 0,
        baseline=student is None,
        callback=note,
        progress=False if options.quiet else None,
        checkpoint_dir=options.out / resume.CHECKPOINTS,
        checkpoint_seconds=options.checkpoint_seconds,
        resume=options.resume,
    )


def _by_method(given: Sequence[tuple[str, str, Any]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for method, name, value in given:
        found.setdefault(method, {})[name] = value
    return found


def _cost(
    teachers: Sequence[nn.Module],
    train_loader: Any,
    methods: Mapping[str, Mapping[str, Any]],
    finetune_epochs: int,
    epochs: int | None,
    *,
    alone: bool,
) -> str:
    """What methods will cost together, with fine-tuning and the baseline, in epochs of training one network."""
    setting = Setting(check_device(None, teachers[0]), cross_entropy)
    tuning = {name: finetune_epochs * METHODS[name].one_network for name in methods}
    lengths = {name: own.get("epochs", epochs or METHODS[name].epochs) for name, own in methods.items()}
    known = {
        name: _of_training(name, length, teachers, train_loader, setting, methods[name])
        for name, length in lengths.items()
        if length and METHODS[name].needs == "training"
    }
    costs = {name: lengths[name] if cost is None else cost for name, cost in known.items()}
    parts = [f"{sum(tuning.values())} of fine-tuning"]
    parts += [f"{cost:.0f} for {lengths[name]} epochs of {name}" for name, cost in costs.items()]
    total = sum(tuning.values()) + sum(costs.values())
    if not alone:
        longest = max([finetune_epochs, *(round(tuning[name] + costs.get(name, 0)) for name in methods)])
        total += longest
        parts.append(f"{longest} of the teacher that is trained on for as long as the dearest")
    said = f"cost: about {total:.0f} epochs of training one network ({', '.join(parts)})"
    if unknown := [name for name, cost in known.items() if cost is None]:
        said += f"; the epochs of {' and '.join(unknown)} may be dearer"
    if any(METHODS[name].needs == "samples" for name in methods):
        said += "; methods that read samples take some passes over these besides"
    return said


def _of_training(
    name: str,
    epochs: int,
    teachers: Sequence[nn.Module],
    train_loader: Any,
    setting: Setting,
    own: Mapping[str, Any],
) -> float | None:
    """What a method's own training will cost; None where that is not known."""
    if name == "distill":
        return epochs * (1 + len(teachers) / 3)  # a forward pass is a third of a step
    if name != "gates":
        return None
    plan = Options(merge_epochs=epochs, finetune_epochs=0, link_at=own.get("link_at", METHODS[name].options["link_at"]))
    try:
        return predict(teachers, train_loader, setting, plan).merge
    except (TypeError, ValueError, RuntimeError):  # the row will say what is wrong
        return None


def _line(row: Row) -> str:
    if row.error:
        return f"{row.name}: {row.error}"
    scores = [score for score in (row.at_once, row.tuned) if score is not None]
    values = [f"{score.loss:.4f}" if score.accuracy is None else f"{score.accuracy:.4f}" for score in scores]
    return f"{row.name}: {' -> '.join(values)} ({row.seconds:.1f} s)"

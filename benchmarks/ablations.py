"""Ablations of the merge: what each of its choices is worth, on the same teachers.

``python -m benchmarks.ablations --recipe digits --replicates 20``
``python -m benchmarks.ablations --recipe resnet20-cifar100 --data cifar-100-python``

For every replicate two teachers are trained once, and all variants start from them, with the same initial gates and the
same order of the data, so that differences to the paper's setting are paired. Results are written after every variant;
run again, it goes on with what is missing (the teachers lie beside FILE.json, as .safetensors). docs/render.py makes
docs/ablations.md of the files in docs/results/ablations/. Recipes over loaders are those of benchmarks/experiments.py, with
its share of images and epochs.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.ablation_loaders import LoaderAblation
from benchmarks.ablation_record import Record, open_probabilities
from benchmarks.ablation_stacked import StackedAblation
from benchmarks.ablation_stages import TEACHERS, Ablation
from benchmarks.ablation_variants import BASE, Variant, variants
from benchmarks.experiments import EXPERIMENTS, save_subset
from fastmerge.checkpoints import load_weights, save_weights
from fastmerge.recipes import IN_MEMORY, OVER_LOADERS
from fastmerge.schedules import PAPERS_GATE_LR, fitting_gate_lr
from fastmerge.training.loader_place import Place, check_data
from fastmerge.training.running import varied
from fastmerge.training.seeds import seed_for

ROOT = Path(__file__).resolve().parent.parent
LINK_AT = (0.0, 0.1, 0.25, 0.5, 1.0)

Epoch = Callable[[int], object]


@dataclass(frozen=True)
class Setup:
    """What the command line asks for.

    Attributes:
        config: what results depend on, JSON values.
        variants: all there are.
        chunks: replicates that are measured together.
        ablation: of a chunk; it calls back after every epoch.
    """

    config: dict[str, Any]
    variants: list[Variant]
    chunks: list[Sequence[int]]
    ablation: Callable[[Sequence[int], Epoch], Ablation]


def in_memory(options: argparse.Namespace) -> Setup:
    """Of a recipe whose data is in memory."""
    budget = 1.0 if options.budget is None else options.budget
    recipe = varied(IN_MEMORY[options.recipe](), paper=True).scaled(budget)
    data = recipe.load_data(options.data, seed_for(options.seed, "data")).to(options.device)
    steps = recipe.merge_steps(len(data.train_inputs))
    return Setup(
        config=recipe.config() | {"budget": budget, "train_samples": len(data.train_inputs)},
        variants=variants(recipe.make_network(1), LINK_AT, _faster(steps)),
        chunks=_chunks(10 if options.replicates is None else options.replicates, recipe.stack),
        ablation=lambda chunk, epoch: StackedAblation(recipe, data, chunk, options.seed, epoch),
    )


def over_loaders(options: argparse.Namespace, folder: Path) -> Setup:
    """Of an experiment over loaders; its images and the teachers' checkpoints go to the folder."""
    experiment = EXPERIMENTS[options.recipe]
    budget = experiment.budget if options.budget is None else options.budget
    recipe = varied(experiment.sized(OVER_LOADERS[options.recipe]()), paper=True).scaled(budget)
    folder.mkdir(parents=True, exist_ok=True)
    images = folder / "images.npz"
    save_subset(check_data(recipe, options.data), images, experiment)
    place = Place(
        data=images,
        device=torch.device(options.device),
        seed=options.seed,
        autocast=experiment.autocast,
        checkpoints=folder / "checkpoints" if options.teachers is None else options.teachers,
        resume=True,
        progress=False,
    )
    loaders = place.loaders(recipe, "check")
    steps = recipe.merge.epochs * len(loaders.train)
    dtype = str(experiment.autocast).removeprefix("torch.")
    return Setup(
        config=recipe.config() | {"budget": budget, "train_samples": loaders.train.samples, "autocast": dtype},
        variants=variants(recipe.make_network(loaders.classes, 1), LINK_AT, _faster(steps), every_epoch=True),
        chunks=_chunks(experiment.replicates if options.replicates is None else options.replicates, 1),
        ablation=lambda chunk, epoch: LoaderAblation(recipe, place, chunk[0], epoch),
    )


def _faster(steps: int) -> float | None:
    """The learning rate that fits gates to so many steps, where it is another than the paper's."""
    fitting = fitting_gate_lr(steps)
    return fitting if fitting > PAPERS_GATE_LR else None


def _chunks(replicates: int, size: int) -> list[Sequence[int]]:
    return [range(start, min(start + size, replicates)) for start in range(0, replicates, size)]


def ablate(ablation: Ablation, record: Record, wanted: Sequence[Variant], bar: tqdm[Any]) -> None:
    """Measures what is missing of some variants for the replicates of an ablation.

    A variant that diverges is warned of and left out.
    """
    chunk = ablation.replicates
    missing = record.missing(chunk, wanted)
    if not missing:
        return
    which = f"replicate {chunk[0]}" if len(chunk) == 1 else f"replicates {chunk[0]}-{chunk[-1]}"
    bar.set_description(f"{which}, teachers")
    teachers = _teachers(ablation, record, chunk)
    base: list[Any] = []
    for variant in missing:
        bar.set_description(f"{which}, {variant.name}")
        start = time.process_time()
        try:
            if variant.merges or not base:
                bigs = ablation.merged(teachers, variant if variant.merges else _named(wanted, BASE))
                base = bigs if variant.name == BASE or not variant.merges else base
            if not variant.merges:
                bigs = base
            students = ablation.compressed(bigs, variant)
            scores = {"big student": list(map(ablation.score, bigs)), "compressed": list(map(ablation.score, students))}
            scores["student"] = list(map(ablation.score, ablation.finetuned(students, variant)))
        except FloatingPointError as error:
            warnings.warn(f"{which}, {variant.name}: {error}", stacklevel=2)
            continue
        scores["seconds"] = [(time.process_time() - start) / len(chunk)] * len(chunk)
        record.add(variant, chunk, scores, [open_probabilities(big) for big in bigs])


def _teachers(ablation: Ablation, record: Record, chunk: Sequence[int]) -> list[nn.Module]:
    """The teachers of a chunk: from the files beside the results, or trained and put there."""
    files = _teacher_files(record, chunk)
    if all(file.exists() for file in files):
        teachers = [ablation.make_network() for _ in files]
        for teacher, file in zip(teachers, files, strict=True):
            load_weights(teacher, file)
    else:
        teachers = ablation.teachers()
        files[0].parent.mkdir(parents=True, exist_ok=True)
        for teacher, file in zip(teachers, files, strict=True):
            save_weights(teacher.state_dict(), file)
    record.add_teachers(chunk, [ablation.score(teacher) for teacher in teachers])
    return teachers


def _teacher_files(record: Record, chunk: Sequence[int]) -> list[Path]:
    numbers = [(replicate, number) for replicate in chunk for number in range(TEACHERS)]
    return [record.folder / f"teacher-{replicate}-{number}.safetensors" for replicate, number in numbers]


def _named(wanted: Sequence[Variant], name: str) -> Variant:
    return next(variant for variant in wanted if variant.name == name)


def epochs_left(setup: Setup, record: Record, wanted: Sequence[Variant]) -> int:
    """Epochs, each of one network, until nothing is missing."""
    left = 0
    for chunk in setup.chunks:
        missing = record.missing(chunk, wanted)
        if not missing:
            continue
        teacher, merge, finetune = setup.ablation(chunk, lambda networks: None).lengths
        trained = all(file.exists() for file in _teacher_files(record, chunk))
        merges = [variant for variant in missing if variant.merges]
        edits = len(merges) < len(missing) and BASE not in [variant.name for variant in merges]
        each = (0 if trained else TEACHERS * teacher) + (len(merges) + edits) * merge + len(missing) * finetune
        left += len(chunk) * each
    return left


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what is missing and writes the file after every variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recipes = [*(name for name in IN_MEMORY if name != "sine"), *EXPERIMENTS]
    parser.add_argument("--recipe", choices=recipes, default="digits")
    parser.add_argument("--data", type=Path, metavar="PATH", help="for recipes that need one")
    parser.add_argument(
        "--budget", type=float, metavar="F", help="fraction of the epochs; default 1, or the experiment's"
    )
    parser.add_argument("--replicates", type=int, metavar="N", help="default 10, or the experiment's")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default 0")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="some of them; default all")
    parser.add_argument(
        "--teachers",
        type=Path,
        metavar="DIR",
        help="checkpoints of the strategy 'student' in an experiment of this size, whose teachers are taken",
    )
    parser.add_argument("--device", default="cpu", metavar="D", help="default cpu")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="default runs/ablations/RECIPE.json")
    parser.add_argument(
        "--add", type=Path, metavar="FILE.json", help="take over what a run beside this one has measured"
    )
    options = parser.parse_args(arguments)
    path = options.out or ROOT / "runs" / "ablations" / f"{options.recipe}.json"
    if options.teachers is not None:
        if options.recipe in IN_MEMORY:
            parser.error(f"--teachers needs a recipe over loaders; {options.recipe} trains its own")
        if not any(options.teachers.glob("teacher-*-*")):
            parser.error(f"--teachers needs a directory with checkpoints teacher-N-N; {options.teachers} has none")
    torch.set_num_threads(1)
    setup = in_memory(options) if options.recipe in IN_MEMORY else over_loaders(options, path.with_suffix(""))
    chosen = setup.variants
    if options.variants is not None:
        if unknown := set(options.variants) - {variant.name for variant in chosen}:
            parser.error(f"there are {', '.join(v.name for v in chosen)}; got {', '.join(unknown)}")
        names = {BASE, *options.variants}
        chosen = [variant for variant in chosen if variant.name in names]
    record = Record(path, _plain(setup.config | {"seed": options.seed}))
    if options.add is not None:
        record.take(options.add)
    with tqdm(unit="epoch", total=epochs_left(setup, record, chosen)) as bar:
        for chunk in setup.chunks:
            ablate(setup.ablation(chunk, bar.update), record, chosen, bar)
    print(record.path)


def _plain(config: dict[str, Any]) -> Any:
    return json.loads(json.dumps(config))


if __name__ == "__main__":
    main()

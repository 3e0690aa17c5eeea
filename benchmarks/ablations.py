"""Ablations of the merge: what each of its choices is worth, on the same teachers.

``python -m benchmarks.ablations --recipe digits --replicates 20``
``python -m benchmarks.ablations --recipe resnet20-cifar100 --data cifar-100-python``

For every replicate two teachers are trained once, and all variants start from them, with the same initial gates and the
same order of the data, so that differences to the paper's setting are paired. Results are written after every variant;
run again, it goes on with what is missing (the teachers' checkpoints lie beside FILE.json). docs/render.py makes
docs/ablations.md of the files in docs/results/ablations/. Recipes that read images are those of benchmarks/experiments.py, with
its share of images and epochs.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.ablation_lab import Ablation
from benchmarks.ablation_record import Record, open_probabilities
from benchmarks.ablation_variants import BASE, Variant, variants
from benchmarks.experiments import EXPERIMENTS, save_subset
from fastmerge.experiments.place import Place
from fastmerge.experiments.recipes import RECIPES
from fastmerge.schedules import PAPERS_GATE_LR, fitting_gate_lr

ROOT = Path(__file__).resolve().parent.parent
LINK_AT = (0.0, 0.1, 0.25, 0.5, 1.0)


def setup(options: argparse.Namespace, folder: Path) -> tuple[Place, dict[str, Any], int]:
    """Where the recipe trains, what its results depend on, and how many replicates there are.

    Recipes that read images are those of benchmarks/experiments.py; their share of the images goes to the folder.
    """
    recipe, data, autocast, experiment = RECIPES[options.recipe](), options.data, None, EXPERIMENTS.get(options.recipe)
    budget, replicates = options.budget or 1.0, options.replicates or 10
    if experiment is not None:
        budget, replicates = options.budget or experiment.budget, options.replicates or experiment.replicates
        recipe, autocast = experiment.sized(recipe), experiment.autocast
        if data is None:
            raise ValueError(f"{recipe.name} needs --data")
        data = folder / "images.npz"
        folder.mkdir(parents=True, exist_ok=True)
        save_subset(options.data, data, experiment)
    place = Place(
        recipe=recipe.varied(paper=True).scaled(budget),
        data=data,
        device=torch.device(options.device),
        seed=options.seed,
        autocast=autocast,
        checkpoints=folder / "checkpoints" if options.teachers is None else options.teachers,
        resume=True,
        progress=False,
    ).opened_here()
    config = place.recipe.config() | {"budget": budget, "train_samples": place.samples[0], "seed": options.seed}
    return place, config | ({} if autocast is None else {"autocast": str(autocast).removeprefix("torch.")}), replicates


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
    teachers = ablation.teachers()
    by_number = [ablation.scores(each) for each in zip(*teachers, strict=True)]
    record.add_teachers(chunk, [list(each) for each in zip(*by_number, strict=True)])
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
            scores = {"big student": ablation.scores(bigs), "compressed": ablation.scores(students)}
            scores["student"] = ablation.scores(ablation.finetuned(students, variant))
        except FloatingPointError as error:
            warnings.warn(f"{which}, {variant.name}: {error}", stacklevel=2)
            continue
        scores["seconds"] = [(time.process_time() - start) / len(chunk)] * len(chunk)
        record.add(variant, chunk, scores, [open_probabilities(big) for big in bigs])


def _named(wanted: Sequence[Variant], name: str) -> Variant:
    return next(variant for variant in wanted if variant.name == name)


def epochs_left(place: Place, chunks: Sequence[Sequence[int]], record: Record, wanted: Sequence[Variant]) -> int:
    """Epochs, each of one network, until nothing is missing; of teachers that are there, too."""
    left = 0
    for chunk in chunks:
        missing = record.missing(chunk, wanted)
        if not missing:
            continue
        teacher, merge, finetune = Ablation(place, chunk, lambda networks: None).lengths
        merges = [variant for variant in missing if variant.merges]
        edits = len(merges) < len(missing) and BASE not in [variant.name for variant in merges]
        each = place.recipe.teachers * teacher + (len(merges) + edits) * merge + len(missing) * finetune
        left += len(chunk) * each
    return left


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what is missing and writes the file after every variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recipes = ["digits", "lenet-imagewoof", *EXPERIMENTS]
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
    if options.teachers is not None and not any(options.teachers.glob("teacher-*-*")):
        parser.error(f"--teachers needs a directory with checkpoints teacher-N-N; {options.teachers} has none")
    torch.set_num_threads(1)
    place, config, replicates = setup(options, path.with_suffix(""))
    steps = place.recipe.merge.merge_epochs * -(-place.samples[0] // place.recipe.batch_size)
    every = variants(place.recipe.make_network(place.classes, 1), LINK_AT, _faster(steps))
    chunks = _chunks(replicates, place.recipe.stack if place.recipe.in_memory else 1)
    chosen = every
    if options.variants is not None:
        if unknown := set(options.variants) - {variant.name for variant in chosen}:
            parser.error(f"there are {', '.join(v.name for v in chosen)}; got {', '.join(unknown)}")
        names = {BASE, *options.variants}
        chosen = [variant for variant in chosen if variant.name in names]
    record = Record(path, _plain(config))
    if options.add is not None:
        record.take(options.add)
    with tqdm(unit="epoch", total=epochs_left(place, chunks, record, chosen)) as bar:
        for chunk in chunks:
            ablate(Ablation(place, chunk, bar.update), record, chosen, bar)
    print(record.path)


def _plain(config: dict[str, Any]) -> Any:
    return json.loads(json.dumps(config))


if __name__ == "__main__":
    main()

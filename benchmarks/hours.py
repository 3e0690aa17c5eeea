"""docs/scaling.md's hours of the ImageNet recipe, from the committed JSON of runs of bench_step.py on a GPU.

A stage takes ``epochs · steps · s`` on one GPU, with the ``s`` of a step of the recipe's batch as it was measured. P GPUs take
at best a P-th of it, and at worst, as far as messages go, ``epochs · steps · 2 (P - 1) / P · gradients / bandwidth`` longer.
Until a GPU has run it, ``s`` is what is to be expected from others' measurement of a plain network.
"""

from __future__ import annotations

import fnmatch
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from benchmarks import names
from benchmarks.cases import Case
from benchmarks.counting import Ceilings, step_work
from benchmarks.report import machine
from benchmarks.results import Contenders, cases
from fastmerge.big_student import BigStudent
from fastmerge.experiments.recipes import RECIPES, Recipe
from fastmerge.merging.estimate import Part
from fastmerge.reporting.tables import table

RECIPE = "resnet18-imagenet"
IMAGES, CLASSES = 1_281_167, 1000  # ImageNet-1k's training images
LATE = 0.25  # of the merge stage before linking, where it is not the recipe's
GPUS = (1, 8, 64)
BANDWIDTH = 1e10  # bytes per second that a GPU sends, the default of --bandwidth
UNMEASURED = (
    "Not measured yet: no GPU has run it. `make gpu OUT=folder` on a machine with one times the steps; with its JSON in "
    "benchmarks/results, `make docs` puts the hours here. Until then, these are estimates for an A100 (SXM, 80 GB), on which "
    "others have trained a ResNet-50 with {rate:,} images/s in mixed precision and batches of {batch} ([source]({source})): "
    "{efficiency:.2f} of what its data sheet allows. They assume that a step of the merge stage is slower than a plain step by "
    "as much as it has more operations and bytes (`benchmarks/counting.py`). For several GPUs the first number assumes that a "
    "share of the batch takes its share of the time; small shares take more. The second number adds the time to send all "
    "gradients after the backward pass, at {sent:g} GB/s. Validation and start-up are left out."
)
# What others have measured, and the A100's data sheet: dense float16 on tensor cores with float32 sums, memory, last cache.
RATE, MEASURED = 2470, replace(Case("resnet50", 256, 224, "fp16", "cuda"), teachers=1)
SOURCE = "https://github.com/NVIDIA/DeepLearningExamples/tree/master/PyTorch/Classification/ConvNets/resnet50v1.5"
SHEET = Ceilings(flops=312e12, bandwidth=2.039e12, cache=40 * 2**20)
_LOADERS = (names.DALI, names.DATALOADER)


def tables(runs: dict[str, dict[str, Any]]) -> str:
    """A table for every run and precision whose steps are those of the recipe.

    Args:
        runs: as :func:`benchmarks.report.load` reads them.
    """
    recipe = RECIPES[RECIPE]()
    pattern = f"step, resnet18 {recipe.image_size}px batch {recipe.batch_size} * cuda"
    found = []
    for run in runs.values():
        every = cases(run)
        for case in fnmatch.filter(every, pattern):
            steps = {name: statistics.median(c["samples"]) for name, c in every[case].items() if c.get("samples")}
            if any(name in steps for name in (names.TEACHERS, names.UNLINKED, names.LINKED)):
                found.append(_section(recipe, case, every[case], steps, every, run))
    return "\n\n".join(found) or _unmeasured(recipe)


def efficiency() -> float:
    """The least time of a measured step by the data sheet / the time that it took."""
    return SHEET.seconds(step_work(MEASURED, False)) * RATE / MEASURED.batch


def expected(case: Case, dense: bool) -> float:
    """Seconds of a step of T networks side by side with the efficiency that was measured; ``dense`` as in ``step_work``."""
    return SHEET.seconds(step_work(case, dense)) / efficiency()


def _unmeasured(recipe: Recipe) -> str:
    """What is to be expected of a card that others have measured."""
    case = Case("resnet18", recipe.batch_size, recipe.image_size, "bf16", "cuda")
    apart, linked = (expected(case, dense) for dense in (False, True))
    told = {"rate": RATE, "batch": MEASURED.batch, "source": SOURCE, "sent": BANDWIDTH / 1e9}
    return "\n\n".join(
        [
            UNMEASURED.format(efficiency=efficiency(), **told),
            _table(recipe, {names.TEACHERS: apart, names.UNLINKED: apart, names.LINKED: linked}, {}),
        ]
    )


def _section(
    recipe: Recipe,
    case: str,
    contenders: Contenders,
    steps: dict[str, float],
    every: dict[str, Contenders],
    run: dict[str, Any],
) -> str:
    text = (
        f"A step of {recipe.batch_size} images in {case.split()[-2]} as it was measured on one GPU, with its peak of memory, "
        "times the steps of each part. For several GPUs the first number assumes that a share of the batch takes its share of "
        "the time (small shares take more), and that gradients are sent during the backward pass. The second number assumes "
        f"that they are sent after it, at {BANDWIDTH / 1e9:g} GB/s. Validation and start-up are left out."
    )
    return "\n\n".join([text, _table(recipe, steps, contenders), *_reading(recipe, every), machine(run)])


def _table(recipe: Recipe, steps: dict[str, float], contenders: Contenders) -> str:
    header = ["part", "epochs", "images/s", "memory", *(f"{_gpus(count)}, hours" for count in GPUS)]
    measured = _parts(recipe, steps)
    rows = [_row(recipe, contenders, name, part, who) for name, (part, who) in measured.items()]
    rows += [[name, *_whole(parts)] for name, parts in _wholes(recipe, measured).items()]
    return table(header, rows, markdown=True)


def _parts(recipe: Recipe, steps: dict[str, float]) -> dict[str, tuple[Part | None, str]]:
    """By name, parts and the contenders that were timed for them; a part is None where its step was not measured."""
    nbytes = _gradients(recipe)
    one, merge = nbytes[names.TEACHERS], recipe.merge.merge_epochs
    made = {
        "teachers": (recipe.teachers * recipe.teacher.epochs, names.TEACHERS, one),
        "merge, linked": (merge, names.LINKED, nbytes[names.LINKED]),
        "merge, block-diagonal": (merge, names.UNLINKED, nbytes[names.UNLINKED]),
        **({"merge, naive dense": (merge, names.NAIVE, nbytes[names.LINKED])} if names.NAIVE in steps else {}),
        "fine-tune": (recipe.merge.finetune_epochs, names.TEACHERS, one),
    }
    count = -(-IMAGES // recipe.batch_size)
    found: dict[str, tuple[Part | None, str]] = {}
    for name, (epochs, who, gradients) in made.items():
        seconds = _seconds(steps, who, recipe.teachers if who == names.TEACHERS else 1)
        found[name] = (None if seconds is None else Part(name, epochs, count, seconds, gradients), who)
    return found


def _wholes(recipe: Recipe, measured: dict[str, tuple[Part | None, str]]) -> dict[str, list[Part | None]]:
    """The parts of a student, at the recipe's time of linking and at a later one, and of one network for all epochs."""
    parts = {name: part for name, (part, _) in measured.items()}
    before = round(LATE * recipe.merge.merge_epochs)
    late = [
        _for_epochs(parts["merge, block-diagonal"], before),
        _for_epochs(parts["merge, linked"], recipe.merge.merge_epochs - before),
    ]
    return {
        f"student, in all (`--link-at {recipe.merge.link_at:g}`)": [
            parts["teachers"],
            parts["merge, linked"],
            parts["fine-tune"],
        ],
        f"student, in all (`--link-at {LATE:g}`)": [parts["teachers"], *late, parts["fine-tune"]],
        "`one`, for comparison": [_for_epochs(parts["teachers"], recipe.long.epochs)],
    }


def _for_epochs(part: Part | None, epochs: int) -> Part | None:
    return None if part is None else replace(part, epochs=epochs)


def _seconds(steps: dict[str, float], name: str, networks: int = 1) -> float | None:
    return steps[name] / networks if name in steps else None


@cache
def _gradients(recipe: Recipe) -> dict[str, int]:
    """Bytes of a step's gradients."""
    teachers = [recipe.make_network(CLASSES, 1) for _ in range(recipe.teachers)]
    big = BigStudent(*teachers, example_inputs=torch.zeros(2, 3, 64, 64))
    found = {names.TEACHERS: _bytes(teachers[0]), names.UNLINKED: _bytes(big)}
    big.link()
    return found | {names.LINKED: _bytes(big)}


def _bytes(network: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in network.parameters())


def _row(recipe: Recipe, contenders: Contenders, name: str, part: Part | None, who: str) -> list[str]:
    peak = contenders.get(who, {}).get("peak_bytes")
    memory = f"{peak / 2**30:.1f} GiB" if peak else "–"
    rate = "not measured" if part is None else f"{recipe.batch_size / part.seconds:.0f}"
    epochs = "–" if part is None else str(part.epochs)
    return [name, epochs, rate, memory, *_hours([part])]


def _whole(parts: Sequence[Part | None]) -> list[str]:
    epochs = "–" if None in parts else str(sum(part.epochs for part in parts if part is not None))
    return [epochs, "–", "–", *_hours(parts)]


def _hours(parts: Sequence[Part | None]) -> list[str]:
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return ["–"] * len(GPUS)
    found = []
    for count in GPUS:
        best = sum(part.total or 0 for part in known) / count / 3600
        worst = best + sum(part.messages(count, BANDWIDTH) for part in known) / 3600
        found.append(f"{best:.2g}" if count == 1 else f"{best:.2g} to {worst:.2g}")
    return found


def _reading(recipe: Recipe, every: dict[str, Contenders]) -> list[str]:
    """What the machine's loaders gave, which no stage can be faster than."""
    of_loaders = every.get(f"data, prepared to {recipe.image_size}px cuda", {})
    rates = {
        name: of_loaders[name]["items"] / statistics.median(of_loaders[name]["samples"])
        for name in _LOADERS
        if of_loaders.get(name, {}).get("samples")
    }
    if not rates:
        return []
    best = max(rates, key=rates.__getitem__)
    epochs = recipe.epochs
    return [
        f"Reading is left out too: on that machine {best} gave {rates[best]:.0f} prepared images per second to one GPU. Parts "
        f"with more images/s are slowed down to this, and {epochs} epochs take no less than "
        f"{epochs * IMAGES / rates[best] / 3600:.2g} hours there."
    ]


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' * (count > 1)}"

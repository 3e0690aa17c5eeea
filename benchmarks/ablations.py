"""Ablations of the merge: what each of its choices is worth, on the same teachers.

``python -m benchmarks.ablations --recipe digits --replicates 20``

For every replicate two teachers are trained once, and all variants start from them, with the same initial gates and the
same order of the data, so that differences to the paper's setting are paired. Results are written after every variant;
run again, it goes on with what is missing (the teachers lie beside FILE.json, as .safetensors). docs/render.py makes
docs/ablations.md of the files in docs/results/ablations/.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.ablation_variants import BASE, Variant, variants
from fastmerge.big_student import BigStudent
from fastmerge.checkpoints import load_weights, save_weights
from fastmerge.data.dataset import Dataset
from fastmerge.environment import environment
from fastmerge.gate_budget import GateBudget
from fastmerge.recipes import IN_MEMORY
from fastmerge.reporting.results import write_json
from fastmerge.schedules import QuadraticLambda
from fastmerge.training.recipe import Recipe
from fastmerge.training.scores import score
from fastmerge.training.seeds import generator_for, seed_for
from fastmerge.training.stack import Stack
from fastmerge.training.stacked import train
from fastmerge.training.stage import Stage

ROOT = Path(__file__).resolve().parent.parent
TEACHERS = 2
LINK_AT = (0.0, 0.1, 0.25, 0.5, 1.0)

Scores = dict[str, list[float]]


class Ablation:
    """The stages of a merge for some replicates, each from the same seeds whatever the variant.

    Args:
        recipe: with the epochs of the run.
        data: where the networks are trained.
        replicates: their numbers.
        seed: of the run.
        epoch: called after every epoch with how many networks were trained in it.
    """

    def __init__(
        self, recipe: Recipe, data: Dataset, replicates: Sequence[int], seed: int, epoch: Callable[[int], object]
    ) -> None:
        self.recipe, self.data, self.replicates, self.seed, self.epoch = recipe, data, replicates, seed, epoch

    def teachers(self) -> list[nn.Module]:
        """Two trained networks for each replicate, one after another."""
        networks = []
        for replicate in self.replicates:
            for number in range(TEACHERS):
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(self._seed("weights", replicate, number))
                    networks.append(self.recipe.make_network(1))
        stack = Stack(networks)
        self._train(stack, self.recipe.teacher_stage(), "teachers", self.replicates)
        return stack.networks()

    def merged(self, teachers: Sequence[nn.Module], variant: Variant) -> list[Any]:
        """The big students at the end of their stage."""
        recipe = replace(self.recipe, **variant.changes)
        example = self.data.normalise(self.data.train_inputs[:2])
        bigs: list[Any] = []
        for position, replicate in enumerate(self.replicates):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed("gates", replicate))
                pair = teachers[TEACHERS * position : TEACHERS * (position + 1)]
                bigs.append(variant.big(*pair, example_inputs=example))
        stage, unit = recipe.merge_stage(), recipe.unit
        link_from = round(recipe.link_at * unit)
        cuts = {round(at * unit) for at in variant.compact_at}
        gates = {f"gates.{name}" for name, _ in bigs[0].gates.named_parameters()}
        parts = [(self.replicates, bigs, _weight_of_gates(recipe, self.data))]
        for start, end in pairwise(sorted({0, link_from, *cuts, unit})):
            if start == link_from:
                for big in bigs:
                    big.link()
            if start in cuts:  # from here on the replicates are of different sizes
                for big in bigs:
                    big.compact()
                single = [(r, b, copy.deepcopy(lam)) for rs, bs, lam in parts for r, b in zip(rs, bs, strict=True)]
                parts = [([replicate], [big], lam) for replicate, big, lam in single]
            rest = tuple(milestone - start for milestone in stage.milestones)
            # Until something is cut, all variants read the data in one order.
            name = f"merge {int(start >= link_from)}" + (f" from {start}" if start in cuts else "")
            segment = replace(stage, epochs=end - start, milestones=rest)
            for index, (replicates, together, lam) in enumerate(parts):
                stack = Stack(together)
                self._train(stack, segment, name, replicates, variant.draws, lam, gates)
                parts[index] = (replicates, stack.networks(), lam)
            bigs = [big for _, together, _ in parts for big in together]
        return bigs

    def compressed(self, bigs: Sequence[Any], variant: Variant) -> Stack:
        """The students before fine-tuning."""
        students = []
        for big in bigs:
            student = big.compress()
            if variant.edit is not None:
                variant.edit(student, big, self.data, self.recipe.batch_size)
            students.append(student)
        return Stack(students)

    def finetune(self, stack: Stack, draws: int) -> None:
        """Trains the students."""
        self._train(stack, self.recipe.finetune_stage(), "fine-tune", self.replicates, draws)

    def score(self, networks: Stack) -> list[float]:
        """The recipe's metric on the test data, one number per network."""
        return score(networks, self.data, self.recipe.criterion)[self.recipe.metric].tolist()

    def _train(
        self,
        stack: Stack,
        stage: Stage,
        name: str,
        replicates: Sequence[int],
        draws: int = 0,
        lam: QuadraticLambda | GateBudget | None = None,
        gates: Collection[str] = (),
    ) -> None:
        each, path = len(stack) // len(replicates), (name, draws) if draws else (name,)
        orders = [
            generator_for(self.seed, "ablations", "order", *path, replicate, number)
            for replicate in replicates
            for number in range(each)
        ]
        noise = generator_for(self.seed, "ablations", "noise", *path, replicates[0], device=stack.device)
        torch.manual_seed(self._seed("draws", *path, replicates[0]))
        for _ in train(stack, self.data, stage, orders, noise, lam, gates):
            self.epoch(len(stack))

    def _seed(self, *path: int | str) -> int:
        return seed_for(self.seed, "ablations", *path)


def _weight_of_gates(recipe: Recipe, data: Dataset) -> QuadraticLambda | GateBudget:
    if recipe.gate_schedule == "quadratic":
        return QuadraticLambda(recipe.lam_start, recipe.lam_step)
    steps = recipe.unit * math.ceil(len(data.train_inputs) / recipe.batch_size)
    return GateBudget(steps, gate_lr=recipe.gate_lr, momentum=recipe.momentum)


class Record:
    """Results as they come, in a file; what is in it is not measured again.

    Args:
        path: the JSON file.
        config: what the results depend on.

    Raises:
        ValueError: the file holds the results of another configuration.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.results: dict[str, Any] = {"config": config, "environment": environment(), "teachers": {}, "variants": {}}
        if path.exists():
            self.results = json.loads(path.read_text(encoding="utf-8"))
            if self.results["config"] != config:
                raise ValueError(f"{path} holds results of another configuration; remove it or choose another --out")

    def missing(self, chunk: Sequence[int], wanted: Sequence[Variant]) -> list[Variant]:
        """The variants that some replicate of a chunk has no result of."""
        found = self.results["variants"]
        return [v for v in wanted if not all(str(r) in found.get(v.name, {}).get("replicates", {}) for r in chunk)]

    def add(self, variant: Variant, chunk: Sequence[int], scores: Scores, opened: list[dict[str, float]]) -> None:
        """Writes down what a variant came to; ``scores`` has one number per replicate under each name."""
        entry = self.results["variants"].setdefault(variant.name, {"what": variant.what, "replicates": {}})
        if variant.compact_at or not variant.merges:  # it has the draws of the base until then
            entry["compared_with"] = BASE
        for position, replicate in enumerate(chunk):
            found = {name: values[position] for name, values in scores.items()}
            entry["replicates"][str(replicate)] = found | {"open_probability": opened[position]}
        self.write()

    def add_teachers(self, chunk: Sequence[int], values: list[float]) -> None:
        """Writes down how good the teachers are."""
        for position, replicate in enumerate(chunk):
            self.results["teachers"][str(replicate)] = values[TEACHERS * position : TEACHERS * (position + 1)]
        self.write()

    def take(self, path: Path) -> None:
        """Takes over what another file has and this one lacks.

        Raises:
            ValueError: it has another configuration, or other teachers, which nothing can be compared over.
        """
        other = json.loads(path.read_text(encoding="utf-8"))
        for key in ("config", "teachers"):
            if self.results[key] and other[key] != self.results[key]:
                raise ValueError(f"{path} has another {key} than {self.path}")
        self.results["teachers"] = other["teachers"]
        for name, entry in other["variants"].items():
            mine = self.results["variants"].setdefault(name, {**entry, "replicates": {}})
            mine["replicates"] = entry["replicates"] | mine["replicates"]
        self.write()

    def write(self) -> None:
        """Replaces the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.results)


def _open(big: BigStudent) -> dict[str, float]:
    with torch.no_grad():
        return {name: round(mean.item(), 4) for name, mean in big.open_probabilities().items()}


def _teachers(ablation: Ablation, record: Record, chunk: Sequence[int]) -> list[nn.Module]:
    """The teachers of a chunk: from the files beside the results, or trained and put there."""
    files = [
        record.path.with_suffix("") / f"teacher-{replicate}-{number}.safetensors"
        for replicate in chunk
        for number in range(TEACHERS)
    ]
    if all(file.exists() for file in files):
        teachers = [ablation.recipe.make_network(1) for _ in files]
        for teacher, file in zip(teachers, files, strict=True):
            load_weights(teacher, file)
    else:
        teachers = ablation.teachers()
        files[0].parent.mkdir(parents=True, exist_ok=True)
        for teacher, file in zip(teachers, files, strict=True):
            save_weights(teacher.state_dict(), file)
    record.add_teachers(chunk, ablation.score(Stack(teachers)))
    return teachers


def ablate(ablation: Ablation, record: Record, wanted: Sequence[Variant]) -> None:
    """Measures what is missing of some variants for the replicates of an ablation."""
    chunk = ablation.replicates
    missing = record.missing(chunk, wanted)
    if not missing:
        return
    teachers = _teachers(ablation, record, chunk)
    base: list[Any] = []
    for variant in missing:
        start = time.process_time()
        if variant.merges or not base:
            bigs = ablation.merged(teachers, variant if variant.merges else _named(wanted, BASE))
            base = bigs if variant.name == BASE or not variant.merges else base
        if not variant.merges:
            bigs = base
        students = ablation.compressed(bigs, variant)
        alone = [ablation.score(Stack([big]))[0] for big in bigs]  # compacted ones are of different sizes
        scores = {"big student": alone, "compressed": ablation.score(students)}
        ablation.finetune(students, variant.draws)
        scores["student"] = ablation.score(students)
        scores["seconds"] = [(time.process_time() - start) / len(chunk)] * len(chunk)
        record.add(variant, chunk, scores, [_open(big) for big in bigs])


def _named(wanted: Sequence[Variant], name: str) -> Variant:
    return next(variant for variant in wanted if variant.name == name)


def _chunks(replicates: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, replicates)) for start in range(0, replicates, size))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what is missing and writes the file after every variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=[name for name in IN_MEMORY if name != "sine"], default="digits")
    parser.add_argument("--data", type=Path, metavar="PATH", help="for recipes that need one")
    parser.add_argument("--budget", type=float, default=1.0, metavar="F", help="fraction of the epochs; default 1")
    parser.add_argument("--replicates", type=int, default=10, metavar="N", help="default 10")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default 0")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="some of them; default all")
    parser.add_argument("--device", default="cpu", metavar="D", help="default cpu")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="default runs/ablations/RECIPE.json")
    parser.add_argument(
        "--add", type=Path, metavar="FILE.json", help="take over what a run beside this one has measured"
    )
    options = parser.parse_args(arguments)
    recipe = IN_MEMORY[options.recipe]().scaled(options.budget)
    chosen = variants(recipe.make_network, LINK_AT)
    if options.variants is not None:
        if unknown := set(options.variants) - {variant.name for variant in chosen}:
            parser.error(f"there are {', '.join(v.name for v in chosen)}; got {', '.join(unknown)}")
        names = {BASE, *options.variants}
        chosen = [variant for variant in chosen if variant.name in names]
    data = recipe.load_data(options.data, seed_for(options.seed, "data")).to(options.device)
    config = recipe.config() | {"budget": options.budget, "seed": options.seed, "train_samples": len(data.train_inputs)}
    record = Record(options.out or ROOT / "runs" / "ablations" / f"{recipe.name}.json", _plain(config))
    if options.add is not None:
        record.take(options.add)
    torch.set_num_threads(1)
    with tqdm(unit="epoch") as bar:
        for chunk in _chunks(options.replicates, recipe.stack):
            ablate(Ablation(recipe, data, chunk, options.seed, bar.update), record, chosen)
    print(record.path)


def _plain(config: dict[str, Any]) -> Any:
    return json.loads(json.dumps(config))


if __name__ == "__main__":
    main()

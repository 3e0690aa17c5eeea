"""Where more teachers stop paying: two to eight at equal cost, at once and pair by pair.

``python -m benchmarks.many_teachers DATA``

Runs parts of benchmarks/evidence.py, one at three times its length too, as docs/results/many-teachers/NAME.json, and draws
docs/pictures/many-teachers.png; a part that is there is kept, one that was stopped goes on from runs/many-teachers/.
docs/render.py fills docs/many-teachers.md from them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import evidence
from benchmarks.evidence_report import SURE, at_once, percent, points, read
from fastmerge.evaluation import Setting
from fastmerge.experiments.column import Column
from fastmerge.experiments.lab import Lab
from fastmerge.experiments.place import Place
from fastmerge.experiments.strategies import short_teachers, strategy
from fastmerge.merging.options import Options
from fastmerge.methods.cost import predict
from fastmerge.reporting.report import new_figure, save_figure
from fastmerge.reporting.tables import holm, paired, probability, summarise, table

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PICTURE = ROOT / "docs" / "results" / "many-teachers", ROOT / "docs" / "pictures" / "many-teachers.png"
COUNTS = (2, 3, 4, 8)
BASE = "ours"


def _side_by_side(count: int) -> None:
    """The ceiling: short teachers as they are, side by side; less cost, and as many networks."""

    @strategy(f"side by side, {count}", teachers=0)
    def ensemble(lab: Lab, teachers: Sequence[Column]) -> Column:
        return lab.apply("ensemble", short_teachers(lab, count))


for _count in COUNTS[1:]:
    _side_by_side(_count)

AT_ONCE = {2: BASE, 3: "ours-3", 4: "ours-4", 8: "ours-8"}
BY_PAIRS = {2: BASE, 4: "recursive-4", 8: "recursive-8"}
SIDE_BY_SIDE = {2: "ensemble", **{count: f"side by side, {count}" for count in COUNTS[1:]}}
LINES = {"at once": AT_ONCE, "pair by pair": BY_PAIRS, "side by side, unmerged": SIDE_BY_SIDE}


@dataclass(frozen=True)
class Part:
    """A part of the evidence, at some length.

    Attributes:
        part: its name there.
        budget: of its epochs.
        replicates: of every strategy.
    """

    part: str
    budget: float
    replicates: int


PARTS = {
    "digits": Part("digits", 1, 12),
    "mnist1k": Part("mnist1k", 1, 10),
    "digits-long": Part("digits", 3, 8),
}


def measure(name: str, folder: Path | None) -> None:
    """Runs a part and writes what came of it."""
    part = PARTS[name]
    found = evidence.PARTS[part.part].run(
        folder,
        ROOT / "runs" / "many-teachers" / name,
        list(dict.fromkeys([*AT_ONCE.values(), *BY_PAIRS.values(), "one", *SIDE_BY_SIDE.values()])),
        range(part.replicates),
        part.budget,
    )
    evidence.write(RESULTS / f"{name}.json", found | {"merging": _merging(part, folder)})


def _merging(part: Part, folder: Path | None) -> dict[str, Any]:
    """What an epoch of the merge stage costs, and the memory of its steps, by the number of teachers."""
    of = evidence.PARTS[part.part]
    recipe = of.recipe()
    place = Place(recipe=recipe, data=of.images(folder), device=torch.device("cpu"), seed=0).opened_here()
    batch = place.example[:1].expand(recipe.batch_size, *place.example.shape[1:])
    loader, setting = [(batch, torch.zeros(len(batch), dtype=torch.long))], Setting(place.device, recipe.criterion)
    found = {}
    for count in COUNTS:
        teachers = [recipe.make_network(place.classes, 1) for _ in range(count)]
        each = predict(teachers, loader, setting, Options(merge_epochs=2, link_at=0.5))
        found[str(count)] = {
            "apart": each.epoch[0],
            "linked": each.epoch[1],
            "bytes": each.memory[0],
            "one": each.memory[1],
        }
    return found


def load(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """All results, in the order of the parts."""
    files = {name: folder / f"{name}.json" for name in PARTS}
    return {name: read(file) for name, file in files.items() if file.exists()}


def blocks(every: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What docs/many-teachers.md shows of the results."""
    return {
        "verdict": verdict(every),
        "parts": "\n\n".join(_section(name, results) for name, results in every.items()),
    }


def _merged() -> list[str]:
    """What is compared with two teachers."""
    return [name for name in dict.fromkeys([*AT_ONCE.values(), *BY_PAIRS.values()]) if name != BASE]


def corrected(every: dict[str, dict[str, Any]]) -> dict[tuple[str, str], float]:
    """P of more teachers against two, by part and strategy, corrected for all of them together."""
    found = {
        (part, name): paired(results["strategies"][name]["values"], results["strategies"][BASE]["values"]).p
        for part, results in every.items()
        for name in _merged()
    }
    return dict(zip(found, holm(list(found.values())), strict=True))


def verdict(every: dict[str, dict[str, Any]]) -> str:
    """Where more than two teachers are ahead, behind, or neither."""
    sure, lines = corrected(every), []
    for part, results in every.items():
        kinds: dict[str, list[str]] = {"behind": [], "ahead": [], "no clear difference": []}
        for name in _merged():
            each = paired(results["strategies"][name]["values"], results["strategies"][BASE]["values"])
            kind = "no clear difference" if not sure[part, name] < SURE else "ahead" if each.mean > 0 else "behind"
            kinds[kind].append(f"`{name}` {points(each)}")
        said = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)
        highest = [f"{max(line, key=lambda t: _mean(results, line[t]))} {label}" for label, line in LINES.items()]
        lines.append(f"* {_length(part, results)}: {said}. The best numbers of teachers are {', '.join(highest)}.")
    return "\n".join(lines)


def _mean(results: dict[str, Any], name: str) -> float:
    return summarise(results["strategies"][name]["values"]).mean


def _length(part: str, results: dict[str, Any]) -> str:
    return f"{part} (two teachers train for {results['config']['teacher']['epochs']} epochs each)"


def _section(name: str, results: dict[str, Any]) -> str:
    sure, strategies = corrected({name: results}), results["strategies"]
    header = ["strategy", "teachers", "of epochs", "epochs", "cost", "at once", "accuracy", "less two teachers", "p"]
    kinds = {each: (kind, count) for kind, line in LINES.items() for count, each in line.items()}
    rows, teachers = [], results["config"]["teachers"] * results["config"]["teacher"]["epochs"]
    for each, strategy_ in strategies.items():
        accuracy, gap = summarise(strategy_["values"]), paired(strategy_["values"], strategies[BASE]["values"])
        count = kinds[each][1] if each in kinds else 0
        p, text = sure.get((name, each), math.nan), "–" if each == BASE else points(gap)
        rows.append(
            [
                each,
                str(count or "–"),
                f"{teachers / count:.0f}" if count else "–",
                f"{strategy_['epochs']:g}",
                f"{strategy_['cost']:.0f}",
                at_once(strategy_),
                percent(accuracy),
                f"**{text}**" if p < SURE else text,
                probability(p),
            ]
        )
    costs = [
        [
            count,
            f"{each['apart']:.1f}",
            f"{each['linked']:.1f}",
            f"{each['bytes'] / 2**20:.1f}",
            f"{each['bytes'] / each['one']:.1f}",
        ]
        for count, each in results["merging"].items()
    ]
    config, made = results["config"], results["environment"]
    ran = (
        f"{results['what']}; U = {config['merge']['merge_epochs']}, n = {config['replicates']}, "
        f"{config['test_samples']:,} test images. {results['minutes']:.0f} minutes on one core of a shared "
        f"{made['cpu']['name']}, PyTorch {made['torch']}. *of epochs* is the training of each teacher, *at once* the accuracy "
        "before fine-tuning. p is corrected by Holm's method for this table."
    )
    per = (
        "The cost of an epoch of the merge stage before `link()` (block-diagonal) and after it (linked), in epochs of one "
        "network. The memory of a linked step: weights, gradients, momentum, and what the forward pass keeps."
    )
    names = ["teachers", "block-diagonal", "linked", "MiB, linked", "times one network's"]
    merging = table(names, costs, markdown=True)
    return "\n\n".join([f"## {name}", ran, table(header, rows, markdown=True), per, merging])


def plot(every: dict[str, dict[str, Any]]) -> Any:
    """Accuracy by the number of teachers, a panel for each part."""
    figure, first = new_figure(3.6 * len(every), 3.4)
    first.remove()
    panels = figure.subplots(1, len(every), squeeze=False)[0]
    colours = ("#D55E00", "#0072B2", "#999999")
    for axes, (name, results) in zip(panels, every.items(), strict=True):
        for (label, line), colour in zip(LINES.items(), colours, strict=True):
            found = [summarise(results["strategies"][each]["values"]) for each in line.values()]
            errors = [100 * each.std / math.sqrt(each.n) for each in found]
            means = [100 * each.mean for each in found]
            axes.errorbar([math.log2(t) for t in line], means, errors, color=colour, marker="o", capsize=3, label=label)
        one = summarise(results["strategies"]["one"]["values"])
        axes.axhline(100 * one.mean, color="#009E73", linestyle="--", linewidth=1, label="one network")
        axes.set_xticks([math.log2(t) for t in COUNTS], [str(t) for t in COUNTS])
        axes.set_xlabel("teachers")
        axes.set_title(name, fontsize="medium")
    panels[0].set_ylabel("test accuracy, %")
    panels[0].legend(frameon=False, fontsize="small")
    return figure


def main() -> None:
    files = {name: evidence.PARTS[part.part].data for name, part in PARTS.items()}
    done = "docs/results/many-teachers"
    for name, folder in evidence.asked(__doc__, files, lambda name: (RESULTS / f"{name}.json").exists(), done):
        measure(name, folder)
    if every := load():
        save_figure(plot(every), PICTURE)


if __name__ == "__main__":
    main()

"""What docs/evidence.md shows of the results of benchmarks/evidence.py."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fastmerge.reporting.tables import Difference, Summary, holm, paired, probability, summarise, table

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "evidence"
OURS, OWN, WARM = "ours", "student", "warm: "
SURE = 0.05
FEW = 8  # replicates below which hardly any difference survives the correction
# In this order on the page, with what each is.
MEANINGS = {
    "ours": "two teachers; a merge stage a third as long as the paper's, linked after a quarter; distillation",
    "ours-plain": "ours without distillation: the student learns from the labels alone",
    "ours-3": "ours with three teachers, trained two thirds as long, and a merge stage half as long",
    "one": "one network, trained all along",
    "one-cosine": "one with a cosine rate and the best of three weight decays on held-out data, at the cost of one run",
    "bo3": "the best of three networks on held-out data",
    "restart": "the better teacher on held-out data, trained again from the full learning rate",
    "cyclic-swa": "one network with four cycles of the learning rate; the mean of the weights at the ends of cycles",
    "distill": "the first teacher, trained on the outputs of both",
    "distill-fresh": "a fresh network, trained on the outputs of both",
    "average": "the mean of the teachers' weights",
    "rebasin": "Git Re-Basin by weights",
    "repair": "Re-Basin by activations, then REPAIR",
    "zipit": "ZipIt!",
    "transplant": "Neuron Transplantation",
    "reconstruct": "pivots and least squares",
    "ensemble": "the mean output of both teachers: two networks, at less cost",
    "ensemble-3": "the mean output of three teachers: three networks",
}
_TAUGHT = tuple(f"{name}-distill" for name in ("rebasin", "repair", "zipit", "transplant", "reconstruct"))
_UNIONS = ("average", "rebasin", "repair", "zipit", "transplant", "reconstruct", *_TAUGHT)
_CHOICES = {
    "paper": "the paper's setting: linked from the start, learning rate of the gates 0.2",
    "student": "the same with the gates' learning rate fitted to the stage's length",
    "choice: distill": "with distillation from the teachers in the fine-tuning",
    "choice: link late": "linked after a quarter of the merge stage",
    "choice: third": "merge stage a third as long; fine-tuning longer by as many epochs",
    "choice: all": "distill, link late and third together",
    "choice: magnitude": "gates begin more open where their channel's weights are larger",
    "choice: magnitude, strong": "the same, twice as strong",
    "choice: tied streams": "one gate for a transformer's residual stream, in place of LayerNorms weighted by gates",
    "choice: least squares": "compression makes up for dropped channels by least squares, as `reconstruct` does",
}


def read(path: Path) -> dict[str, Any]:
    """The results in a file, NaN where JSON has null."""
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for strategy in results["strategies"].values():
        for key in strategy.keys() & {"values", "losses", "at_once"}:
            strategy[key] = [math.nan if value is None else value for value in strategy[key]]
    return results


def load(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """All results, by name of the part, in the order of their sizes."""
    every = {path.stem: read(path) for path in folder.glob("*.json")}
    return dict(sorted(every.items(), key=lambda item: (-item[1]["config"]["replicates"], item[0])))


def differences(results: dict[str, Any], base: str, others: list[str]) -> dict[str, Difference]:
    """The accuracy of the base less that of each of the others."""
    return {name: _difference(results, base, name) for name in others if name in results["strategies"]}


def _difference(results: dict[str, Any], one: str, other: str, what: str = "values") -> Difference:
    return paired(*(results["strategies"][name][what] for name in (one, other)))


def corrected(every: dict[str, dict[str, Any]], base: str, others: list[str]) -> dict[tuple[str, str], float]:
    """P of accuracy by part and strategy, corrected for all of them together."""
    found = {
        (part, name): each.p
        for part, results in every.items()
        for name, each in differences(results, base, others).items()
    }
    return dict(zip(found, holm(list(found.values())), strict=True))


def blocks(every: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What docs/evidence.md shows of the results."""
    return {
        **verdict(every),
        "overview": overview(every, OURS, _others(), MEANINGS),
        "choices": overview(every, OWN, [name for name in _CHOICES if name != OWN], _CHOICES, flipped=True),
        "warm-ups": warmed(every),
        "parts": "\n\n".join(section(name, results) for name, results in every.items()),
    }


def _others() -> list[str]:
    """What ours is compared with: all that MEANINGS has, and unions whose students learn from their teachers."""
    return [*(name for name in MEANINGS if name != OURS), *_TAUGHT]


def verdict(every: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Where ours is not ahead, and where it is, in words."""
    sure = corrected(every, OURS, _others())
    kinds: dict[str, Callable[[float, float], bool]] = {
        "behind": lambda mean, p: p < SURE and mean < 0,
        "no sure difference from": lambda mean, p: not p < SURE,
        "ahead of": lambda mean, p: p < SURE and mean > 0,
    }
    lines: dict[str, list[str]] = {kind: [] for kind in kinds}
    for part, results in every.items():
        found = differences(results, OURS, _others())
        for kind, belongs in kinds.items():
            names = [
                f"`{name}` {points(each)}" if sure[part, name] < SURE else f"`{name}`"
                for name, each in found.items()
                if belongs(each.mean, sure[part, name])
            ]
            lines[kind].append(f"* {part}: {kind} {', '.join(names) or 'none'}.")
    alone = [_one_by_one(part, results, len(sure)) for part, results in every.items()]
    kinds_of = zip(lines["behind"], lines["no sure difference from"], alone, strict=True)
    not_ahead = [line for each in kinds_of for line in each if line]
    return {"not ahead": "\n".join(not_ahead), "ahead": "\n".join(lines["ahead of"])}


def _one_by_one(part: str, results: dict[str, Any], comparisons: int) -> str:
    """What differences say without the correction, where there are too few replicates for any to survive it."""
    count = results["config"]["replicates"]
    if count >= FEW:
        return ""
    found = differences(results, OURS, _others())
    names: dict[bool, list[str]] = {True: [], False: []}
    for name, each in found.items():
        if each.p < SURE:
            names[each.mean > 0].append(f"`{name}`")
    below = sum(each.mean < 0 for each in found.values())
    return (
        f"* {part}: with only {count} replicates hardly any difference is sure after the correction for {comparisons} "
        f"comparisons. The mean of ours is below that of {below} of the {len(found)}. Without the correction (p < {SURE:g} for "
        f"each one by itself) ours is behind {', '.join(names[False]) or 'none'}, and ahead of "
        f"{', '.join(names[True]) or 'none'}."
    )


def summary(every: dict[str, dict[str, Any]]) -> str:
    """A row for each part: a teacher, ours, what the same cost buys otherwise, and two networks; the best network in bold."""
    shown = {"ours": OURS, "one network": "one", "best of three": "bo3", "restart": "restart", "distilled": "distill"}
    rows = []
    for results in every.values():
        found = {name: summarise(each["values"]) for name, each in results["strategies"].items()}
        others = {name: found[name] for name in _UNIONS if name in found}
        best = max(others, key=lambda name: others[name].mean)
        columns = [*(found[name] for name in shown.values()), others[best]]
        cells = [percent(each) for each in columns]
        most = max(each.mean for each in columns)
        cells = [f"**{cell}**" if each.mean == most else cell for cell, each in zip(cells, columns, strict=True)]
        cells[-1] = f"{cells[-1]}, {best}"
        side_by_side = found["ensemble"]
        teacher = summarise(results["strategies"]["distill"]["at_once"])  # before it learns from both
        ends = [f"{100 * each.mean:.2f}" for each in (teacher, side_by_side)]
        rows.append([results["what"], ends[0], *cells, ends[1], str(side_by_side.n)])
    header = ["test accuracy, %", "a teacher", *shown, "best other merge", "two networks", "n"]
    return table(header, rows, markdown=True)


def overview(
    every: dict[str, dict[str, Any]], base: str, others: list[str], meanings: dict[str, str], flipped: bool = False
) -> str:
    """A row for each strategy, with the difference, its p and that of the test loss in each part.

    Args:
        every: the results.
        base: the strategy that others are compared with.
        others: their names.
        meanings: what each is.
        flipped: whether it is the other less the base.
    """
    sure, sign = corrected(every, base, others), -1 if flipped else 1
    rows = []
    for name in others:
        cells: list[str] = []
        for part, results in every.items():
            cells += _cells(results, base, name, sure.get((part, name)), sign)
        known = meanings.get(name) or f"{name.removesuffix('-distill')}, with distillation from the teachers"
        rows.append([name, *cells, known])
    return table(["", *_heads(every), "what it is"], rows, markdown=True)


def warmed(every: dict[str, dict[str, Any]]) -> str:
    """A row for each strategy that was measured with a warm-up, less itself without."""
    pairs = [(part, name) for part, results in every.items() for name in results["strategies"] if name.startswith(WARM)]
    ps = [_difference(every[part], name, name.removeprefix(WARM)).p for part, name in pairs]
    sure = dict(zip(pairs, holm(ps), strict=True))
    parts, names = (list(dict.fromkeys(pair[place] for pair in pairs)) for place in (0, 1))
    rows = []
    for name in names:
        plain = name.removeprefix(WARM)
        cells = [cell for part in parts for cell in _cells(every[part], name, plain, sure.get((part, name)))]
        rows.append([name, *cells])
    return table(["", *_heads(parts)], rows, markdown=True)


def _heads(parts: Iterable[str]) -> list[str]:
    return [head for part in parts for head in (part, "p", "loss")]


def _cells(results: dict[str, Any], one: str, other: str, p: float | None, sign: int = 1) -> list[str]:
    """The difference of accuracies, its p, and the difference of losses; dashes without a p, of what was not measured."""
    if p is None:
        return ["–"] * 3
    accuracy, loss = (_difference(results, one, other, what) for what in ("values", "losses"))
    text = points(accuracy, sign)
    return [f"**{text}**" if p < SURE else text, probability(p), f"{sign * loss.mean:+.3f} ± {loss.error:.3f}"]


def section(name: str, results: dict[str, Any]) -> str:
    """One part: what was run, and a row for each strategy."""
    strategies, made = results["strategies"], results["environment"]
    header = ["strategy", "n", "epochs", "cost", "at once", "accuracy", "loss"]
    rows = []
    for each in sorted(strategies, key=lambda each: -summarise(strategies[each]["values"]).mean):
        strategy = strategies[each]
        accuracy, loss = summarise(strategy["values"]), summarise(strategy["losses"])
        rows.append(
            [
                each,
                str(accuracy.n),
                f"{strategy['epochs']:g}",
                f"{strategy['cost']:.0f}",
                at_once(strategy),
                percent(accuracy),
                f"{loss.mean:.3f}",
            ]
        )
    config = results["config"]
    ran = (
        f"{results['what']}; {config['test_samples']:,} test images, U = {config['merge']['merge_epochs']} epochs, batches of "
        f"{config['batch_size']}, learning rate {config['teacher']['lr']:g}. {results['minutes']:.0f} minutes on one core of a "
        f"shared {made['cpu']['name']}, PyTorch {made['torch']}. *at once* and *accuracy* are test accuracies in percent "
        "before and after fine-tuning, *loss* is the test loss."
        + "".join(f" Replicates from {each['from']} on were added later." for each in results.get("added", []))
    )
    return "\n\n".join([f"## {name}", ran, table(header, rows, markdown=True)])


def points(each: Difference, sign: int = 1) -> str:
    """A difference of accuracies in points, ± its standard error."""
    return f"{sign * 100 * each.mean:+.2f} ± {100 * each.error:.2f}"


def percent(accuracy: Summary) -> str:
    """An accuracy in percent, ± its standard error."""
    return f"{100 * accuracy.mean:.2f} ± {100 * accuracy.std / math.sqrt(accuracy.n):.2f}"


def at_once(strategy: dict[str, Any]) -> str:
    """The accuracy before fine-tuning in percent; a dash where there is none."""
    return f"{100 * summarise(strategy['at_once']).mean:.1f}" if "at_once" in strategy else "–"

"""docs/evidence.md from the results of benchmarks/evidence.py."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastmerge.reporting.tables import Difference, holm, paired, probability, summarise, table

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
    "choice: least squares": "compression makes up for dropped channels by least squares, as `reconstruct` does",
}

_SETTING = """\
## How it was measured

There are several data sets ({PARTS}), each with several replicates. Within a replicate all strategies start
from the same teachers, read the data in the same order, and are tested on the same images: differences are paired.

*cost* is the number of operations of all forward and backward passes, in epochs of one network. The operations of merging
methods and the teachers' forward passes for distillation count too. Each data set has a unit U of epochs. Teachers train for 2U
each. Every strategy is fine-tuned until it has cost 6U, as `one` and `bo3` do; an ensemble costs only its teachers.

Choices (the better teacher, the best of three, a weight decay) are made on a tenth of the training data that no network trains
on. Test images are used only at the end. Learning rates, momentum and the steps at which the rate falls are the same for all.
Distillation is `τ² KL` at temperature 2 with weight 1/2. These two numbers and the merge stage of a third were found in earlier
trials on digits and MNIST, with other seeds but with the same test data; no other data was used to choose them. So what digits
and MNIST say of ours is flattered by that choice, and the other data sets are the test of it.

The networks are small, so that a CPU can train many of them; digits' LeNet has fewer weights than a linear classifier of the
same images. Replicates differ in the networks' first weights, the order of the data and the draws of gates. The training and
test images are the same for all of a data set: errors and p say nothing about other images.

*p* is of Student's two-sided paired t-test, corrected by Holm's method for all comparisons of its table. Differences with
p < {SURE} are called sure, and are in bold. `make evidence DATA=folder` runs everything again; docs/results/evidence/ has the
values of every replicate."""


def load(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """All results, by name of the part, in the order of their sizes."""
    every = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
    for results in every.values():
        for strategy in results["strategies"].values():
            for key in ("values", "losses"):
                strategy[key] = [math.nan if value is None else value for value in strategy[key]]
    return dict(sorted(every.items(), key=lambda item: (-item[1]["config"]["replicates"], item[0])))


def differences(results: dict[str, Any], base: str, others: list[str], what: str = "values") -> dict[str, Difference]:
    """The base less each of the others."""
    strategies = results["strategies"]
    return {name: paired(strategies[base][what], strategies[name][what]) for name in others if name in strategies}


def corrected(every: dict[str, dict[str, Any]], base: str, others: list[str]) -> dict[tuple[str, str], float]:
    """P of accuracy by part and strategy, corrected for all of them together."""
    found = {
        (part, name): each.p
        for part, results in every.items()
        for name, each in differences(results, base, others).items()
    }
    return dict(zip(found, holm(list(found.values())), strict=True))


def page(every: dict[str, dict[str, Any]]) -> str:
    """The whole file."""
    sections = [
        "# Is merging worth what it costs?",
        verdict(every),
        _SETTING.replace("{SURE}", f"{SURE:g}").replace("{PARTS}", ", ".join(every)),
        "## Ours less each other strategy, at equal cost",
        _READING,
        overview(every, OURS, _others(), MEANINGS),
        "## What each choice is worth, at equal epochs",
        _CHOICES_ARE,
        overview(every, OWN, [name for name in _CHOICES if name != OWN], _CHOICES, flipped=True),
        "## What a warm-up is worth",
        _WARM_IS,
        warmed(every),
        *(section(name, results) for name, results in every.items()),
    ]
    return "\n\n".join(sections) + "\n"


_READING = "By data set: the difference of the test accuracy in points, its p, and the difference of the test loss."

_CHOICES_ARE = """\
`student` is the recipe's merge with the paper's number of epochs; its cost is above 6U. Each other row changes one choice. It
shows the row less `student`, in points of test accuracy and in test loss.

A merge stage a third as long costs less and is no worse anywhere; on ResNet-20 it is surely better. Linking late costs less,
too, without a visible loss of accuracy. So both are the defaults of `merge()`: 10 epochs of merging, linked after a quarter of
them, and 50 of fine-tuning. Gates whose learning rate fits the length of the stage, another default, are surely better than the
paper's on Imagewoof and ResNet-20 (the row `paper`).

Distillation lowers the test loss on digits and MNIST, without a visible loss of accuracy. It is not a default: it makes an
epoch of fine-tuning two thirds dearer, and where networks [had not converged](layer-norms.md), distilled students were clearly
worse. By the rule of the [ablations](ablations.md) a default differs from the paper's if a choice is clearly better on more
than one data set, or as good for less.

Gates that begin more open where weights are larger are surely better on Imagewoof alone, where the merge stage is too short for
gates to settle. With twice the strength the loss is rather higher on digits and MNIST, and lower on the transformer. So the
library's gates begin alike, as the paper's do.

Compression that makes up for dropped channels by least squares makes no difference on digits and MNIST, where dropped channels
are closed, and is worse on Imagewoof, where they are not. So `compress()` does not do it."""


_WARM_IS = f"""\
All strategies fine-tune from the full learning rate. `{WARM}NAME` is NAME with a tenth of its fine-tuning in which the rate
rises to it. Each row shows the strategy with the warm-up less the one without, in points of test accuracy and in test loss.

Only `reconstruct-distill` needs it, on digits. Its fitted weights and the teachers' gradients make the first steps too large:
most ReLUs of the last layers die in some replicates, and fine-tuning ends below where it began. With the warm-up
`reconstruct-distill` is level with ours. So fine-tune after `reconstruct` with a `warmup`."""


def _others() -> list[str]:
    """What ours is compared with: all that MEANINGS has, and unions whose students learn from their teachers."""
    return [*(name for name in MEANINGS if name != OURS), *_TAUGHT]


def verdict(every: dict[str, dict[str, Any]]) -> str:
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
                f"`{name}` {_points(each)}" if sure[part, name] < SURE else f"`{name}`"
                for name, each in found.items()
                if belongs(each.mean, sure[part, name])
            ]
            lines[kind].append(f"* {part}: {kind} {', '.join(names) or 'none'}.")
    alone = [_one_by_one(part, results, len(sure)) for part, results in every.items()]
    kinds_of = zip(lines["behind"], lines["no sure difference from"], alone, strict=True)
    not_ahead = [line for each in kinds_of for line in each if line]
    return "\n\n".join(
        [
            "*ours* is `fastmerge.merge(distill=0.5)`, whose merge stage is a third as long as the paper's and linked late, at "
            "the cost of training one network all along. Distillation is not a default; all of this was chosen on digits and "
            "MNIST. The tables below say what the other strategies are.",
            "**Where ours is not ahead**, at equal cost. Each number is the test accuracy of ours less that of the other, in "
            "points, ± its standard error:",
            "\n".join(not_ahead),
            *(why for part, why in _WHY.items() if part in every),
            "**Where ours is ahead:**",
            "\n".join(lines["ahead of"]),
        ]
    )


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


_WHY = {
    "imagewoof28": """\
On Imagewoof a merge stage has 54 steps, too few for the gates to settle. Before fine-tuning (*at once*) the student is far
below a teacher, and the few epochs of fine-tuning that the cost leaves do not make up for it. With more of them, at more cost
(`choice: third`, `choice: all`), it is level with the best or ahead.""",
    "resnet20": """\
The teachers of ResNet-20 and of the transformer have not converged: `one`, trained three times as long, is far ahead of the
best of three of their length (`bo3`), and of two or three of them side by side (`ensemble`, `ensemble-3`). What trains one
network longest wins, even the plain mean of the weights (`average`), which is no better than chance at once: it keeps twenty
epochs for fine-tuning. Ours has a merge stage of 54 steps, as on Imagewoof, which costs as much as about ten epochs, and two
fifths of what fine-tuning costs goes to the teachers' forward passes. So `ours-plain` is ahead of ours there, and `choice:
third`, with seventeen epochs of fine-tuning, ahead of both.""",
    "vit-long": """\
In `vit-long` the same transformer's teachers have nearly converged: three times their length (`one`) gains three points, not
eleven. Ours is now level with two networks side by side (`ensemble`), but still below one network of its cost, in accuracy;
its test loss is lower. The merge stage of a linked transformer is dear, and with distillation the student gets half as many
epochs of fine-tuning as `ours-plain`, and a quarter of those of `restart`. With the recipe's own stages, at half as much cost
again, `student` is level with the best.""",
}


def summary(every: dict[str, dict[str, Any]]) -> str:
    """A row for each part: a teacher, ours, what the same cost buys otherwise, and two networks; the best network in bold."""
    shown = {"ours": OURS, "one network": "one", "best of three": "bo3", "restart": "restart", "distilled": "distill"}
    rows = []
    for results in every.values():
        found = {name: summarise(each["values"]) for name, each in results["strategies"].items()}
        others = {name: found[name] for name in _UNIONS if name in found}
        best = max(others, key=lambda name: others[name].mean)
        columns = [*(found[name] for name in shown.values()), others[best]]
        cells = [f"{100 * each.mean:.2f} ± {100 * each.std / math.sqrt(each.n):.2f}" for each in columns]
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
    header = ["", *(head for part in every for head in (part, "p", "loss")), "what it is"]
    rows = []
    for name in others:
        cells: list[str] = []
        for part, results in every.items():
            accuracy, loss = (differences(results, base, [name], what).get(name) for what in ("values", "losses"))
            if accuracy is None or loss is None:
                cells += ["–"] * 3
                continue
            text, p = _points(accuracy, sign), sure[part, name]
            lower = f"{sign * loss.mean:+.3f} ± {loss.error:.3f}"
            cells += [f"**{text}**" if p < SURE else text, probability(p), lower]
        known = meanings.get(name) or f"{name.removesuffix('-distill')}, with distillation from the teachers"
        rows.append([name, *cells, known])
    return table(header, rows, markdown=True)


def warmed(every: dict[str, dict[str, Any]]) -> str:
    """A row for each strategy that was measured with a warm-up, less itself without."""
    there = {part: results for part, results in every.items() if any(map(_is_warm, results["strategies"]))}
    names = list(dict.fromkeys(name for results in there.values() for name in results["strategies"] if _is_warm(name)))
    pairs = [(part, name) for part in there for name in names if name in there[part]["strategies"]]
    found = {
        (part, name): [
            differences(there[part], name, [name.removeprefix(WARM)], what)[name.removeprefix(WARM)]
            for what in ("values", "losses")
        ]
        for part, name in pairs
    }
    sure = dict(zip(pairs, holm([accuracy.p for accuracy, _ in found.values()]), strict=True))
    rows = []
    for name in names:
        cells: list[str] = []
        for part in there:
            if (part, name) not in found:
                cells += ["–"] * 3
                continue
            (accuracy, loss), p = found[part, name], sure[part, name]
            text = _points(accuracy)
            cells += [f"**{text}**" if p < SURE else text, probability(p), f"{loss.mean:+.3f} ± {loss.error:.3f}"]
        rows.append([name, *cells])
    return table(["", *(head for part in there for head in (part, "p", "loss"))], rows, markdown=True)


def _is_warm(name: str) -> bool:
    return name.startswith(WARM)


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
                f"{100 * summarise([math.nan if v is None else v for v in strategy['at_once']]).mean:.1f}"
                if "at_once" in strategy
                else "–",
                f"{100 * accuracy.mean:.2f} ± {100 * accuracy.std / math.sqrt(accuracy.n):.2f}",
                f"{loss.mean:.3f}",
            ]
        )
    config = results["config"]
    ran = (
        f"{results['what']}; {config['test_samples']:,} test images, U = {config['merge']['merge_epochs']} epochs, batches of "
        f"{config['batch_size']}, learning rate {config['teacher']['lr']:g}. {results['minutes']:.0f} minutes on one core of a "
        f"shared {made['cpu']['name']}, PyTorch {made['torch']}. *at once* and *accuracy* are test accuracies in percent "
        "before and after fine-tuning, *loss* is the test loss."
    )
    return "\n\n".join([f"## {name}", ran, table(header, rows, markdown=True)])


def _points(each: Difference, sign: int = 1) -> str:
    return f"{sign * 100 * each.mean:+.2f} ± {100 * each.error:.2f}"

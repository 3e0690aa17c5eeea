"""docs/evidence.md from the results of benchmarks/evidence.py."""

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

A merge stage a third as long costs less. Its accuracy is surely better on ResNet-20 and the transformer, and nowhere visibly
worse; its test loss is higher on Imagewoof. Linking late costs less, too, without a visible loss of accuracy. So both are the
defaults of `merge()`: 10 epochs of merging, linked after a quarter of them, and 50 of fine-tuning. Gates whose learning rate
fits the length of the stage, another default, are better than the paper's (the row `paper`) on Imagewoof, surely, and on
ResNet-20, nearly so.

Distillation lowers the test loss on digits and MNIST, without a visible loss of accuracy. It is not a default: it makes an
epoch of fine-tuning two thirds dearer, and where networks [had not converged](layer-norms.md), distilled students were clearly
worse. By the rule of the [ablations](ablations.md) a default differs from the paper's if a choice is clearly better on more
than one data set, or as good for less.

Gates that begin more open where weights are larger are surely better on Imagewoof alone, in accuracy: the test loss is higher
there. With twice the strength it is higher on MNIST, too, and lower on ResNet-20 and the transformer. So the library's gates
begin alike, as the paper's do.

Compression that makes up for dropped channels by least squares makes no sure difference. On Imagewoof students are rather less
accurate with it. On digits and MNIST, where dropped channels are closed, it changes nothing visible. So `compress()` does not
do it."""


_WARM_IS = f"""\
All strategies fine-tune from the full learning rate. `{WARM}NAME` is NAME with a tenth of its fine-tuning in which the rate
rises to it. Each row shows the strategy with the warm-up less the one without, in points of test accuracy and in test loss.

Only `reconstruct-distill` needs it, on digits. Its fitted weights and the teachers' gradients make the first steps too large:
most ReLUs of the last layers die in some replicates, and fine-tuning ends below where it began. With the warm-up
`reconstruct-distill` is level with ours. The others lose nothing by it. So fine-tune after `reconstruct` with a `warmup`."""


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
                f"`{name}` {points(each)}" if sure[part, name] < SURE else f"`{name}`"
                for name, each in found.items()
                if belongs(each.mean, sure[part, name])
            ]
            lines[kind].append(f"* {part}: {kind} {', '.join(names) or 'none'}.")
    alone = [_one_by_one(part, results, len(sure)) for part, results in every.items()]
    kinds_of = zip(lines["behind"], lines["no sure difference from"], alone, strict=True)
    not_ahead = [line for each in kinds_of for line in each if line]
    return "\n\n".join(
        [
            "*ours* is `fastmerge.merge(distill=0.5)`, at the cost of training one network all along: a merge stage a third "
            "as long as the paper's, linked after a quarter of it, and then distillation. The first two are the defaults of "
            "`merge()`, distillation is not; all three were chosen on digits and MNIST. The tables below say what the other "
            "strategies are.",
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
(`choice: all`), it is level with the best.""",
    "resnet20": """\
The teachers of ResNet-20 and of the transformer have not converged: `one`, trained three times as long, is far ahead of the
best of three of their length (`bo3`), and of two or three of them side by side (`ensemble`, `ensemble-3`). The longer one
network trains, the better it is. So even the plain mean of the weights (`average`), on ResNet-20 no better than chance at once,
scores above ours: it keeps twenty epochs for fine-tuning. Ours has a merge stage of 54 steps, as on Imagewoof, which costs as
much as about ten epochs, and two fifths of what its fine-tuning costs goes to the teachers' forward passes. So `ours-plain`
scores above ours there, and `choice: third`, with seventeen epochs of fine-tuning, above both.""",
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

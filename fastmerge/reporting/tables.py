"""Tables: a run's statistics per strategy beside the paper's mean; the scores and channels of a merge; methods compared."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

# Mean test losses (sine) and accuracies of M. Pašen, V. Boža, "Merging of neural networks" (arXiv 2204.09973), Tables 1 and 2.
_PAPERS_MEANS = {
    "sine": {"student": 0.077, "bo3": 0.240, "one": 0.249},
    "lenet-imagewoof": {"student": 0.399, "bo3": 0.385, "one": 0.378},
    "resnet18-imagewoof": {"student": 0.826, "bo3": 0.806, "one": 0.813},
    "resnet20-cifar100": {"student": 0.689, "bo3": 0.670, "one": 0.675},
    "resnet18-imagenet": {"student": 0.7047, "bo3": 0.6976, "one": 0.7028},
}

_NONE = "–"  # the entry of a cell that has none
_COMPARED = ["method", "at once", "fine-tuned", "loss", "epochs", "cost", "MiB", "seconds"]
_COMPARED_CAPTION = (
    "At once and fine-tuned: accuracy on the validation data (loss, where there are no classes); loss and other "
    "metrics: after fine-tuning. "
    "Epochs, cost and seconds: of the method and the fine-tuning, the teachers' own training not counted. Cost: counted "
    "operations in epochs of training one teacher."
)
_MEMORY_CAPTION = "MiB: the method's peak beyond what was in use before. The first method pays for what is loaded once."


@dataclass(frozen=True)
class Summary:
    """Statistics over the replicates of a strategy.

    Attributes:
        n: Replicates with a finite value; the statistics are over these.
        diverged: Replicates without one.
        min, max, median, mean: NaN where n is 0.
        std: Sample standard deviation (n - 1); NaN where n is below 2.
    """

    n: int
    diverged: int
    min: float
    max: float
    median: float
    mean: float
    std: float


def summarise(values: Sequence[float]) -> Summary:
    """Summarises one value per replicate; values that are not finite count as diverged."""
    finite = [value for value in values if math.isfinite(value)]
    n, diverged = len(finite), len(values) - len(finite)
    if not finite:
        return Summary(n, diverged, *[math.nan] * 5)
    std = statistics.stdev(finite) if n > 1 else math.nan
    return Summary(n, diverged, min(finite), max(finite), statistics.median(finite), statistics.fmean(finite), std)


@dataclass(frozen=True)
class Difference:
    """What one strategy is ahead of another, paired by replicate.

    Attributes:
        n: Replicates that both have.
        mean: Of the one less the other; NaN where n is 0.
        error: Standard error of the mean; NaN where n is below 2, as p is.
        p: How often chance alone gives as large a mean, by Student's t-test of both sides.
    """

    n: int
    mean: float
    error: float
    p: float


def paired(one: Sequence[float], other: Sequence[float]) -> Difference:
    """The paired difference of two strategies, whose values are in the order of the replicates."""
    pairs = zip(one, other, strict=False)
    summary = summarise([a - b for a, b in pairs if math.isfinite(a) and math.isfinite(b)])
    from scipy.special import stdtr  # takes long to import

    if summary.n < 2:
        return Difference(summary.n, summary.mean, math.nan, math.nan)
    error = summary.std / math.sqrt(summary.n)
    ratio = math.inf if error == 0 else abs(summary.mean) / error
    p = 1.0 if summary.mean == 0 else 2 * float(stdtr(summary.n - 1, -ratio))
    return Difference(summary.n, summary.mean, error, p)


def holm(values: Sequence[float]) -> list[float]:
    """P-values of many comparisons, corrected: below 0.05 in all but 5 % of the pages on which no difference is real.

    Args:
        values: One for each comparison; NaN is left out, and stays.

    Source: S. Holm, A simple sequentially rejective multiple test procedure (1979).
    """
    known = sorted((value, index) for index, value in enumerate(values) if not math.isnan(value))
    corrected, least = [math.nan] * len(values), 0.0
    for rank, (value, index) in enumerate(known):
        least = max(least, min(1.0, (len(known) - rank) * value))
        corrected[index] = least
    return corrected


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool = False) -> str:
    """Lays out cells in aligned columns, the first to the left and the others to the right; columns of dashes are left out."""
    known = [not column or not rows or any(row[column] != _NONE for row in rows) for column in range(len(header))]
    header, *rows = ([*compress(cells, known)] for cells in (header, *rows))
    lengths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.rjust(length) if column else cell.ljust(length)
            for column, (cell, length) in enumerate(zip(cells, lengths, strict=True))
        ]
        return f"| {' | '.join(aligned)} |" if markdown else "  ".join(aligned).rstrip()

    if markdown:
        rule = "|".join("-" * (length + 1) + (":" if column else "-") for column, length in enumerate(lengths))
        return "\n".join([line(header), f"|{rule}|", *map(line, rows)])
    return "\n".join([line(header), "  ".join("-" * length for length in lengths), *map(line, rows)])


def results_table(results: dict[str, Any], *, markdown: bool = False) -> str:
    """The table of a run: one row per strategy.

    Args:
        results: As ``results.read`` returns it.
        markdown: Markdown for a file, else plain text for a terminal.
    """
    recipe, strategies = results["recipe"], results["strategies"]
    summaries = {name: summarise(strategy["values"]) for name, strategy in strategies.items()}
    papers = {name: paper_mean(recipe, name) for name in strategies}
    best = _best(results["metric"])(summaries.values())
    at_once = any("at_once" in strategy for strategy in strategies.values())
    losses = results["metric"] != "test_loss" and all("losses" in strategy for strategy in strategies.values())
    header = ["strategy", "epochs", *_cost(strategies, "cost"), "n", "min", "max", "median", "mean", "std"]
    header += ["at once"] * at_once + ["loss"] * losses
    if any(paper is not None for paper in papers.values()):
        header.append("paper's mean")
    rows = []
    for name, summary in summaries.items():
        mean = _number(summary.mean)
        emphasised = f"**{mean}**" if markdown and summary is best else mean
        numbers = [_number(value) for value in (summary.min, summary.max, summary.median)]
        cost = _cost(strategies, f"{strategies[name].get('cost', 0):.0f}")
        epochs = f"{strategies[name]['epochs']:g}"
        row = [name, epochs, *cost, str(summary.n), *numbers, emphasised, _number(summary.std)]
        row += [_mean(strategies[name].get("at_once", []))] * at_once + [_mean(strategies[name].get("losses"))] * losses
        rows.append(([*row, _number(papers[name])])[: len(header)])
    return table(header, rows, markdown=markdown)


def _cost(strategies: dict[str, Any], cell: str) -> list[str]:
    """The cell of the column for cost, in a run that counted it."""
    return [cell] if all("cost" in strategy for strategy in strategies.values()) else []


def differences_table(results: dict[str, Any], *, markdown: bool = False) -> str:
    """The first strategy less each other one, replicate by replicate; empty where there is none.

    Strategies of one run start from the same teachers and read the same data, so that chance which they share drops out. p is
    corrected for the number of rows by Holm's method.

    Args:
        results: As ``results.read`` returns it.
        markdown: Markdown for a file, else plain text for a terminal.
    """
    strategies = results["strategies"]
    first, *others = strategies
    if not others or not _cost(strategies, ""):  # runs that counted no cost were not paired
        return ""
    found = [paired(strategies[first]["values"], strategies[other]["values"]) for other in others]
    rows = [
        [f"{first} - {other}", str(each.n), f"{each.mean:+.4f}", _number(each.error), probability(p)]
        for other, each, p in zip(others, found, holm([each.p for each in found]), strict=True)
    ]
    return table(["paired difference", "n", "mean", "standard error", "p (Holm)"], rows, markdown=markdown)


def probability(p: float) -> str:
    """A p-value in two digits at the most."""
    return _NONE if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.2g}"


def borders_table(history: dict[str, Any], *, markdown: bool = False) -> str:
    """Scores at the borders of a merge's stages: one row each.

    Args:
        history: As ``results.read_merge`` returns it.
        markdown: Markdown for a file, else plain text for a terminal.
    """
    rows = [[name, _number(score["loss"]), _number(score["accuracy"])] for name, score in history["borders"].items()]
    return table(["network", "val loss", "val accuracy"], rows, markdown=markdown)


def groups_table(history: dict[str, Any], *, markdown: bool = False) -> str:
    """A merge's channel groups: channels, mean P[g > 0] at the end, and how many kept channels each teacher gave."""
    teachers = [f"from teacher {number}" for number in range(history["num_teachers"])]
    rows = [
        [name, str(sum(counts)), _number(history["gates"]["open_probability"][name][-1]), *map(str, counts)]
        for name, counts in history["kept"].items()
    ]
    return table(["channel group", "channels", "P[g>0]", *teachers], rows, markdown=markdown)


def comparison_table(rows: Sequence[dict[str, Any]], *, markdown: bool = False) -> str:
    """The table of a comparison.

    Args:
        rows: as ``Row.to_dict`` of ``fastmerge.methods.comparison`` gives them.
        markdown: Markdown for a file, else plain text for a terminal.
    """
    metrics = [*dict.fromkeys(name for row in rows for name in _metrics_of(row))]
    header = [*_COMPARED[:4], *metrics, *_COMPARED[4:]]
    cells = []
    for row in rows:
        if row["error"]:
            cells.append([row["name"], *[_NONE] * (len(header) - 1)])
            continue
        last, others = row["tuned"] or row["at_once"], _metrics_of(row)
        memory = _NONE if row["memory"] is None else f"{row['memory'] / 2**20:.0f}"
        scores = [_score(row["at_once"]), _score(row["tuned"]), _number(last["loss"])]
        scores += [_number(others.get(name)) for name in metrics]
        cells.append(
            [row["name"], *scores, f"{row['epochs']:g}", f"{row['cost']:.2f}", memory, f"{row['seconds']:.1f}"]
        )
    below = [_COMPARED_CAPTION, *[_MEMORY_CAPTION] * any(row["memory"] is not None for row in rows)]
    notes = [f"{row['name']}: {row['error']}" for row in rows if row["error"]]
    notes += [f"Warning of {row['name']}: {each.rstrip('.')}." for row in rows for each in row.get("warnings", ())]
    return "\n\n".join([table(header, cells, markdown=markdown), " ".join(below), *notes])


def _metrics_of(row: dict[str, Any]) -> dict[str, float | None]:
    """A row's other metrics, after fine-tuning where there was one."""
    last = row["tuned"] or row["at_once"] or {}
    return last.get("metrics") or {}


def paper_mean(recipe: str, strategy: str) -> float | None:
    """The paper's mean test loss (sine) or test accuracy of a strategy; None where the paper has none."""
    return _PAPERS_MEANS.get(recipe, {}).get(strategy)


def caption(results: dict[str, Any]) -> str:
    """Sentences under the table: the metric, how long it took, how the paper's length compares, and what diverged."""
    metric = "Test loss, lower is better" if results["metric"] == "test_loss" else "Test accuracy, higher is better"
    strategies = results["strategies"]
    seconds = ", ".join(f"{name} {strategy['seconds']:.0f} s" for name, strategy in strategies.items())
    diverged = {name: summarise(strategy["values"]).diverged for name, strategy in strategies.items()}
    lost = ", ".join(f"{count} of {name}" for name, count in diverged.items() if count)
    sentences = [f"{metric}. Seconds for all replicates: {seconds}."]
    if _cost(strategies, ""):
        sentences.append("Cost is in epochs of one network, by counted operations.")
    if any("at_once" in strategy for strategy in strategies.values()):
        sentences.append("At once: before fine-tuning.")
    budget = results["config"].get("budget", 1)
    if budget != 1 and any(paper_mean(results["recipe"], name) is not None for name in strategies):
        sentences.append(f"This run had {budget:.2g} of the paper's epochs.")
    if isinstance(samples := results["config"].get("train_samples"), int):
        sentences.append(f"{samples:,} training samples.")
    if lost:
        sentences.append(f"Diverged and left out: {lost}.")
    return " ".join(sentences)


def _best(metric: str) -> Callable[..., Summary]:
    def key(summary: Summary) -> float:
        if math.isnan(summary.mean):
            return math.inf
        return summary.mean if metric == "test_loss" else -summary.mean

    return lambda summaries: min(summaries, key=key)


def _mean(values: Sequence[float | None] | None) -> str:
    return _number(summarise([math.nan if value is None else value for value in values or []]).mean)


def _number(value: float | None) -> str:
    return _NONE if value is None or math.isnan(value) else f"{value:.4f}"


def _score(score: dict[str, Any] | None) -> str:
    return _NONE if score is None else _number(score["loss" if score["accuracy"] is None else "accuracy"])

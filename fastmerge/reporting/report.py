"""The report of a run or merge, or of methods compared: a table for the terminal, and Markdown with the plots beside it."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmerge.files import atomic
from fastmerge.reporting.results import read, read_comparison, read_merge
from fastmerge.reporting.tables import (
    borders_table,
    caption,
    comparison_table,
    differences_table,
    groups_table,
    paper_mean,
    results_table,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The palette of Okabe and Ito, safe for colour-blind readers; a double-width strategy is a lighter shade.
_COLOURS = {"student": "#D55E00", "bo3": "#0072B2", "one": "#009E73", "bo3-big": "#56B4E9", "one-big": "#7CCBAE"}
_SPARE = ("#CC79A7", "#E69F00", "#666666", "#000000")
_LABELS = {"test_loss": "test loss", "test_accuracy": "test accuracy"}
_LABELS |= {"train_loss": "training loss", "train_accuracy": "training accuracy"}
_LABELS |= {"val_loss": "validation loss", "val_accuracy": "validation accuracy"}
_NAMED_GROUPS = 8


def _save_plots(out: str | Path, history: dict[str, Any] | None, results: dict[str, Any] | None = None) -> list[Path]:
    """Draws every plot that the files of a run (or, without results, of a merge) allow, as PNG files in ``out``.

    Returns:
        The files written, of strategies.png, learned.png, gates.png and training.png; none, with a warning, where
        matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        warnings.warn("no plots were drawn: matplotlib is not installed (pip install matplotlib)", stacklevel=2)
        return []
    out = Path(out)
    history = history or {}
    figures = {} if results is None else {"strategies": plot_strategies(results)}
    if results is not None and (out / "curves.npz").is_file():
        with np.load(out / "curves.npz", allow_pickle=False) as arrays:
            figures["learned"] = plot_learned(dict(arrays))
    if history.get("gates"):
        figures["gates"] = plot_gates(history["gates"])
    if history.get("curves"):
        figures["training"] = plot_training(history["curves"], history.get("stages"))
    return [save_figure(figure, out / f"{name}.png") for name, figure in figures.items()]


def plot_strategies(results: dict[str, Any]) -> Figure:
    """Box plot of the strategies, one dot per replicate (paper, Fig. 9); a diamond is the paper's own mean."""
    strategies = results["strategies"]
    figure, axes = new_figure(1.6 + 1.1 * len(strategies), 3.8)
    jitter = np.random.default_rng(0)
    labelled = False
    for position, (name, strategy) in enumerate(strategies.items()):
        values = np.asarray(strategy["values"], dtype=float)
        values, colour = values[np.isfinite(values)], _colour(name, position)
        if len(values) > 3:
            axes.boxplot(
                values,
                positions=[position],
                widths=0.5,
                showfliers=False,  # every replicate is drawn as a dot already
                patch_artist=True,
                boxprops={"facecolor": f"{colour}33", "edgecolor": colour},
                medianprops={"color": colour, "linewidth": 2},
                whiskerprops={"color": colour},
                capprops={"color": colour},
            )
        elif len(values):
            axes.hlines(np.median(values), position - 0.25, position + 0.25, color=colour, linewidth=2)
        spread = jitter.uniform(-0.14, 0.14, len(values))
        axes.scatter(position + spread, values, s=14, color=colour, alpha=0.7, linewidths=0, zorder=3)
        if (paper := paper_mean(results["recipe"], name)) is not None:
            label = None if labelled else "paper's mean"
            axes.scatter(
                [position + 0.36],
                [paper],
                marker="D",
                s=28,
                facecolors="white",
                edgecolors="black",
                label=label,
                zorder=4,
            )
            labelled = True
    axes.set_xticks(range(len(strategies)), [f"{name}\nn = {len(s['values'])}" for name, s in strategies.items()])
    axes.set_xlim(-0.6, len(strategies) - 0.4)
    axes.set_ylabel(_LABELS[results["metric"]] + (" (lower is better)" if results["metric"] == "test_loss" else ""))
    axes.set_title(results["recipe"], loc="left")
    if labelled:
        axes.legend(frameon=False, fontsize="small")
    return figure


def plot_learned(arrays: Mapping[str, np.ndarray]) -> Figure:
    """The function that each strategy's median replicate learned, a panel each, over the true one (paper, Fig. 10).

    The median is by mean squared distance from the true function. The other replicates stand behind it, faint.
    """
    x, true = arrays["x"], arrays["true"]
    order = np.argsort(x)
    strategies = [name for name in arrays if name not in ("x", "true")]
    figure, panels = new_figure(8.0, 1.9 * len(strategies) + 0.4, rows=len(strategies))
    for position, (name, axes) in enumerate(zip(strategies, np.atleast_1d(panels), strict=True)):
        predictions, colour = np.atleast_2d(arrays[name]), _colour(name, position)
        error = np.mean((predictions - true) ** 2, axis=1)
        median = np.argsort(error)[(len(error) - 1) // 2]
        axes.plot(x[order], predictions[:, order].T, color=colour, linewidth=0.6, alpha=min(0.3, 3 / len(predictions)))
        axes.plot(x[order], true[order], color="black", linewidth=1, linestyle=(0, (4, 2)), label="true")
        axes.plot(
            x[order], predictions[median, order], color=colour, linewidth=2, label=f"median of {len(predictions)}"
        )
        axes.set_ylim(true.min() - 0.5, true.max() + 0.5)
        axes.set_ylabel("y")
        axes.legend(frameon=False, fontsize="small", loc="upper right", ncols=2, bbox_to_anchor=(1, 1.2))
        axes.set_title(name, loc="left")
    np.atleast_1d(panels)[-1].set_xlabel("x")
    return figure


def plot_gates(gates: dict[str, Any]) -> Figure:
    """P[g > 0] of every channel group, and λ, over the epochs of the merge stage (paper, Fig. 5)."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap

    epochs, groups = np.asarray(gates["epochs"]), gates["open_probability"]
    figure, (top, bottom) = new_figure(7.0, 4.8, rows=2, height_ratios=[3, 1], sharex=True)
    # viridis without its last tenth, which is hard to see on white
    shades = ListedColormap(colormaps["viridis"](np.linspace(0, 0.9, max(len(groups), 2))))
    for index, (name, series) in enumerate(groups.items()):
        middle, low, high = _over_replicates(series)
        top.plot(
            epochs, middle, color=shades(index), linewidth=1.5, label=name, marker="." if len(epochs) < 3 else None
        )
        if len(groups) <= _NAMED_GROUPS:
            top.fill_between(epochs, low, high, color=shades(index), alpha=0.15, linewidth=0)
    if (target := gates.get("target")) is not None:
        top.axhline(target, color="black", linewidth=1, linestyle=(0, (4, 2)))
        where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "xytext": (4, -4)}
        top.annotate(f"1/T = {target:.3g}", (0, target), va="top", fontsize="small", **where)
    if len(groups) <= _NAMED_GROUPS:
        top.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    else:
        bar = figure.colorbar(ScalarMappable(cmap=shades), ax=[top, bottom], pad=0.02, ticks=[0, 1])
        bar.ax.set_yticklabels(["first\ngroup", "last\ngroup"], fontsize="small")
    top.set_ylim(0, 1.02)
    top.set_ylabel("P[g > 0], mean of the group")
    top.set_title("gates", loc="left")
    if any(value is not None for value in gates["lam"]):
        bottom.plot(epochs, _over_replicates(gates["lam"])[0], color="black", linewidth=1.5)
        bottom.set_ylim(bottom=0)
    else:
        bottom.text(0.5, 0.5, "none: a budget steers", ha="center", va="center", transform=bottom.transAxes)
    bottom.set_ylabel("λ")
    bottom.set_xlabel("epoch of the merge stage")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    return figure


def plot_training(curves: dict[str, Any], stages: dict[str, dict[str, float]] | None = None) -> Figure:
    """Loss and metric of every strategy over its epochs; the band spans the replicates, the line is their median."""
    series = list(dict.fromkeys(key for values in curves.values() for key in values if key != "epochs"))
    figure, panels = new_figure(7.0, 2.6 * len(series) + 0.3, rows=len(series), sharex=True)
    panels = np.atleast_1d(panels)
    for key, axes in zip(series, panels, strict=True):
        for position, (name, values) in enumerate(curves.items()):
            if key not in values:
                continue
            middle, low, high = _over_replicates(values[key])
            epochs = np.asarray(values.get("epochs", range(1, len(middle) + 1)))
            known = np.isfinite(middle)  # epochs that were not scored don't break the line
            epochs, middle, low, high = (part[known] for part in (epochs, middle, low, high))
            colour = _colour(name, position)
            axes.plot(epochs, middle, color=colour, linewidth=1.5, label=name, marker="." if len(epochs) < 3 else None)
            axes.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_ylabel(_LABELS.get(key, key.replace("_", " ")))
        _mark_stages(axes, stages or {})
    lines = {line.get_label(): line for axes in panels for line in axes.get_legend_handles_labels()[0]}
    shown = [lines[name] for name in curves if name in lines]  # some are not in the first panel
    panels[0].legend(
        handles=shown, frameon=False, fontsize="small", ncols=len(curves), loc="lower left", bbox_to_anchor=(0, 1)
    )
    panels[-1].set_xlabel("epoch")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    return figure


def _plot_comparison(rows: Sequence[dict[str, Any]]) -> Any:
    """Per method a line from its score at once to that after fine-tuning."""
    drawn = [row for row in rows if row["at_once"] is not None]
    figure, axes = new_figure(6.4, 1.2 + 0.35 * len(drawn))
    measure = "loss" if any(row["at_once"]["accuracy"] is None for row in drawn) else "accuracy"
    for position, row in enumerate(drawn):
        first = row["at_once"][measure]
        if row["tuned"] is not None:
            axes.plot([first, row["tuned"][measure]], [position] * 2, color="#999999", linewidth=1.5, zorder=1)
            axes.scatter(row["tuned"][measure], position, s=36, color="#D55E00", zorder=3)
        axes.scatter(first, position, s=36, facecolors="white", edgecolors="#0072B2", zorder=2)
    axes.scatter([], [], s=36, facecolors="white", edgecolors="#0072B2", label="at once")
    axes.scatter([], [], s=36, color="#D55E00", label="fine-tuned")
    axes.set_yticks(range(len(drawn)), [f"{row['name']} (cost {row['cost']:.1f})" for row in drawn])
    axes.invert_yaxis()
    axes.set_xlabel(f"validation {measure}")
    axes.legend(frameon=False, fontsize="small")
    return figure


def _mark_stages(axes: Axes, stages: dict[str, dict[str, float]]) -> None:
    for name, starts in stages.items():
        for stage, epoch in starts.items():
            axes.axvline(epoch, color="#999999", linewidth=0.8, linestyle=":")
            axes.annotate(
                f" {name}: {stage}",
                (epoch, 1),
                xycoords=("data", "axes fraction"),
                va="top",
                fontsize=7,
                color="#666666",
            )


def _over_replicates(series: list[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Median, min and max over each entry's finite replicates, NaN where there are none; arrays of shape (entries,)."""
    entries = [np.atleast_1d(np.asarray(entry, dtype=float)) for entry in series]
    finite = [entry[np.isfinite(entry)] if np.isfinite(entry).any() else np.array([np.nan]) for entry in entries]
    middle, low, high = ([f(entry) for entry in finite] for f in (np.median, np.min, np.max))
    return np.array(middle), np.array(low), np.array(high)


def _colour(strategy: str, position: int) -> str:
    return _COLOURS.get(strategy, _SPARE[position % len(_SPARE)])


def new_figure(
    width: float, height: float, *, rows: int = 1, sharex: bool = False, height_ratios: list[float] | None = None
) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, 1, sharex=sharex, height_ratios=height_ratios)
    for axes in np.atleast_1d(panels):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, panels


def save_figure(figure: Figure, path: Path) -> Path:
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")
    return path


_TITLES = {
    "strategies": "Strategies",
    "learned": "Learned functions",
    "gates": "Gates and λ over the merge stage",
    "training": "Training",
}


def write_report(out: str | Path) -> str:
    """Writes report.md and the plots beside the results.json of a run, or the history.json of a merge.

    Of a comparison it writes compare.md and, where matplotlib is installed, compare.png beside compare.json.

    Returns:
        The table and what goes with it, as plain text.

    Raises:
        FileNotFoundError, ValueError: As ``results.read``, ``read_merge`` and ``read_comparison``.
    """
    out = Path(out)
    if (out / "compare.json").is_file():
        return _comparison_report(out)
    if (out / "history.json").is_file() and not (out / "results.json").is_file():
        return _merge_report(out)
    results, history = read(out)
    tables = [results_table(results, markdown=True), caption(results), differences_table(results, markdown=True)]
    plots = _plot_sections(_save_plots(out, history, results))
    _write(out / "report.md", results["recipe"], [*filter(None, tables), *plots], results)
    shown = [results_table(results), differences_table(results), caption(results)]
    return "\n\n".join(filter(None, shown))


def _comparison_report(out: Path) -> str:
    comparison = read_comparison(out)
    rows = comparison["rows"]
    sections = [comparison_table(rows, markdown=True)]
    if importlib.util.find_spec("matplotlib") is not None:
        save_figure(_plot_comparison(rows), out / "compare.png")
        sections.append("![Accuracy against cost](compare.png)")
    _write(out / "compare.md", "Comparison", sections, comparison)
    return comparison_table(rows)


def _merge_report(out: Path) -> str:
    history = read_merge(out)
    notes = [f"Warning: {warning}." for warning in history["warnings"]]
    channels = f"## Channels\n\n{groups_table(history, markdown=True)}"
    plots = _plot_sections(_save_plots(out, history))
    _write(out / "report.md", "merge", [borders_table(history, markdown=True), *notes, channels, *plots], history)
    return "\n\n".join([borders_table(history), *notes])


def _plot_sections(plots: list[Path]) -> list[str]:
    return [f"## {_TITLES[plot.stem]}\n\n![{_TITLES[plot.stem]}]({plot.name})" for plot in plots]


def _write(path: Path, title: str, sections: list[str], made_by: dict[str, Any]) -> None:
    made = [_listing("Choices", made_by["config"]), _listing("Environment", made_by["environment"])]
    with atomic(path) as temporary:
        temporary.write_text("\n\n".join([f"# {title}", *sections, *made]) + "\n", encoding="utf-8")


def _listing(title: str, values: dict[str, Any]) -> str:
    return "\n".join([f"## {title}", "", *(f"- {name}: {_phrase(value)}" for name, value in values.items())])


def _phrase(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_phrase(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(_phrase(item) for item in value) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

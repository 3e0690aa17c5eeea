"""Methods beside each other: their table, their plot, and compare.md with both."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastmerge.files import atomic
from fastmerge.reporting.plots import new_figure, save_figure
from fastmerge.reporting.report import listing
from fastmerge.reporting.tables import table

_HEADER = ["method", "at once", "fine-tuned", "loss", "epochs", "cost", "MiB", "seconds"]
_CAPTION = (
    "At once and fine-tuned: accuracy on the validation data (loss, where there are no classes); loss: after fine-tuning. "
    "Epochs, cost and seconds: of the method and the fine-tuning, the teachers' own training not counted. Cost: counted "
    "operations in epochs of training one teacher. MiB: the method's peak beyond what was in use before."
)


def comparison_table(rows: Sequence[dict[str, Any]], *, markdown: bool = False) -> str:
    """The table of a comparison.

    Args:
        rows: as ``Row.to_dict`` of ``fastmerge.methods.comparison`` gives them.
        markdown: Markdown for a file, else plain text for a terminal.
    """
    cells = []
    for row in rows:
        if row["error"]:
            cells.append([row["name"], *["–"] * (len(_HEADER) - 1)])
            continue
        last = row["tuned"] or row["at_once"]
        memory = "–" if row["memory"] is None else f"{row['memory'] / 2**20:.0f}"
        numbers = [f"{row['epochs']:g}", f"{row['cost']:.2f}", memory, f"{row['seconds']:.1f}"]
        cells.append([row["name"], _score(row["at_once"]), _score(row["tuned"]), f"{last['loss']:.4f}", *numbers])
    failed = [f"{row['name']}: {row['error']}" for row in rows if row["error"]]
    return "\n\n".join([table(_HEADER, cells, markdown=markdown), _CAPTION, *failed])


def write_comparison(out: Path, rows: Sequence[dict[str, Any]], made_by: dict[str, Any]) -> None:
    """Writes compare.md and, where matplotlib is installed, compare.png into a directory."""
    sections = ["# Comparison", comparison_table(rows, markdown=True)]
    if importlib.util.find_spec("matplotlib") is not None:
        save_figure(plot_comparison(rows), out / "compare.png")
        sections.append("![Accuracy against cost](compare.png)")
    sections += [listing("Choices", made_by["config"]), listing("Environment", made_by["environment"])]
    with atomic(out / "compare.md") as temporary:
        temporary.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def plot_comparison(rows: Sequence[dict[str, Any]]) -> Any:
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


def _score(score: dict[str, Any] | None) -> str:
    if score is None:
        return "–"
    return f"{score['loss'] if score['accuracy'] is None else score['accuracy']:.4f}"

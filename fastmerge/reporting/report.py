"""The report of a run or merge, or of methods compared: a table for the terminal, and Markdown with the plots beside it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from fastmerge.files import atomic
from fastmerge.reporting.plots import plot_comparison, save_figure, save_plots
from fastmerge.reporting.results import read, read_comparison, read_merge
from fastmerge.reporting.tables import (
    borders_table,
    caption,
    comparison_table,
    differences_table,
    groups_table,
    results_table,
)

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
    plots = _plot_sections(save_plots(out, history, results))
    _write(out / "report.md", results["recipe"], [*filter(None, tables), *plots], results)
    shown = [results_table(results), differences_table(results), caption(results)]
    return "\n\n".join(filter(None, shown))


def _comparison_report(out: Path) -> str:
    comparison = read_comparison(out)
    rows = comparison["rows"]
    sections = [comparison_table(rows, markdown=True)]
    if importlib.util.find_spec("matplotlib") is not None:
        save_figure(plot_comparison(rows), out / "compare.png")
        sections.append("![Accuracy against cost](compare.png)")
    _write(out / "compare.md", "Comparison", sections, comparison)
    return comparison_table(rows)


def _merge_report(out: Path) -> str:
    history = read_merge(out)
    notes = [f"Warning: {warning}." for warning in history["warnings"]]
    channels = f"## Channels\n\n{groups_table(history, markdown=True)}"
    plots = _plot_sections(save_plots(out, history))
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

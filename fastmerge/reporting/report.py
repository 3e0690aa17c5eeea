"""The report of a run or merge: its table for the terminal, and report.md with the plots beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastmerge.files import atomic
from fastmerge.reporting.plots import save_plots
from fastmerge.reporting.results import read, read_merge
from fastmerge.reporting.tables import borders_table, caption, differences_table, groups_table, results_table

_TITLES = {
    "strategies": "Strategies",
    "learned": "Learned functions",
    "gates": "Gates and λ over the merge stage",
    "training": "Training",
}


def write_report(out: str | Path) -> str:
    """Writes report.md and the plots beside the results.json of a run, or the history.json of a merge.

    Returns:
        The table and what goes with it, as plain text.

    Raises:
        FileNotFoundError, ValueError: As ``results.read`` and ``results.read_merge``.
    """
    out = Path(out)
    if (out / "history.json").is_file() and not (out / "results.json").is_file():
        return _merge_report(out)
    results, history = read(out)
    tables = [
        results_table(results, markdown=True),
        caption(results),
        differences_table(results, markdown=True),
    ]
    _write(out, results["recipe"], [part for part in tables if part], save_plots(out, history, results), results)
    shown = [results_table(results), differences_table(results), caption(results)]
    return "\n\n".join(part for part in shown if part)


def _merge_report(out: Path) -> str:
    history = read_merge(out)
    tables = [borders_table(history, markdown=True), f"## Channels\n\n{groups_table(history, markdown=True)}"]
    notes = [f"Warning: {warning}." for warning in history["warnings"]]
    _write(out, "merge", [*tables[:1], *notes, *tables[1:]], save_plots(out, history), history)
    return "\n\n".join([borders_table(history), *notes])


def _write(out: Path, title: str, sections: list[str], plots: list[Path], made_by: dict[str, Any]) -> None:
    sections = [f"# {title}", *sections]
    sections += [f"## {_TITLES[plot.stem]}\n\n![{_TITLES[plot.stem]}]({plot.name})" for plot in plots]
    sections += [listing("Choices", made_by["config"]), listing("Environment", made_by["environment"])]
    with atomic(out / "report.md") as temporary:
        temporary.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def listing(title: str, values: dict[str, Any]) -> str:
    return "\n".join([f"## {title}", "", *(f"- {name}: {_phrase(value)}" for name, value in values.items())])


def _phrase(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_phrase(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(_phrase(item) for item in value) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

"""docs/data.md's figures of the loaders, from the committed JSON of runs of bench_data.py."""

from __future__ import annotations

from typing import Any

from benchmarks.report import machine
from benchmarks.results import cases, quartiles
from fastmerge.reporting.tables import table

NONE = "Not measured yet: `make bench-data` does it, on a quiet machine."
_CASE = "data, "


def tables(runs: dict[str, dict[str, Any]]) -> str:
    """A table for every run that has timed loaders: images per second, of each kind of files.

    Args:
        runs: as :func:`benchmarks.report.load` reads them.
    """
    found = [_table(run) for run in runs.values() if any(case.startswith(_CASE) for case in cases(run))]
    return "\n\n".join(found) or NONE


def _table(run: dict[str, Any]) -> str:
    of_loaders = {case.removeprefix(_CASE): each for case, each in cases(run).items() if case.startswith(_CASE)}
    names = list(dict.fromkeys(name for contenders in of_loaders.values() for name in contenders))
    rows = [[name, *(_rate(contenders.get(name, {})) for contenders in of_loaders.values())] for name in names]
    header = ["images/s, median (quartiles)", *of_loaders]
    return f"{table(header, rows, markdown=True)}\n\n{machine(run)}"


def _rate(contender: dict[str, Any]) -> str:
    if not contender.get("samples"):
        return "failed" if "error" in contender else "–"
    slow, middle, fast = (contender["items"] / seconds for seconds in reversed(quartiles(contender["samples"])))
    return f"{middle:.0f} ({slow:.0f} to {fast:.0f})"

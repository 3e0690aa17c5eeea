"""Whole merge stages as tables: a step's time by epoch, what lies outside of the epochs, and how good the students are."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.results import Contenders, Gap, accuracy_gap
from fastmerge.reporting.tables import table

_STEPS = "The time of a step, by epoch of the stage: the median over the epoch's steps."
_STUDENTS = (
    "A stage also takes time outside of its steps: for checks, analysis, building and compression (naive dense has no "
    "compression). *Paper's length* is this time plus as many measured steps as the paper's stage has. *Accuracy* is that of "
    "the students after a short fine-tuning, which is the same for all and not timed: mean and standard deviation over the "
    "rounds. Rounds with the same order of batches make pairs. Students are *no worse* if the mean difference of the pairs is "
    "not below 0 by more than two standard errors. *Dropped* is the share of channels that were dropped before compression."
)


def stage_tables(contenders: Contenders) -> list[str]:
    """Markdown; empty for contenders that are no stages."""
    return [*_steps(contenders), *_students(contenders)]


def judged(gap: Gap | None) -> str:
    """What a difference of accuracies amounts to, in points."""
    if gap is None:
        return "accuracy not measured"
    return f"students {'worse' if gap.is_worse else 'no worse'}: {100 * gap.mean:+.1f} ± {100 * gap.error:.1f} points"


def _steps(contenders: Contenders) -> list[str]:
    stages = {name: c["step_seconds"] for name, c in contenders.items() if c.get("step_seconds")}
    if not stages:
        return []
    epochs = max(len(seconds) for seconds in stages.values())
    header = ["ms per step", *(f"epoch {epoch}" for epoch in range(1, epochs + 1))]
    rows = [[name, *(f"{1e3 * s:.4g}" for s in seconds)] for name, seconds in stages.items()]
    filled = [row + ["–"] * (len(header) - len(row)) for row in rows]
    return [_STEPS, table(header, filled, markdown=True)]


def _students(contenders: Contenders) -> list[str]:
    stages = {name: c for name, c in contenders.items() if c.get("accuracies") or c.get("fixed_seconds")}
    if not stages:
        return []
    first = next(iter(stages))
    header = ["contender", "s beside steps", "s, paper's length", "dropped", "accuracy", "n", f"against {first}"]
    rows = [
        [
            name,
            _median(stage.get("fixed_seconds"), "{:.3g}"),
            _median(stage.get("stage_seconds"), "{:.4g}"),
            _median(stage.get("dropped"), "{:.0%}"),
            _spread(stage.get("accuracies")),
            str(len(stage.get("accuracies") or [])),
            "–" if name == first else judged(accuracy_gap(contenders, name, first)),
        ]
        for name, stage in stages.items()
    ]
    return [_STUDENTS, table(header, rows, markdown=True)]


def _median(values: Sequence[float] | None, form: str) -> str:
    return form.format(statistics.median(values)) if values else "–"


def _spread(values: Sequence[Any] | None) -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"

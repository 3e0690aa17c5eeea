"""Reading the JSON of a run: its cases, their contenders, and ratios within the run.

A benchmark that raced contenders holds their samples in ``extra_info["contenders"]``. Of any other, pytest-benchmark's own
samples count, and the benchmarks of one group are the contenders of one case. A contender that several processes timed has the
further ones under ``others``: two contenders are compared within a process where there is one that timed both.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Contenders = dict[str, dict[str, Any]]

TIME = "time"
STAGE = "stage of the paper's length"
LAUNCHES = "launches"
CPU_TIME = "CPU time"
MEASURES = {
    TIME: "samples",
    STAGE: "stage_seconds",
    "activation memory": "activation_bytes",
    "peak memory": "peak_bytes",
    LAUNCHES: "launches",
    "bytes moved": "moved_bytes",
    CPU_TIME: "cpu_samples",
}
EXACT = (LAUNCHES,)  # counted, so that not one more is chance


@dataclass(frozen=True)
class Gap:
    """By how much one contender's networks are better than another's.

    Attributes:
        mean: of the differences of their accuracies over pairs, which began alike.
        error: the standard error of that mean.
    """

    mean: float
    error: float

    @property
    def is_worse(self) -> bool:
        """Whether they are worse beyond chance: by more than two standard errors."""
        return self.mean < -2 * self.error


@dataclass(frozen=True)
class Ratio:
    """One contender's figure over another's.

    Attributes:
        value: the median over the pairs of samples; of figures without samples, their ratio.
        low, high: the quartiles over the pairs.
        n: pairs.
        gap: by how much the denominator's networks are better, where their accuracies are known.
    """

    value: float
    low: float
    high: float
    n: int
    gap: Gap | None = None


def read(path: Path) -> dict[str, Any]:
    """The report in a file.

    Raises:
        ValueError: if it is not one that pytest-benchmark wrote.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(report, dict) or not {"benchmarks", "machine_info"} <= report.keys():
        raise ValueError(f"{path} needs to be the JSON of a benchmark run, with benchmarks and machine_info")
    return report


def cases(report: Mapping[str, Any]) -> dict[str, Contenders]:
    """By name of the case, its contenders: each a dict with ``samples``, or ``error`` or ``unavailable``."""
    found: dict[str, Contenders] = {}
    for benchmark in report["benchmarks"]:
        extra = benchmark["extra_info"]
        case = found.setdefault(extra.get("case") or benchmark["group"] or benchmark["name"], {})
        if "contenders" in extra:
            for name, contender in extra["contenders"].items():
                case[name] = _together(case.get(name), contender)
        else:
            name = extra.get("contender") or benchmark["param"] or benchmark["name"]
            case[name] = {**extra, "samples": benchmark["stats"]["data"]}
    return found


def chosen(report: Mapping[str, Any]) -> dict[str, Contenders]:
    """The convolutions of a run's whole steps as cases, each of the contenders "split" and, with its best tile, "triton"."""
    found: dict[str, Contenders] = {}
    for choice in report["machine_info"].get("convolution_choices") or []:
        _, step, streams, shapes = choice["key"].split(" | ")
        name, _, dtype = step.rpartition(" ")
        times = choice["milliseconds"]
        best = min((time for tile, time in times.items() if tile.startswith("triton")), default=None)
        contenders = {"split": times.get("split"), "triton": best}
        found[f"convolution, {name}, {streams} of {shapes} {dtype} cuda"] = {
            contender: {"samples": [time / 1e3]} for contender, time in contenders.items() if time is not None
        }
    return found


def ratio(contenders: Contenders, numerator: str, denominator: str, measure: str = TIME) -> Ratio | None:
    """``numerator / denominator`` by one of ``MEASURES``, or None where either has no figure."""
    key = MEASURES[measure]
    above, below = (_runs(contenders.get(name, {}), key) for name in (numerator, denominator))
    if not above or not below:
        return None
    same = [(a, b) for a in above for b in below if a.get("process") == b.get("process")]
    first, second = same[0] if same else (above[0], below[0])
    if not isinstance(first[key], list):
        return _summary([first[key] / second[key]], None)
    gap = accuracy_gap(contenders, denominator, numerator)
    if same and first.get("paired", True) and second.get("paired", True) and len(first[key]) == len(second[key]):
        return _summary([a / b for a, b in zip(first[key], second[key], strict=True)], gap)
    return _summary([statistics.median(first[key]) / statistics.median(second[key])], gap)


def _together(earlier: dict[str, Any] | None, contender: dict[str, Any]) -> dict[str, Any]:
    """What two processes know of a contender: the earlier one's figures, unless it has none, and the other's beside them."""
    if earlier is None or not earlier.get("samples"):
        return contender
    if not contender.get("samples"):
        return earlier
    return earlier | {"others": [*earlier.get("others", []), contender]}


def _runs(contender: dict[str, Any], key: str) -> list[dict[str, Any]]:
    return [run for run in (contender, *contender.get("others", [])) if run.get(key)]


def accuracy_gap(contenders: Contenders, name: str, reference: str) -> Gap | None:
    """How a contender's ``accuracies`` differ from a reference's, or None with fewer than two pairs."""
    own, others = (contenders.get(each, {}).get("accuracies") or [] for each in (name, reference))
    gaps = [a - b for a, b in zip(own, others, strict=False)]  # of an interrupted race one may be a pair ahead
    if len(gaps) < 2:
        return None
    return Gap(statistics.mean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps)))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The quartiles of one or more values, the median in the middle."""
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _summary(values: list[float], gap: Gap | None) -> Ratio:
    low, middle, high = quartiles(values)
    return Ratio(middle, low, high, len(values), gap)

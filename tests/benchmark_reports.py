"""Made-up JSON of benchmark runs, of the form that the real ones have."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import blocks

MACHINE = {
    "fastmerge": "0.1.0",
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "python": "3.12.1",
    "torch": "2.11.0",
    "cudnn": 91900,
    "packages": {"triton": "3.6.0"},
    "cpu": {"name": "A CPU", "cores": 16, "threads": 8},
    "gpus": [],
    "driver": None,
}
GPU = {"gpus": [{"name": "A Card", "memory_gib": 140.0, "capability": "9.0"}], "driver": "580.1"}


def raced(case: str, contenders: Mapping[str, Any]) -> dict[str, Any]:
    """A benchmark whose contenders took turns: samples by name, or a dict of what else is known of one."""
    found = {n: dict(c) if isinstance(c, Mapping) else {"samples": list(c), "items": 10} for n, c in contenders.items()}
    data = [samples for c in found.values() if (samples := c.get("samples"))][-1]
    return _benchmark(case, "bench_step[case]", data, {"case": case, "contenders": found})


def alone(group: str, name: str, data: Sequence[float]) -> dict[str, Any]:
    """A benchmark of one function, as pytest-benchmark has it."""
    return _benchmark(group, name, data, {})


def report(benchmarks: Sequence[dict[str, Any]], gpu: bool = False) -> dict[str, Any]:
    machine = copy.deepcopy(MACHINE) | (GPU if gpu else {})
    return {
        "machine_info": {"fastmerge": machine},
        "commit_info": {"id": MACHINE["commit"]},
        "benchmarks": list(benchmarks),
        "datetime": "2030-01-02T03:04:05+00:00",
        "version": "5.3.1",
    }


def write(path: Path, benchmarks: Sequence[dict[str, Any]], gpu: bool = False) -> Path:
    path.write_text(json.dumps(report(benchmarks, gpu)), encoding="utf-8")
    return path


def _benchmark(group: str, name: str, data: Sequence[float], extra: dict[str, Any]) -> dict[str, Any]:
    param = name.partition("[")[2].rstrip("]") or None
    stats = {"data": list(data), "rounds": len(data)}
    return {"group": group, "name": name, "param": param, "extra_info": extra, "stats": stats}


def text_of(runs: dict[str, dict[str, Any]]) -> str:
    """All that docs/benchmarks.md shows of runs."""
    return "\n\n".join(blocks(runs).values())

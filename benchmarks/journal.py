"""Benchmarks written down as they are measured, in the form that pytest-benchmark gives a finished run.

A process that dies takes nothing with it but the contender it was at: the next process with the same journal goes on after it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that appears under its name whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


class Journal:
    """The benchmarks of a run, in a file that is written anew whenever there is more to know.

    Args:
        path: the file; None keeps nothing. If it exists, another process began the run and this one goes on with it.
        machine: describes the machine, for the file's ``machine_info``.
    """

    def __init__(self, path: Path | None = None, machine: Callable[[], dict[str, Any]] = dict) -> None:
        self.path, self._machine = path, machine
        self._benchmarks: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            self._benchmarks = {b["fullname"]: b for b in json.loads(path.read_text(encoding="utf-8"))["benchmarks"]}

    def earlier(self, benchmark: Any) -> dict[str, Any]:
        """What an earlier process wrote as the ``extra_info`` of a benchmark; empty where none did."""
        return dict(self._benchmarks.get(benchmark.fullname, {}).get("extra_info", {}))

    def keep(self, benchmark: Any, samples: Sequence[float]) -> None:
        """Writes down a benchmark as it stands.

        Args:
            benchmark: pytest-benchmark's fixture.
            samples: seconds, of what pytest-benchmark times.
        """
        if self.path is None:
            return
        self._benchmarks[benchmark.fullname] = {
            "group": benchmark.group,
            "name": benchmark.name,
            "fullname": benchmark.fullname,
            "param": benchmark.param,
            "extra_info": benchmark.extra_info,
            "stats": {"data": list(samples), "rounds": len(samples)},
        }
        report = {
            "machine_info": self._machine(),
            "benchmarks": list(self._benchmarks.values()),
            "datetime": datetime.now(timezone.utc).isoformat(),
        }
        write_whole(self.path, json.dumps(report).encode())


def joined(files: Sequence[Path]) -> dict[str, Any] | None:
    """The benchmarks of several runs on one machine as one report, or None where there are none."""
    report: dict[str, Any] | None = None
    for file in files:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            continue  # the run did not get so far
        if report is None:
            report = found
            continue
        report["benchmarks"] += found["benchmarks"]
        # Each run has those of the runs before it, if the cache file could be written.
        both = [run["machine_info"].get("convolution_choices", []) for run in (report, found)]
        choices = {choice["key"]: choice for choices in both for choice in choices}
        if choices:
            report["machine_info"]["convolution_choices"] = [choices[key] for key in sorted(choices)]
    return report

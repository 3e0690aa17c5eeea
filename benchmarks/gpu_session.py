"""Everything that needs a GPU, in one command: the extension, the GPU tests, then the benchmarks in order of importance.

``python3 -m benchmarks.gpu_session OUT`` runs with any Python that has torch, Triton, torchvision, pybind11, pytest and
pytest-benchmark, from a checkout; nothing is installed and no network needed. Every part has a time limit. One that fails or
runs over costs no other part's results: what it has measured is kept. OUT receives a log and a JSON per part,
``benchmarks.json`` with all of them, rewritten after each part, and ``summary.json``.

``--minutes 9.5`` ends it, results written, within that time: tests get half of it at the most, and what comes late is not
begun. ``--only`` picks parts by kind (build, tests, sanitizer, bench) or by name, for a machine that is lent for a few minutes
at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu_parts import KINDS, ROOT, Part, parts, selected

GRACE = 20.0  # seconds for pytest to write down what it has, after an interrupt
LEAST = 30.0  # with less left, no part is begun
TESTS = 0.5  # of the session's time, if benchmarks follow


@dataclass(frozen=True)
class Outcome:
    """How a part ended: its exit code, or None where it ran over its time or was not begun; and a line that says more."""

    name: str
    code: int | None
    seconds: float
    says: str
    good: bool

    @property
    def state(self) -> str:
        """A word or two."""
        if self.good:
            return "ok" if self.code == 0 else "skipped"
        return "over time" if self.code is None else f"exit {self.code}"


def run(part: Part, out: Path, seconds: float) -> Outcome:
    """Runs one part; when its time is over it is interrupted, and killed if that does not end it."""
    files = {"json": out / f"{part.name}.json", "xml": out / f"{part.name}.xml"}
    filled = {**files, "samples": f"{seconds / 4:.0f}", "patience": f"{seconds / 2:.0f}"}
    command = list(part.command)
    for key, value in filled.items():
        command = [argument.replace(f"{{{key}}}", str(value)) for argument in command]
    if part.interpreter:
        command.insert(0, sys.executable)
    elif shutil.which(command[0]) is None:
        return Outcome(part.name, 127, 0.0, f"{command[0]} is not there", good=part.optional)
    start = time.monotonic()
    with (out / f"{part.name}.log").open("w", encoding="utf-8") as log:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **part.environment},
        )
        code = _wait(child, seconds)
        if code is None:
            os.killpg(child.pid, signal.SIGINT)
            if _wait(child, GRACE) is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    took = time.monotonic() - start
    says = _says(files["xml"], out / f"{part.name}.log")
    if code is None:
        says = f"ran over its {seconds:.0f} s; {says}"
    return Outcome(part.name, code, took, says, good=code == 0)


def _wait(child: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _says(xml: Path, log: Path) -> str:
    """The last line of a log, or the counts of a test run."""
    try:
        suites = list(ElementTree.parse(xml).iter("testsuite"))
        counts = {key: sum(int(s.attrib[key]) for s in suites) for key in ("tests", "failures", "errors", "skipped")}
        return ", ".join(f"{count} {key}" for key, count in counts.items())
    except (OSError, ElementTree.ParseError):  # no tests, or none that came to an end
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
        return next((line[:100] for line in reversed(lines) if line), "")


def joined(files: Sequence[Path]) -> dict[str, Any] | None:
    """The benchmarks of several runs on one machine as one report, or None where there are none."""
    report: dict[str, Any] | None = None
    for file in files:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            continue  # the part did not get so far
        if report is None:
            report = found
        else:
            report["benchmarks"] += found["benchmarks"]
            # Each run has those of the runs before it, if the cache file could be written.
            both = [run["machine_info"].get("convolution_choices", []) for run in (report, found)]
            choices = {choice["key"]: choice for choices in both for choice in choices}
            if choices:
                report["machine_info"]["convolution_choices"] = [choices[key] for key in sorted(choices)]
    return report


def session(todo: Sequence[Part], out: Path, seconds: float) -> Iterator[Outcome]:
    """Runs the parts in turn, tests beside each other, and writes what there is after each part.

    Args:
        todo: the parts.
        out: folder for the results.
        seconds: for all parts together; those for which no time is left are not begun.
    """
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds - GRACE
    for_tests = (TESTS if any(part.kind == "bench" for part in todo) else 1.0) * seconds
    at_once = max(1, (os.cpu_count() or 1) // 2)
    outcomes: list[Outcome] = []
    for turn in _turns(todo):
        start = time.monotonic()
        until = end if turn[0].alone else min(end, start + for_tests)
        with ThreadPoolExecutor(at_once) as pool:
            for future in as_completed([pool.submit(_begin, part, out, until) for part in turn]):
                outcomes.append(future.result())
                _write(out, todo, outcomes)
                yield outcomes[-1]
        if not turn[0].alone:
            for_tests -= time.monotonic() - start


def _begin(part: Part, out: Path, until: float) -> Outcome:
    left = until - time.monotonic()
    if left < min(part.seconds, LEAST):
        return Outcome(part.name, None, 0.0, "no time left", good=False)
    return run(part, out, min(part.seconds, left))


def _write(out: Path, todo: Sequence[Part], outcomes: Sequence[Outcome]) -> None:
    report = joined([out / f"{part.name}.json" for part in todo])
    if report is not None:
        (out / "benchmarks.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / "summary.json").write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n", encoding="utf-8")


def _turns(todo: Sequence[Part]) -> Iterator[list[Part]]:
    """The parts in order: each that must be alone by itself, the others with those that follow them."""
    turn: list[Part] = []
    for part in todo:
        if turn and (part.alone or turn[0].alone):
            yield turn
            turn = []
        turn.append(part)
    if turn:
        yield turn


def targets(out: Path) -> str:
    """The targets that were measured, as a table; empty where there are none."""
    # Imported here: whatever is wrong with it must not cost the results.
    from benchmarks.report import measured_targets

    report = joined([out / "benchmarks.json"])
    return "" if report is None else measured_targets(report)


def has_gpu() -> bool:
    """Whether this Python's torch sees a GPU; asked in a process of its own, which gives the GPU back."""
    question = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", question], check=False).returncode == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs everything; the exit code is 1 where a part failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for logs and results")
    parser.add_argument("--minutes", type=float, default=25.0, help="for all of it (default %(default)g)")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="PART", help=f"only these: {', '.join(KINDS)}, or names"
    )
    options = parser.parse_args(arguments)
    try:
        todo = selected(parts(), options.only)
    except ValueError as error:
        parser.error(str(error))
    if not has_gpu():
        print(
            "gpu_session needs a CUDA GPU and a torch that can use it; torch.cuda.is_available() is False",
            file=sys.stderr,
        )
        return 2
    outcomes = []
    for outcome in session(todo, options.out, 60 * options.minutes):
        outcomes.append(outcome)
        print(f"{outcome.name}: {outcome.says} ({outcome.seconds:.0f} s)", flush=True)
    print()
    try:
        print(targets(options.out))
    except Exception as error:
        print(f"the targets could not be read: {type(error).__name__}: {error}")
    for outcome in outcomes:
        print(f"{outcome.name:<26}{outcome.state:<10}{outcome.seconds:>6.0f} s  {outcome.says}")
    print(f"Results in {options.out}; benchmarks.json has all figures.")
    return 0 if all(outcome.good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Everything that needs a GPU, in one command: the extension, the GPU tests, then the benchmarks in order of importance.

``python3 -m benchmarks.gpu_session OUT`` runs with any Python that has torch, Triton, torchvision, pybind11, pytest and
pytest-benchmark, from a checkout; nothing is installed and no network needed. Every part has a time limit. One that fails or
runs over costs no other part's results: what it has measured is kept. OUT receives a log and a JSON per part,
``benchmarks.json`` with all of them, rewritten after each part, and ``summary.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
GRACE = 20.0  # seconds for pytest to write down what it has, after an interrupt


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        name: of its files in OUT.
        seconds: how long it may take.
        command: after the interpreter; "{json}" and "{xml}" become paths in OUT.
        interpreter: whether it runs under this Python.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    interpreter: bool = True


@dataclass(frozen=True)
class Outcome:
    """How a part ended: its exit code, or None where it ran over its time; and a line that says more."""

    name: str
    code: int | None
    seconds: float
    says: str

    @property
    def good(self) -> bool:
        return self.code == 0


def parts(sanitizer: bool) -> list[Part]:
    """What there is to do, the most important first."""
    others = _other_benchmarks()
    build = Part("build", 120, ("setup.py", "build_ext", "--inplace"))
    tests = Part("tests", 420, ("-m", "pytest", *_PYTEST, "-m", "gpu", "--junitxml={xml}", *_gpu_tests()))
    found = [
        build,
        tests,
        _steps("step-resnet18-bf16", 240, "resnet18-224px-batch-256-bf16-cuda"),
        _steps("step-resnet20-128", 120, "resnet20-32px-batch-128-bf16-cuda"),
        *[_other(name) for name in _FIRST if name in others],
        _steps("step-resnet18-fp16", 240, "resnet18-224px-batch-256-fp16-cuda"),
        *[_other(name) for name in others if name not in _FIRST],
        _steps("step-small", 180, "(resnet20-32px-batch-512 or lenet or sine) and cuda"),
        _steps("step-resnet50-bf16", 240, "resnet50-224px-batch-256-bf16-cuda"),
        _steps("step-resnet50-fp16", 240, "resnet50-224px-batch-256-fp16-cuda"),
    ]
    if sanitizer:
        tool = ("compute-sanitizer", "--error-exitcode", "9", "--target-processes", "all")
        pytest = (sys.executable, "-m", "pytest")
        tests_of_kernels = [path for path in _gpu_tests() if "kernels" in path]
        command = (*tool, *pytest, *_PYTEST, "-m", "gpu", "-k", "float64", "-x", *tests_of_kernels)
        found.insert(2, Part("sanitizer", 300, command, interpreter=False))
    return found


_FIRST = ("batch_norm", "gate", "merge")  # of the benchmarks other than whole steps
_SECONDS = {"block_conv": 300, "merge": 180}  # those that take longer than most
# Another machine's versions may deprecate what they like.
_PYTEST = (
    *("-p", "no:cacheprovider", "-p", "no:xdist", "--continue-on-collection-errors", "-q"),
    *("-W", "default::DeprecationWarning", "-W", "default::FutureWarning"),
)


def _gpu_tests() -> list[str]:
    """The files that have GPU tests: the others may need packages that a GPU machine lacks."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(p.relative_to(ROOT)) for p in files if "mark.gpu" in p.read_text(encoding="utf-8")]


def _other_benchmarks() -> list[str]:
    """Names of the benchmarks of single operations and of the whole stage that have cases for a GPU."""
    files = [file for file in sorted((ROOT / "benchmarks").glob("bench_*.py")) if file.name != "bench_step.py"]
    with_gpu = [
        file for file in files if re.search(r"mark\.gpu|needs_gpu|parameters\(", file.read_text(encoding="utf-8"))
    ]
    return [file.stem.removeprefix("bench_") for file in with_gpu]


def _benchmark(name: str, seconds: float, file: str, *options: str) -> Part:
    enabled = ("--benchmark-enable", "--benchmark-json={json}", "-m", "gpu and not slow")
    return Part(name, seconds, ("-m", "pytest", *_PYTEST, *enabled, *options, f"benchmarks/{file}"))


def _other(name: str) -> Part:
    return _benchmark(name.replace("_", "-"), _SECONDS.get(name, 120), f"bench_{name}.py")


def _steps(name: str, seconds: float, cases: str) -> Part:
    limits = ("--seconds", f"{seconds / 4:.0f}", "--patience", f"{seconds / 2:.0f}")
    return _benchmark(name, seconds, "bench_step.py", *limits, "-k", cases)


def run(part: Part, out: Path, seconds: float) -> Outcome:
    """Runs one part; when its time is over it is interrupted, and killed if that does not end it."""
    files = {"json": out / f"{part.name}.json", "xml": out / f"{part.name}.xml"}
    command = [a.replace("{json}", str(files["json"])).replace("{xml}", str(files["xml"])) for a in part.command]
    if part.interpreter:
        command.insert(0, sys.executable)
    elif shutil.which(command[0]) is None:
        return Outcome(part.name, 127, 0.0, f"{command[0]} is not there")
    start = time.monotonic()
    with (out / f"{part.name}.log").open("w", encoding="utf-8") as log:
        child = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        code = _wait(child, seconds)
        if code is None:
            os.killpg(child.pid, signal.SIGINT)
            if _wait(child, GRACE) is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    took = time.monotonic() - start
    says = f"ran over its {seconds:.0f} s" if code is None else _says(files["xml"], out / f"{part.name}.log")
    return Outcome(part.name, code, took, says)


def _wait(child: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _says(xml: Path, log: Path) -> str:
    """The last line of a log, or the counts of a test run."""
    if xml.exists():
        suites = list(ElementTree.parse(xml).iter("testsuite"))
        counts = {key: sum(int(s.attrib[key]) for s in suites) for key in ("tests", "failures", "errors", "skipped")}
        return ", ".join(f"{count} {key}" for key, count in counts.items())
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:100] if lines else ""


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
    """Runs the parts in turn and writes what there is after each.

    Args:
        todo: the parts.
        out: folder for the results.
        seconds: for all parts together; those for which no time is left are not begun.
    """
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    for part in todo:
        left = end - time.monotonic() - GRACE
        if left < min(part.seconds, 30):
            outcome = Outcome(part.name, None, 0.0, "no time left")
        else:
            outcome = run(part, out, min(part.seconds, left))
        outcomes.append(outcome)
        report = joined([out / f"{part.name}.json" for part in todo])
        if report is not None:
            (out / "benchmarks.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (out / "summary.json").write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n", encoding="utf-8")
        yield outcome


def has_gpu() -> bool:
    """Whether this Python's torch sees a GPU; asked in a process of its own, which gives the GPU back."""
    question = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", question], check=False).returncode == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs everything; the exit code is 1 where a part failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for logs and results")
    parser.add_argument("--minutes", type=float, default=25.0, help="for all of it (default %(default)g)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="only these parts")
    parser.add_argument("--sanitizer", action="store_true", help="also some kernels' tests under compute-sanitizer")
    options = parser.parse_args(arguments)
    todo = parts(options.sanitizer)
    unknown = set(options.only or ()) - {part.name for part in todo}
    if unknown:
        parser.error(f"--only takes {', '.join(part.name for part in todo)}; got {', '.join(sorted(unknown))}")
    if not has_gpu():
        print(
            "gpu_session needs a CUDA GPU and a torch that can use it; torch.cuda.is_available() is False",
            file=sys.stderr,
        )
        return 2
    outcomes = []
    for outcome in session(
        [p for p in todo if not options.only or p.name in options.only], options.out, 60 * options.minutes
    ):
        outcomes.append(outcome)
        print(f"{outcome.name}: {outcome.says} ({outcome.seconds:.0f} s)", flush=True)
    print()
    for outcome in outcomes:
        state = "ok" if outcome.good else "over time" if outcome.code is None else f"exit {outcome.code}"
        print(f"{outcome.name:<22}{state:<10}{outcome.seconds:>6.0f} s  {outcome.says}")
    print(f"Results in {options.out}; benchmarks.json has all figures.")
    return 0 if all(outcome.good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())

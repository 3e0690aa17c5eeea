"""What there is to do on a machine with a GPU, the most important first, and how long each of it may take."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("build", "compile", "tests", "sanitizer", "bench")


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        name: of its files in OUT.
        seconds: how long it may take.
        command: "{json}" and "{xml}" become paths in OUT; "{samples}" and "{patience}" a quarter and a half of the seconds
            that it is given.
        kind: of ``KINDS``. Compiling, tests, and tests under the sanitizer go on beside each other; what is timed runs alone.
        interpreter: whether the command is what comes after this Python.
        optional: whether it is no failure if the command's program is not there.
        environment: variables set for it.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    kind: str = "bench"
    interpreter: bool = True
    optional: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def alone(self) -> bool:
        """Whether nothing may run beside it."""
        return self.kind in ("build", "bench")


def parts() -> list[Part]:
    """Everything."""
    others = other_benchmarks()
    return [
        Part("build", 120, ("setup.py", "build_ext", "--inplace"), "build"),
        Part("compile", 240, ("-m", "benchmarks.compile_kernels"), "compile"),
        *[part for file in gpu_tests() for part in _tests(file)],
        *[_sanitizer(file) for file in gpu_tests() if "kernels" in file],
        _steps("step-resnet18-bf16", 240, "resnet18-224px-batch-256-bf16-cuda"),
        *[_other(name) for name in _FIRST if name in others],
        _steps("step-resnet20-128", 120, "resnet20-32px-batch-128-bf16-cuda"),
        *[_other(name) for name in _SECOND if name in others],
        _steps("step-resnet18-fp16", 240, "resnet18-224px-batch-256-fp16-cuda"),
        *[_other(name) for name in others if name not in (*_FIRST, *_SECOND)],
        _steps("step-small", 180, "(resnet20-32px-batch-512 or lenet or sine) and cuda"),
        _steps("step-resnet50-bf16", 240, "resnet50-224px-batch-256-bf16-cuda"),
        _steps("step-resnet50-fp16", 240, "resnet50-224px-batch-256-fp16-cuda"),
    ]


def selected(todo: Sequence[Part], only: Sequence[str]) -> list[Part]:
    """The parts named, by their own names or by their kinds; all of them if none is named. Benchmarks bring compiling along.

    Args:
        todo: the parts.
        only: names, several in one separated by commas.

    Raises:
        ValueError: for a name that is neither.
    """
    wanted = {name for names in only for name in names.split(",") if name}
    unknown = wanted - {part.name for part in todo} - set(KINDS)
    if unknown:
        known = ", ".join([*KINDS, *(part.name for part in todo)])
        raise ValueError(f"--only takes {known}; got {', '.join(sorted(unknown))}")
    found = [part for part in todo if not wanted or wanted & {part.name, part.kind}]
    if any(part.kind == "bench" for part in found):
        found = [part for part in todo if part in found or part.kind == "compile"]
    return found


def gpu_tests() -> list[str]:
    """The files that have GPU tests, the riskiest first: the others may need packages that a GPU machine lacks."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    found = [str(p.relative_to(ROOT)) for p in files if "mark.gpu" in p.read_text(encoding="utf-8")]

    def risk(file: str) -> int:
        return next((place for place, word in enumerate(_RISKIEST) if word in file), len(_RISKIEST))

    return sorted(found, key=risk)


def other_benchmarks() -> list[str]:
    """Names of the benchmarks of single operations and of the whole stage that have cases for a GPU."""
    files = [file for file in sorted((ROOT / "benchmarks").glob("bench_*.py")) if file.name != "bench_step.py"]
    with_gpu = [
        file for file in files if re.search(r"mark\.gpu|needs_gpu|parameters\(", file.read_text(encoding="utf-8"))
    ]
    return [file.stem.removeprefix("bench_") for file in with_gpu]


def find_sanitizer() -> str:
    """compute-sanitizer on the path or in CUDA's usual places; where it is in none, its bare name."""
    name = "compute-sanitizer"
    homes = [os.environ.get("CUDA_HOME", ""), *sorted(map(str, Path("/usr/local").glob("cuda*")), reverse=True)]
    there = [shutil.which(name), *(shutil.which(name, path=f"{home}/bin") for home in homes if home)]
    return next(filter(None, there), name)


# Targets stand in the order of whole steps, single kernels, small networks, memory, the whole stage.
_FIRST = ("batch_norm", "block_conv")
_SECOND = ("compress", "merge", "gate", "block_sparse")
_RISKIEST = ("block_conv", "graphed", "batch_norm", "wide", "compact", "gate")
# Expressions for pytest's -k that cut a file's tests into parts of about equal length.
_SLICES = {
    "kernels_block_conv": ("every_tile and fp16", "every_tile and bf16", "every_tile and fp32", "measured"),
    "kernels_batch_norm": ("odd_shapes", "real_shapes or options"),
}
_SECONDS = {"block_conv": 300, "block_sparse": 240, "merge": 180}  # those that take longer than most
# Another machine's versions may deprecate what they like.
_PYTEST = (
    *("-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "--continue-on-collection-errors", "-q"),
    *("-W", "default::DeprecationWarning", "-W", "default::FutureWarning"),
)
# Of the tests of kernels the quick ones that look for what lies at the edges.
_EDGES = "(odd or layout or live_blocks or slices or stem or against_float64) and not every_tile"


def _tests(file: str) -> list[Part]:
    """A file's tests; of one with many kernels to compile, what is in no slice first, then the slices."""
    name = Path(file).stem.removeprefix("test_").removesuffix("_gpu")
    slices = _SLICES.get(name, ())
    rest = f"not ({' or '.join(f'({part})' for part in slices)})" if slices else ""
    return [
        Part(
            f"tests-{name}{f'-{number}' if number else ''}".replace("_", "-"),
            420,
            (*_PYTEST, "-m", "gpu", *(["-k", chosen] if chosen else []), "--junitxml={xml}", file),
            "tests",
        )
        for number, chosen in enumerate((rest, *slices))
    ]


def _sanitizer(file: str) -> Part:
    name = Path(file).stem.removeprefix("test_kernels_").removesuffix("_gpu").replace("_", "-")
    tool = (find_sanitizer(), "--error-exitcode", "9", "--target-processes", "all", sys.executable)
    command = (*tool, *_PYTEST, "-m", "gpu", "-k", _EDGES, "-x", "--junitxml={xml}", file)
    # The allocator's own pool would hide what reaches beyond one tensor into the next.
    memory = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Part(f"sanitizer-{name}", 420, command, "sanitizer", interpreter=False, optional=True, environment=memory)


def _benchmark(name: str, seconds: float, file: str, *options: str) -> Part:
    enabled = ("--benchmark-enable", "--benchmark-json={json}", "-m", "gpu and not slow")
    return Part(name, seconds, (*_PYTEST, *enabled, *options, f"benchmarks/{file}"))


def _other(name: str) -> Part:
    return _benchmark(name.replace("_", "-"), _SECONDS.get(name, 120), f"bench_{name}.py")


def _steps(name: str, seconds: float, cases: str) -> Part:
    return _benchmark(name, seconds, "bench_step.py", "--seconds={samples}", "--patience={patience}", "-k", cases)

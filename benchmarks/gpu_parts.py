"""What there is to do on a machine with a GPU, in which order, and how long each of it may take: a plan is a list of stages.

``first`` is for a card that nobody has run on: does anything crash, are the numbers right, how fast is a step and why. It takes
less than nine minutes. ``second`` is for the four minutes after it: what failed, under the sanitizer too, float16, and a real
run. ``full`` is everything.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_GATES, _NORMS, _COMPACTION = (f"tests/parts/test_kernels_{name}_gpu.py" for name in ("gate", "batch_norm", "compact"))
_CONVOLUTIONS, _LAYOUTS = (f"tests/parts/test_kernels_block_conv{name}_gpu.py" for name in ("", "_layouts"))
_WIDE, _GRAPHED, _DATA = (f"tests/parts/test_{name}_gpu.py" for name in ("wide", "graphed_step", "data"))
# The smallest tests of each family of kernels, and of CUDA graphs.
FAMILIES = {
    "gates": (_GATES, "against_float64"),
    "batch-norm": (_NORMS, "odd_shapes or options"),
    "pooling": (_NORMS, "stem and not 112"),
    "convolution-bf16": (_CONVOLUTIONS, "one_tile and bf16"),
    "convolution-fp16": (_CONVOLUTIONS, "one_tile and fp16"),
    "convolution-fp32": (_CONVOLUTIONS, "one_tile and fp32"),
    "compaction": (_COMPACTION, "every_layout"),
    "big-student": (_WIDE, "resnet20 and fused"),
    "graph": (_GRAPHED, "replays_are_eager and not budget"),
    "after-capture": (_GRAPHED, "capture or overflow or syncs"),
}
RESNET18, RESNET20 = "resnet18-224px-batch-256-bf16-cuda", "resnet20-32px-batch-128-bf16-cuda"


@dataclass(frozen=True)
class Part:
    """One command, in a process of its own.

    Attributes:
        name: of its log.
        command: for this Python, unless the first word is a program's path. "{journal}" becomes a file of its own, "{folder}" a
            folder, "{until}" the time on the monotonic clock when it must have ended.
        seconds: how long it may take.
        environment: variables set for it.
        careful: whether its contenders run cuDNN's convolutions alone once a test or one of them has died, which then has
            another try.
        rehearsal: the command where there is no card.
    """

    name: str
    command: tuple[str, ...]
    seconds: float = 600.0
    environment: Mapping[str, str] = field(default_factory=dict)
    careful: bool = False
    rehearsal: tuple[str, ...] = ()

    @property
    def is_tests(self) -> bool:
        """Whether it runs tests, which can be left out one by one."""
        return "--benchmark-disable" in self.command

    @property
    def resumes(self) -> bool:
        """Whether it can go on after what ended it: tests, and benchmarks with a journal."""
        return self.is_tests or "--journal={journal}" in self.command


@dataclass(frozen=True)
class Stage:
    """Parts for which there is a time together.

    Attributes:
        name: for ``--only``.
        seconds: of the plan's; what it leaves goes to the next stage.
        parts: in order of importance.
        at_once: how many of them run beside each other. What is timed runs alone.
    """

    name: str
    seconds: float
    parts: tuple[Part, ...]
    at_once: int = 1


def plan(name: str, reds: Sequence[str] = (), data: str | None = None) -> list[Stage]:
    """The stages of a plan.

    Args:
        name: "first", "second" or "full".
        reds: tests that failed in an earlier call, for the second.
        data: an .npz of 28-pixel images for the second's training run; None leaves it out.
    """
    return {"first": _first, "second": lambda: _second(reds, data), "full": _full}[name]()


def _first() -> list[Stage]:
    compiling = Part(
        "compile", ("-m", "benchmarks.compile_kernels", "bf16"), 85, rehearsal=("-c", "print('needs a card')")
    )
    stage = _bench("merge-resnet20", "merge", "resnet20-32px-batch-128", "--rounds=2")
    return [
        _device(),
        _smoke(40),
        Stage("tests", 90, (compiling, *_most_tests()), 6),
        _alone(12),
        *_steps(),
        Stage("merge", 50, (stage,)),
    ]


def _second(reds: Sequence[str], data: str | None) -> list[Stage]:
    blocking = _DETERMINISTIC | {"CUDA_LAUNCH_BLOCKING": "1"}
    again = [_tests(f"red-{number}", "", test) for number, test in enumerate(reds[:12])]
    kernel = next((test for test in reds if "kernels" in test), None)
    checked = _sanitizer("sanitizer", "one_tile and bf16" if kernel is None else "", kernel or _CONVOLUTIONS)
    few = "naive dense|teachers|unlinked|linked"
    stages = [
        Stage("reds", 55, tuple(replace(part, environment=blocking) for part in again) or tuple(_other_tests()), 6),
        Stage("sanitizer", 45, (checked,)),
        Stage("fp16", 75, (_step("step-resnet18-fp16", RESNET18.replace("bf16", "fp16"), few),)),
    ]
    if data is not None and not reds:
        recipe = f"-m fastmerge run lenet-imagewoof --device cuda --data {data}"
        options = "--replicates 3 --budget 0.004 --quiet --out {folder}"
        stages.append(Stage("imagewoof", 45, (Part("imagewoof", (*recipe.split(), *options.split())),)))
    return stages


def _full() -> list[Stage]:
    build = Part("build", ("setup.py", "build_ext", "--inplace"), 120)
    smoke = _smoke(60)
    sanitized = tuple(_sanitizer(f"sanitizer-{Path(file).stem[13:-4]}", _EDGES, file) for file in _KERNELS)
    others = ("compress", "gate", "compaction", "compact", "block_sparse", "data")
    small = "(resnet20-32px-batch-512 or lenet or sine) and cuda"
    return [
        _device(),
        replace(smoke, parts=(*smoke.parts, build)),
        Stage("tests", 240, (*_most_tests(), *_other_tests(), *_tile_tests()), 8),
        _alone(20),
        Stage("sanitizer", 90, sanitized, 5),
        *_steps(),
        Stage("merge", 180, (_bench("merge", "merge", ""),)),
        Stage("fp16", 90, (_step("step-resnet18-fp16", RESNET18.replace("bf16", "fp16"), ""),)),
        *[Stage(name, 45, (_bench(name.replace("_", "-"), name, ""),)) for name in others],
        Stage("small", 45, (_step("step-small", small, ""),)),
        Stage("resnet50", 150, (_step("step-resnet50", RESNET18.replace("18", "50"), ""),)),
    ]


def _device() -> Stage:
    return Stage("device", 15, (Part("device", ("-m", "benchmarks.roofline"), 60),))


def _smoke(seconds: float) -> Stage:
    """Each family of kernels in a process of its own, so that one that hangs or crashes costs no other."""
    found = [_tests(f"smoke-{family}", chosen, file, limit=30) for family, (file, chosen) in FAMILIES.items()]
    return Stage("smoke", seconds, tuple(replace(part, seconds=60) for part in found), len(found))


def _alone(seconds: float) -> Stage:
    """What takes so much memory that nothing may run beside it."""
    return Stage("big tensors", seconds, (_tests("tests-big-tensors", _BIG, _NORMS),))


def _steps() -> list[Stage]:
    """Whole training steps, and the kernels in them; what Inductor compiles last."""
    plain = "naive dense|teachers|unlinked|linked|unlinked, ungated|unlinked, not fused|unlinked, CUDA graph"
    small = "naive dense|teachers|unlinked|teachers, CUDA graph|unlinked, CUDA graph|linked, CUDA graph"
    compiled = "teachers|unlinked|linked|teachers, compiled|naive dense, compiled"
    layers = "(stem-gate or layer1-gate or layer2-gate or layer1-residual-gate) and bf16 and not resnet"
    norms = _bench("batch-norm", "batch_norm", layers, "--contenders=^(eager|fused|copy)", "--rounds=30")
    return [
        Stage("step18", 140, (_step("step-resnet18", RESNET18, plain, "--rounds=30"),)),
        Stage("step20", 60, (_step("step-resnet20", RESNET20, small, "--rounds=60"),)),
        Stage(
            "bandwidth", 45, (norms, _bench("batch-norm-cuts", "batch_norm", "cuts and not residual", "--rounds=20"))
        ),
        Stage("compiled", 70, (replace(_step("step-compiled", RESNET18, compiled, "--rounds=20"), careful=False),)),
    ]


def _most_tests() -> list[Part]:
    """The tests that say most in the least time, without those of the smoke stage."""
    return [
        _tests("tests-graphed", _others(_GRAPHED), _GRAPHED),
        _tests("tests-wide", f"(resnet18 or resnet20 or saves or automatic) and {_others(_WIDE)}", _WIDE),
        _tests("tests-batch-norm", f"not ({_BIG} or compile) and {_others(_NORMS)}", _NORMS),
        _tests("tests-convolutions", f"not ({_SLOW}) and {_others(_CONVOLUTIONS)}", _CONVOLUTIONS),
        _tests("tests-gates", f"not compile and {_others(_GATES)}", _GATES),
        _tests("tests-compaction", _others(_COMPACTION), _COMPACTION),
        _tests("tests-layouts", "not opcheck", _LAYOUTS),
        _tests("tests-data", "not dali", _DATA),
    ]


def _others(file: str) -> str:
    """What leaves out of a file the tests of the smoke stage."""
    return f"not ({' or '.join(f'({chosen})' for of, chosen in FAMILIES.values() if of == file)})"


def _other_tests() -> list[Part]:
    """All others, but for every tile."""
    return [
        _tests("tests-wide-others", "densenet or mobilenet", _WIDE),
        _tests("tests-compiled", "compile or opcheck", *_KERNELS),
        _tests("tests-measured", "measured", _CONVOLUTIONS),
        _tests("tests-dali", "dali", _DATA),
        _tests("tests-elsewhere", "", *_elsewhere()),
    ]


def _elsewhere() -> list[str]:
    """The other files that have GPU tests among their tests."""
    files = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").glob("*/test_*.py"))
        if "mark.gpu" in path.read_text()
    ]
    return [
        file
        for file in files
        if file not in (*_KERNELS, _WIDE, _GRAPHED, _DATA, "tests/parts/test_benchmarks_gpu_session.py")
    ]


def _tile_tests() -> list[Part]:
    return [
        _tests(f"tests-tiles-{dtype}", f"every_tile and {dtype}", _CONVOLUTIONS) for dtype in ("bf16", "fp16", "fp32")
    ]


_KERNELS = (_GATES, _NORMS, _CONVOLUTIONS, _LAYOUTS, _COMPACTION)
_BIG = "2_to_the_31"
# Without it, cuBLAS refuses what tests compare with where nothing nondeterministic may run.
_DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
_SLOW = "every_tile or measured or compile or opcheck"
# Of the tests of kernels the quick ones that look for what lies at the edges.
_EDGES = "(odd or layout or live_blocks or slices or stem or against_float64) and not every_tile"
# Another machine's versions may warn of what they like.
PYTEST = (
    *("-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "benchmarks.events", "-W", "default"),
    *("--continue-on-collection-errors", "-q", "-s", "--tb=short", "--no-summary"),
)


def _tests(name: str, chosen: str, *files: str, limit: float = 60) -> Part:
    """GPU tests; one that takes longer than the limit ends the process."""
    selected = ("-k", chosen) if chosen else ()
    command = (*PYTEST, f"--limit={limit:g}", "--benchmark-disable", "-m", "gpu", *selected, *files)
    return Part(name, command, environment=_DETERMINISTIC)


def _sanitizer(name: str, chosen: str, *files: str) -> Part:
    """Tests under compute-sanitizer, where it is there."""
    found = find_sanitizer()
    if found is None:
        return Part(name, ("-c", "print('compute-sanitizer is not there')"))
    tool = (found, "--error-exitcode", "9", "--target-processes", "all", sys.executable)
    # The allocator's own pool would hide what reaches beyond one tensor into the next.
    memory = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    part = _tests(name, chosen, *files, limit=120)
    return replace(part, command=(*tool, *part.command), environment=_DETERMINISTIC | memory)


def _bench(name: str, file: str, cases: str, *options: str) -> Part:
    kept = ("--benchmark-enable", "--journal={journal}", "--until={until}", "--limit=90")
    common = (*PYTEST, *kept, f"benchmarks/bench_{file}.py")
    selected = ("-k", cases) if cases else ()
    rehearsed = (*common, "-k", "lenet-28px-batch-128-fp32-cpu", "--rounds=3")
    return Part(name, (*common, "-m", "gpu and not slow", *selected, *options), rehearsal=rehearsed)


def _step(name: str, cases: str, contenders: str, *options: str) -> Part:
    chosen = (f"--contenders=^({contenders})$",) if contenders else ()
    part = _bench(name, "step", cases, "--seconds=60", *chosen, *options)
    return replace(part, careful=True, rehearsal=(*part.rehearsal, *chosen))


def find_sanitizer() -> str | None:
    """compute-sanitizer on the path or in CUDA's usual places; None where it is in none."""
    name = "compute-sanitizer"
    homes = [os.environ.get("CUDA_HOME", ""), *sorted(map(str, Path("/usr/local").glob("cuda*")), reverse=True)]
    there = [shutil.which(name), *(shutil.which(name, path=f"{home}/bin") for home in homes if home)]
    return next(filter(None, there), None)

"""What goes wrong on purpose: parts of a rehearsal that fail, hang, die, flood and leave processes behind.

``python -m benchmarks.rehearsal WAY`` goes wrong in one way. As a benchmark it races contenders that do.
"""

from __future__ import annotations

import ctypes
import faulthandler
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.events import emit
from benchmarks.gpu_parts import PYTEST, Part, Stage

LEFT_BEHIND = "import time; time.sleep(3600)"


def stand_ins() -> Stage:
    """One part for each way."""
    file = str(Path(__file__).relative_to(Path.cwd())) if Path(__file__).is_relative_to(Path.cwd()) else __file__
    race = ("--benchmark-enable", "--rounds=3", "--journal={journal}", "--until={until}", "--limit=5", file)
    parts = [Part(way, ("-m", "benchmarks.rehearsal", way), 8 if way == "hangs" else 60) for way in WAYS]
    return Stage("stand-ins", 60, (*parts, Part("race", (*PYTEST, *race))), 8)


def fail() -> None:
    raise RuntimeError("a reason")


def hang() -> None:
    """Deaf to every signal that it can be deaf to."""
    faulthandler.cancel_dump_traceback_later()
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    time.sleep(3600)


def die() -> None:
    ctypes.string_at(0)


def flood() -> None:
    for _ in range(50_000):
        print("x" * 120)


def leave() -> None:
    print(subprocess.Popen([sys.executable, "-c", LEFT_BEHIND]).pid, flush=True)


WAYS: dict[str, Callable[[], None]] = {"fails": fail, "hangs": hang, "dies": die, "floods": flood, "leaves": leave}


def bench_rehearsal(benchmark: object, effort: object) -> None:
    """The first and the last contender run; between them each goes wrong in its way."""
    import torch

    from benchmarks.race import Contender, race

    def out_of_memory() -> Contender:
        raise torch.OutOfMemoryError("CUDA out of memory")

    benchmark.extra_info["case"] = "rehearsal"  # type: ignore[attr-defined]
    makers = {
        "first": lambda: Contender(lambda: None),
        "fails": lambda: Contender(fail),
        "out of memory": out_of_memory,
        "dies": lambda: Contender(die),
        "hangs": lambda: Contender(lambda: time.sleep(3600)),
        "last": lambda: Contender(lambda: None),
    }
    race(benchmark, makers, effort, "cpu")  # type: ignore[arg-type]


if __name__ == "__main__":
    emit("begin", sys.argv[1])
    WAYS[sys.argv[1]]()
    emit("end", sys.argv[1], outcome="passed", says="")

"""Functions in processes that die by SIGKILL, forked from a server that has imported torch once."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).resolve().parent


def assert_killed(function: Callable[..., Any], *arguments: Any) -> None:
    """Runs a function of a module in tests/ in a process of its own, which must be killed before it ends."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed_merge", "killed_run"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_TESTS.parent), str(_TESTS)])
    try:
        process = context.Process(target=function, args=arguments)
        process.start()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    process.join(120)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == -signal.SIGKILL


def die() -> None:
    """What kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)

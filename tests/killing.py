"""Processes that a server forks, which has imported torch once; and functions in them that die by SIGKILL."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).resolve().parent
_PRELOADED = ["warmed", "ddp_merge", "ddp_recipe", "gloo", "killed_merge", "killed_run", "synced_shares"]


@contextlib.contextmanager
def forkserver() -> Iterator[Any]:
    """Within this context processes can be made that a server forks, which has imported modules of tests/ once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_TESTS.parent), str(_TESTS)])
    try:
        yield context
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def assert_killed(function: Callable[..., Any], *arguments: Any) -> None:
    """Runs a function of a module in tests/ in a process of its own, which must be killed before it ends."""
    with forkserver() as context:
        process = context.Process(target=function, args=arguments)
        process.start()
    process.join(120)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == -signal.SIGKILL


def die() -> None:
    """What kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)

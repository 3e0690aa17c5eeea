"""A line when something begins and one when it has ended, written at once: what a process died of is what it had begun last.

As a plugin of pytest (``-p benchmarks.events``) it writes them for every test, named by its parameters, and tracebacks as they
come. With ``--limit`` what takes longer than so many seconds ends its process with a traceback of all threads. A test after
which the CUDA context is lost ends its process too: none after it could pass.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import sys

import pytest

MARK = "@@ "
DEAD = 70  # exit code of a process that lost its CUDA context

_out, _err = os.dup(1), os.dup(2)  # pytest, which imports this before it captures, can't hold back what goes there
_limit = math.inf


def emit(kind: str, name: str, **facts: object) -> None:
    """Writes a line: "begin" or "end" of something, or what else is to be known of it."""
    os.write(_out, f"\n{MARK}{json.dumps({'kind': kind, 'name': name, **facts}, default=str)}\n".encode())


def read(line: str) -> dict[str, object] | None:
    """What a line says, or None for any other line."""
    if not line.startswith(MARK):
        return None
    try:
        return dict(json.loads(line[len(MARK) :]))
    except (TypeError, ValueError):  # cut off
        return None


def watch() -> None:
    """Ends the process unless this is called again, or :func:`rest`, within the limit."""
    if math.isfinite(_limit):
        faulthandler.dump_traceback_later(_limit, exit=True, file=_err)


def rest() -> None:
    """Takes the limit away until the next :func:`watch`."""
    faulthandler.cancel_dump_traceback_later()


def has_lost_context() -> bool:
    """Whether CUDA was used here and answers nothing but errors any more."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--limit", type=float, default=math.inf, help="seconds after which a check ends the process")


def pytest_configure(config: pytest.Config) -> None:
    global _limit
    _limit = config.getoption("--limit")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that can't be imported is a check that failed."""
    if report.failed:
        _failed(report)


def pytest_runtest_logstart(nodeid: str) -> None:
    watch()
    emit("begin", nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.passed:
        return
    if report.failed:
        _failed(report)
    else:
        emit("end", report.nodeid, outcome=report.outcome, says=_message(report))
    if report.failed and has_lost_context():
        emit("lost", report.nodeid, says="the CUDA context is lost")
        os._exit(DEAD)


def pytest_runtest_logfinish() -> None:
    rest()


def _failed(report: pytest.TestReport | pytest.CollectReport) -> None:
    os.write(_out, f"\n{report.longreprtext}\n".encode())
    emit("end", report.nodeid, outcome="failed", says=_message(report))


def _message(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why it failed or was skipped: the first lines, of which the very first often says little."""
    if isinstance(report.longrepr, tuple):  # skipped: file, line, reason
        return str(report.longrepr[2])[:300]
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(report.longrepr or "") if crash is None else crash.message
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines[-1:] if crash is None else lines[:4])[:300]

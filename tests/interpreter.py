"""Tests under Triton's interpreter, without disturbing the rest of the suite.

Triton reads TRITON_INTERPRET while its modules and kernels are defined: after the first import it is too late, and the
kernels of an interpreted process can't be compiled. So a module's ``@interpreted`` tests run in one child process with
TRITON_INTERPRET=1, at the first of them, and each reports here what became of it there. In a process that was started
with TRITON_INTERPRET=1 they run in place, which is how to debug one.
"""

from __future__ import annotations

import functools
import inspect
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def interpreted(test: Callable[..., None]) -> Callable[..., None]:
    """Runs a test, parametrized or not, in a process where Triton's kernels are interpreted."""
    if INTERPRETING:
        return test

    @functools.wraps(test)
    def report(request: pytest.FixtureRequest, **arguments: object) -> None:
        outcomes = _outcomes(request.path, _chosen(request))
        outcome, message = outcomes.get(request.node.name, ("failure", "the child process didn't run this test"))
        if outcome == "skipped":
            pytest.skip(message)
        if outcome != "passed":
            pytest.fail(f"under Triton's interpreter:\n{message}", pytrace=False)

    # pytest looks at the signature for parameters and fixtures: the test's own, and the request made above.
    parameters = [p for p in inspect.signature(test).parameters.values() if p.name != "request"]
    requested = inspect.Parameter("request", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    report.__signature__ = inspect.Signature([requested, *parameters])  # type: ignore[attr-defined]
    report.interpreted = True  # type: ignore[attr-defined]
    return report


def _chosen(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """The ids of the interpreted tests of this test's module that this session is going to run."""
    items = [item for item in request.session.items if item.path == request.path]
    return tuple(item.nodeid for item in items if hasattr(getattr(item, "function", None), "interpreted"))


@functools.cache
def _outcomes(path: Path, node_ids: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """Runs the tests in a child process and returns, by name, how each ended and its message."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "--strict-markers", f"--junitxml={results}"]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        child = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *node_ids],
            cwd=path.parent.parent,
            env={**environment, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if not results.exists():
            pytest.fail(f"the interpreter's process wrote no results:\n{child.stdout}\n{child.stderr}", pytrace=False)
        return {case.attrib["name"]: _outcome(case) for case in ElementTree.parse(results).iter("testcase")}


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    for kind in ("failure", "error", "skipped"):
        element = case.find(kind)
        if element is not None:
            return kind, element.attrib.get("message", "") if kind == "skipped" else element.text or ""
    return "passed", ""

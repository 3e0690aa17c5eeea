"""Tests under Triton's interpreter, without disturbing the rest of the suite.

Triton reads TRITON_INTERPRET while its modules and kernels are defined: after the first import it is too late, and the
kernels of an interpreted process can't be compiled. So a module's ``@interpreted`` tests run in one child process with
TRITON_INTERPRET=1, at the first of them, and each reports here what became of it there. In a process that was started
with TRITON_INTERPRET=1 they run in place, which is how to debug one.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETING:
    # Each call of a function in a kernel puts the interpreter in the place of triton.language anew, which takes 40 % of the
    # time of our kernels: once per module and launch will do.
    from triton.runtime import interpreter

    _launch, _patch, _patched = interpreter.GridExecutor.__call__, interpreter._patch_lang, set()

    def _launch_afresh(kernel: Any, *arguments: Any, **options: Any) -> None:
        _patched.clear()
        _launch(kernel, *arguments, **options)

    def _patch_once(function: Callable[..., Any]) -> Any:
        if function.__module__ in _patched:
            return interpreter._LangPatchScope()
        _patched.add(function.__module__)
        return _patch(function)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = _launch_afresh, _patch_once

    # Each sum and product of integers is computed once more in 64 bits, for an assertion that only a debugging builder makes.
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def interpreted(test: Callable[..., None]) -> Callable[..., None]:
    """Runs a test, parametrized or not, in a process where Triton's kernels are interpreted."""
    if INTERPRETING:
        # A loop of a kernel whose bounds are known at run time: the interpreter's numbers are arrays of one element.
        return pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")(test)

    @functools.wraps(test)
    def report(request: pytest.FixtureRequest, **arguments: object) -> None:
        outcomes, log = _outcomes(request)
        outcome, message = outcomes.get(request.node.name, ("failure", f"the child process didn't run it:\n{log}"))
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


def _outcomes(request: pytest.FixtureRequest) -> tuple[dict[str, tuple[str, str]], str]:
    """How each interpreted test of this module ended, with its message, by name; and all that their process printed."""
    folder: Path = request.getfixturevalue("tmp_path_factory").getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    results, log = (folder / f"interpreted-{request.path.stem}{suffix}" for suffix in (".xml", ".log"))
    # The workers of pytest-xdist share one child process: the first to come runs it, the others wait for the log.
    with (folder / f"{log.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not log.exists():
            log.write_text(_run_interpreted(request, results))
    cases = ElementTree.parse(results).iter("testcase") if results.exists() else []
    return {case.attrib["name"]: _outcome(case) for case in cases}, log.read_text()


def _run_interpreted(request: pytest.FixtureRequest, results: Path) -> str:
    items = [item for item in request.session.items if item.path == request.path]
    tests = [item.nodeid for item in items if hasattr(getattr(item, "function", None), "interpreted")]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=", f"--junitxml={results}", *tests],
        cwd=request.config.rootpath,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return child.stdout


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    for kind in ("failure", "error", "skipped"):
        element = case.find(kind)
        if element is not None:
            return kind, element.attrib.get("message", "") if kind == "skipped" else element.text or ""
    return "passed", ""

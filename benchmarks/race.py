"""Contenders timed in turn, A B C A B C, in one process, so that whatever drifts drifts for all of them.

pytest-benchmark times one function per benchmark. Here the others run in the set-up before each of its rounds, each timed
in the same way, and every sample goes into the JSON: ``extra_info["contenders"][name]["samples"]``, seconds, in order, so
that the i-th samples of two contenders make a pair.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

LEAST_ROUNDS = 5


@dataclass
class Contender:
    """What takes part.

    Attributes:
        step: what is timed; returns when the device is done.
        facts: what is known of it besides, as JSON values: ``flops`` and ``bytes`` of a step, ``items``, memory.
        floor: called after the last round; the least seconds that the hardware allows. A time below is impossible and
            fails the benchmark.
        check: called after the last round; raises if what was timed went wrong.
        before: called before every step, outside the time: makes what the step uses up.
    """

    step: Callable[[], object]
    facts: dict[str, Any] = field(default_factory=dict)
    floor: Callable[[], float] | None = None
    check: Callable[[], None] = lambda: None
    before: Callable[[], object] = lambda: None


class UnavailableError(Exception):
    """Raised by a maker where its contender can't take part on this machine; the reason goes into the JSON."""


def race(
    benchmark: BenchmarkFixture,
    makers: Mapping[str, Callable[[], Contender]],
    rounds: int,
    warmup: int = 5,
    seconds: float = math.inf,
    patience: float = math.inf,
    principal: str | None = None,
) -> None:
    """Times contenders in turn.

    Args:
        benchmark: pytest-benchmark's fixture; its own statistics are the principal's.
        makers: make the contenders, by name, in order of importance; the reference that others are compared with comes first.
        rounds: samples of each.
        warmup: steps of each before the first sample.
        seconds: what the rounds may take altogether; fewer are run where they would take longer, never below 5.
        patience: seconds after which no further contender is made.
        principal: the one that pytest-benchmark times; None is the last.

    Raises:
        pytest.fail.Exception: after everything is measured and recorded, if a contender raised, or one was faster than
            its floor.
    """
    results: dict[str, dict[str, Any]] = {}
    benchmark.extra_info["contenders"] = results
    runners: dict[str, Contender] = {}
    end = time.perf_counter() + patience
    for name, make in makers.items():
        if time.perf_counter() > end:
            results[name] = {"unavailable": f"the {patience:.0f} s for making contenders were over"}
            continue
        results[name], contender = _prepare(make, warmup if benchmark.enabled else 1)
        if contender is not None:
            runners[name] = contender
    if not runners:
        _fail(results, [])
        pytest.skip("no contender can run here")
    samples: dict[str, list[float]] = {name: [] for name in runners}
    for name, values in samples.items():
        results[name]["samples"] = values  # filled as they come: an interrupted race keeps them

    def run(name: str) -> None:
        start = time.perf_counter()
        runners[name].step()
        samples[name].append(time.perf_counter() - start)

    start = time.perf_counter()
    for name, contender in runners.items():
        contender.before()
        run(name)
    took = time.perf_counter() - start
    rounds = rounds if took * rounds <= seconds else max(LEAST_ROUNDS, int(seconds / took))
    for values in samples.values():
        values.clear()
    last = principal if principal in runners else [*runners][-1]
    others = [name for name in runners if name != last]

    def before_each() -> None:
        for name in others:
            runners[name].before()
            run(name)
        runners[last].before()

    gc.collect()
    benchmark.pedantic(run, args=(last,), setup=before_each, rounds=rounds)
    broken = []
    for name, contender in runners.items():
        try:
            contender.check()
        except Exception as error:
            results[name]["error"] = f"{type(error).__name__}: {error}"
        if contender.floor is None:
            continue
        results[name]["floor"] = floor = contender.floor()
        if min(samples[name]) < floor:
            broken.append(f"{name} took {min(samples[name]):.3g} s, below what the hardware allows, {floor:.3g} s")
            results[name]["error"] = "faster than the hardware allows"
    _fail(results, broken)


def _prepare(make: Callable[[], Contender], warmup: int) -> tuple[dict[str, Any], Contender | None]:
    """Makes and warms up a contender; or says in one line why it can't run."""
    try:
        contender = make()
        for _ in range(warmup):
            contender.before()
            contender.step()
    except UnavailableError as reason:
        return {"unavailable": str(reason)}, None
    except Exception as error:
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()
        return {"error": message[:500]}, None
    return dict(contender.facts), contender


def _fail(results: dict[str, dict[str, Any]], broken: list[str]) -> None:
    failed = [f"{name}: {result['error']}" for name, result in results.items() if "error" in result]
    if broken or failed:
        pytest.fail("\n".join(["the benchmark is broken:", *broken] if broken else failed), pytrace=False)

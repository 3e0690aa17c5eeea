"""Contenders take turns, each with all its samples, whoever fails or cheats is found out, and who dies costs no other's."""

from __future__ import annotations

import ast
import contextlib
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import events
from benchmarks import race as racing
from benchmarks.effort import Effort
from benchmarks.journal import Journal
from benchmarks.profiling import summary
from benchmarks.race import Contender, race
from benchmarks.results import ratio

ROOT = Path(__file__).resolve().parents[2]
BENCHMARK = """
import dataclasses
import os
import signal
import time
from benchmarks import race as racing
from benchmarks import events
from benchmarks import race as racing
from benchmarks.effort import Effort
from benchmarks.race import Contender, UnavailableError

order = []

def race(benchmark, makers, effort, **options):
    benchmark.extra_info["case"] = "a case"
    order.clear()
    try:
        racing.race(benchmark, makers, effort, "cpu", **{"warmup": 1} | options)
    finally:
        benchmark.extra_info["order"] = order[:]

def contender(name, seconds=0.0, **options):
    def step():
        order.append(name)
        time.sleep(seconds)
    return lambda: Contender(step, {"items": 7}, **options)

def unavailable():
    raise UnavailableError("needs two")

def failing():
    raise RuntimeError("no\\nsecond line")

def wrong():
    raise FloatingPointError("the loss became nan")
"""
RACES = {
    "order": "{'a': contender('a', 0.002), 'b': contender('b'), 'c': contender('c')}, Effort(4), warmup=2, alone=3",
    "failing": "{'a': failing, 'b': contender('b'), 'c': unavailable}, Effort(3)",
    "fast": "{'a': contender('a'), 'b': contender('b', floor=lambda: 5.0)}, Effort(3)",
    "wrong": "{'a': contender('a'), 'b': contender('b', check=wrong)}, Effort(3)",
    "long": "{'a': contender('a', 0.02), 'b': contender('b', 0.02)}, Effort(1000, seconds=0.3)",
    "late": "{'a': contender('a'), 'b': contender('b', 0.1), 'c': contender('c')}, "
    "Effort(2, until=time.monotonic() + 5.4), principal='a'",
    "before": "{'a': contender('a', before=lambda: order.append('+')), 'b': contender('b')}, Effort(2), alone=2",
    "more": "{'a': contender('a', more=lambda samples: {'n': len(samples)}), 'b': contender('b')}, Effort(7)",
    "none": "{'a': unavailable}, Effort(3)",
}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A real run of pytest-benchmark over some races: its JSON, and what pytest printed."""
    races = [f"\ndef bench_{name}(benchmark):\n    race(benchmark, {arguments})\n" for name, arguments in RACES.items()]
    return outcome_of(tmp_path_factory.mktemp("races"), BENCHMARK + "".join(races))


def bench(folder: Path, code: str, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "bench_races.py").write_text(code)
    plugins = ["-p", "no:cacheprovider", "-p", "benchmarks.conftest", "-c", str(ROOT / "pyproject.toml")]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *plugins, "-rA", *options, str(folder / "bench_races.py")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        # One of xdist's workers writes no results, and takes itself for one by its environment.
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
    )


def outcome_of(folder: Path, code: str) -> dict[str, Any]:
    done = bench(folder, code, "--benchmark-enable", f"--benchmark-json={folder / 'out.json'}")
    assert (folder / "out.json").exists(), done.stdout + done.stderr
    benchmarks = json.loads((folder / "out.json").read_text())["benchmarks"]
    return {"printed": done.stdout, **{b["name"].removeprefix("bench_"): b for b in benchmarks}}


def test_they_take_turns_after_their_warm_up_and_samples_alone(outcome: dict[str, Any]) -> None:
    extra = outcome["order"]["extra_info"]
    assert extra["order"] == [*"aaaaabbbbbccccc", *"abc" * 4]
    assert [len(contender["samples"]) for contender in extra["contenders"].values()] == [4, 4, 4]
    assert all(contender["paired"] for contender in extra["contenders"].values())
    assert min(extra["contenders"]["a"]["samples"]) >= 0.002
    assert min(extra["contenders"]["c"]["samples"]) < 0.002
    assert extra["contenders"]["a"]["cpu_seconds"] < 0.002  # it sleeps
    assert outcome["order"]["stats"]["rounds"] == 4


def test_what_a_step_uses_up_is_made_before_each(outcome: dict[str, Any]) -> None:
    assert outcome["before"]["extra_info"]["order"] == [*"+a+a+abbb", *"+ab" * 2]


def test_facts_of_the_samples_are_of_all_of_them(outcome: dict[str, Any]) -> None:
    assert outcome["more"]["extra_info"]["contenders"]["a"]["n"] == 7


def test_one_that_raises_does_not_cost_the_others_and_fails_the_benchmark(outcome: dict[str, Any]) -> None:
    contenders = outcome["failing"]["extra_info"]["contenders"]
    assert contenders["a"] == {"error": "RuntimeError: no"}
    assert contenders["c"] == {"unavailable": "needs two"}
    assert len(contenders["b"]["samples"]) == 3
    assert "a: RuntimeError: no" in outcome["printed"]
    assert "FAILED" in outcome["printed"]


def test_faster_than_the_hardware_is_broken(outcome: dict[str, Any]) -> None:
    assert outcome["fast"]["extra_info"]["contenders"]["b"]["error"] == "faster than the hardware allows"
    assert "the benchmark is broken" in outcome["printed"]


def test_a_step_that_went_wrong_is_found(outcome: dict[str, Any]) -> None:
    assert outcome["wrong"]["extra_info"]["contenders"]["b"]["error"] == "FloatingPointError: the loss became nan"


def test_rounds_keep_to_the_time_but_for_the_least(outcome: dict[str, Any]) -> None:
    assert 5 <= outcome["long"]["stats"]["rounds"] <= 8


def test_what_is_made_too_late_is_left_out_and_the_principal_runs_last(outcome: dict[str, Any]) -> None:
    extra = outcome["late"]["extra_info"]
    assert extra["contenders"]["c"] == {"unavailable": "no time was left to make it"}
    assert extra["order"][-4:] == [*"baba"]
    assert outcome["late"]["stats"]["max"] < 0.1


def test_an_interrupt_costs_no_sample_that_was_taken(tmp_path: Path) -> None:
    code = f"""{BENCHMARK}
def bench_whole(benchmark):
    race(benchmark, {{'a': contender('a')}}, Effort(3))

def bench_cut(benchmark):
    calls = []
    def step():
        calls.append(0)
        if len(calls) == 13:  # after a warm-up and five alone, in the seventh round
            os.kill(os.getpid(), signal.SIGINT)
    race(benchmark, {{'a': contender('a'), 'b': lambda: Contender(step)}}, Effort(9))

def bench_late(benchmark):
    race(benchmark, {{'a': contender('a')}}, Effort(3))
"""
    found = outcome_of(tmp_path, code)
    assert len(found["whole"]["extra_info"]["contenders"]["a"]["samples"]) == 3
    assert "late" not in found
    samples = {name: c["samples"] for name, c in found["cut"]["extra_info"]["contenders"].items()}
    assert {name: len(values) for name, values in samples.items()} == {"a": 7, "b": 6}


class Death(BaseException):
    """In place of a signal that ends the process: nothing catches it."""


class Benchmark(SimpleNamespace):
    """What a race needs of pytest-benchmark's fixture."""

    def pedantic(self, function: Callable[..., None], args: Any, setup: Callable[[], None], rounds: int) -> None:
        for _ in range(rounds):
            setup()
            function(*args)


def new_benchmark() -> Any:
    names = {"group": None, "name": "a", "fullname": "a.py::a", "param": None}
    return Benchmark(extra_info={"case": "a case"}, enabled=True, **names)


def test_a_process_goes_on_after_what_ended_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice a contender ends its process; with cuDNN's convolutions alone it has another try."""

    def dies() -> Contender:
        raise Death

    def one() -> Contender:
        return Contender(lambda: None)

    seen: list[dict[str, Any]] = []
    for process, careful in enumerate((False, True, True, True)):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        benchmark = new_benchmark()
        effort = Effort(6, careful=careful, journal=Journal(tmp_path / "journal.json", lambda: {"machine": "this"}))
        with contextlib.suppress(Death, pytest.fail.Exception, pytest.skip.Exception):
            race(benchmark, {"a": one, "b": one, "dies": dies, "c": one}, effort, "cpu")
        report = json.loads((tmp_path / "journal.json").read_text())
        assert report["machine_info"] == {"machine": "this"}
        seen.append(report["benchmarks"][0]["extra_info"]["contenders"])
    first, second, third, fourth = seen
    assert len(first["b"]["samples"]) == 5
    assert not first["b"]["paired"]
    assert (first["dies"], second["dies"]) == ({"begun": 1}, {"begun": 2})
    assert "c" not in second
    assert third["dies"] == {"error": "it ended the process"}
    assert third["b"] == first["b"]  # taken over
    assert len(third["c"]["samples"]) == len(third["a"]["samples"]) == 6
    assert third["a"]["process"] == third["c"]["process"] == 2
    assert fourth == third  # there was nothing left to do


def test_on_a_gpu_times_are_of_the_device_and_a_lost_context_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    def synchronise() -> None:
        waits.append(time.perf_counter())
        time.sleep(0.01)

    def illegal() -> Contender:
        monkeypatch.setattr(events, "has_lost_context", lambda: True)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def leave(code: int) -> None:
        raise Death(code)

    monkeypatch.setattr(torch.cuda, "synchronize", synchronise)
    monkeypatch.setattr(os, "_exit", leave)
    benchmark, journal = new_benchmark(), tmp_path / "journal.json"
    makers = {"a": lambda: Contender(lambda: time.sleep(0.001)), "b": illegal, "c": lambda: Contender(lambda: None)}
    with pytest.raises(Death, match=str(events.DEAD)):
        race(benchmark, makers, Effort(5, journal=Journal(journal)), "cuda")
    (kept,) = json.loads(journal.read_text())["benchmarks"]
    a, b = kept["extra_info"]["contenders"].values()
    assert min(a["samples"]) >= 0.011
    assert 0.001 <= a["queue_seconds"] < 0.01
    assert b == {"begun": 1, "error": "RuntimeError: CUDA error: an illegal memory access was encountered"}


def test_steps_are_profiled_when_all_turns_were_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def profiled(step: Callable[[], object]) -> dict[str, int]:
        step()
        order.append("profiled")
        if order.count("profiled") == 1:
            raise RuntimeError("no profiler")
        return {"kernels": 7}

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(racing, "profiled", profiled)
    benchmark = new_benchmark()
    makers = {name: lambda name=name: Contender(lambda: order.append(name)) for name in "ab"}
    race(benchmark, makers, Effort(2), "cuda", warmup=1, alone=1)
    assert order == [*"aabb", *"abab", "a", "profiled", "b", "profiled"]
    a, b = benchmark.extra_info["contenders"].values()
    assert a["profile_error"] == "RuntimeError: no profiler"
    assert b["profile"] == {"kernels": 7}


def test_contenders_are_compared_within_a_process_where_there_is_one() -> None:
    def sampled(seconds: list[float], process: int, paired: bool = True) -> dict[str, Any]:
        return {"samples": seconds, "process": process, "paired": paired}

    naive = sampled([4.0, 8.0], 1) | {"others": [sampled([9.0, 9.0], 2)]}
    found = ratio({"naive": naive, "compiled": sampled([3.0, 3.0], 2)}, "naive", "compiled")
    assert found is not None
    assert (found.value, found.n) == (3.0, 2)
    apart = ratio({"naive": sampled([4.0, 8.0], 1), "big": sampled([2.0, 2.0], 3)}, "naive", "big")
    assert apart is not None
    assert (apart.value, apart.n) == (3.0, 1)  # of medians
    alone = ratio({"naive": sampled([4.0, 8.0], 1), "big": sampled([1.0, 2.0], 1, paired=False)}, "naive", "big")
    assert alone is not None
    assert alone.n == 1


def test_a_profile_counts_what_ran_on_the_device() -> None:
    def event(name: str, device: DeviceType, seconds: float = 0.0, annotation: bool = False) -> SimpleNamespace:
        time = SimpleNamespace(elapsed_us=lambda: 1e6 * seconds)
        return SimpleNamespace(name=name, device_type=device, time_range=time, is_user_annotation=annotation)

    found = summary(
        [
            event("aten::add", DeviceType.CPU, 9.0),
            event("cudaLaunchKernel", DeviceType.CPU, 9.0),
            event("cuLaunchKernelEx", DeviceType.CPU, 9.0),
            event("a", DeviceType.CUDA, 0.5),
            event("b", DeviceType.CUDA, 0.25),
            event("b", DeviceType.CUDA, 0.5),
            event("Optimizer.step", DeviceType.CUDA, 9.0, annotation=True),
        ]
    )
    assert found == {"busy_seconds": 1.25, "kernels": 3, "launches": 2, "top": [["b", 750.0, 2], ["a", 500.0, 1]]}


def test_every_benchmark_calls_a_race_as_it_is_called() -> None:
    """Most of them run on a GPU only, where a wrong argument would cost time on a card."""
    calls = 0
    for path in (ROOT / "benchmarks").glob("bench_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "race":
                inspect.signature(race).bind(*node.args, **{str(keyword.arg): None for keyword in node.keywords})
                calls += 1
    assert calls > 8


def test_nobody_there_is_a_skip(outcome: dict[str, Any]) -> None:
    assert "no contender can run here" in outcome["printed"]
    assert "3 failed, 5 passed, 1 skipped" in outcome["printed"]

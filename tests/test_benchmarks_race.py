"""Contenders take turns, each with all its samples, and whoever fails or cheats is found out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARK = """
import time
from benchmarks.race import Contender, UnavailableError, race

order = []

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


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A real run of pytest-benchmark over some races: its JSON, and what pytest printed."""
    folder = tmp_path_factory.mktemp("races")
    tests = {
        "order": "{'a': contender('a', 0.002), 'b': contender('b'), 'c': contender('c')}, 4, 2",
        "failing": "{'a': failing, 'b': contender('b'), 'c': unavailable}, 3, 1",
        "fast": "{'a': contender('a'), 'b': contender('b', floor=lambda: 5.0)}, 3, 1",
        "wrong": "{'a': contender('a'), 'b': contender('b', check=wrong)}, 3, 1",
        "long": "{'a': contender('a', 0.02), 'b': contender('b', 0.02)}, 1000, 1, 0.3",
        "patience": "{'a': contender('a'), 'b': contender('b', 0.1), 'c': contender('c')}, 2, 1, 9.0, 0.05, 'a'",
        "before": "{'a': contender('a', before=lambda: order.append('+')), 'b': contender('b')}, 2, 1",
        "none": "{'a': unavailable}, 3, 1",
    }
    code = BENCHMARK
    for name, arguments in tests.items():
        code += f"\ndef bench_{name}(benchmark):\n    order.clear()\n    try:\n        race(benchmark, {arguments})\n"
        code += "    finally:\n        benchmark.extra_info['order'] = order[:]\n"
    return outcome_of(folder, code)


def outcome_of(folder: Path, code: str) -> dict[str, Any]:
    (folder / "bench_races.py").write_text(code)
    options = ["--benchmark-enable", f"--benchmark-json={folder / 'out.json'}", "-c", str(ROOT / "pyproject.toml")]
    plugins = ["-p", "no:cacheprovider", "-p", "benchmarks.conftest"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plugins, "-rA", *options, str(folder / "bench_races.py")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        # One of xdist's workers writes no results, and takes itself for one by its environment.
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
    )
    assert (folder / "out.json").exists(), done.stdout + done.stderr
    benchmarks = json.loads((folder / "out.json").read_text())["benchmarks"]
    return {"printed": done.stdout, **{b["name"].removeprefix("bench_"): b for b in benchmarks}}


def test_they_take_turns_after_their_warm_up(outcome: dict[str, Any]) -> None:
    extra = outcome["order"]["extra_info"]
    assert extra["order"] == [*"aabbcc", *"abc", *"abc" * 4]
    assert [len(contender["samples"]) for contender in extra["contenders"].values()] == [4, 4, 4]
    assert min(extra["contenders"]["a"]["samples"]) >= 0.002
    assert min(extra["contenders"]["c"]["samples"]) < 0.002
    assert outcome["order"]["stats"]["rounds"] == 4


def test_what_a_step_uses_up_is_made_before_each(outcome: dict[str, Any]) -> None:
    assert outcome["before"]["extra_info"]["order"] == [*"+ab", *"+ab" * 3]


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
    extra = outcome["patience"]["extra_info"]
    assert extra["contenders"]["c"] == {"unavailable": "the 0 s for making contenders were over"}
    assert extra["order"][-4:] == [*"baba"]
    assert outcome["patience"]["stats"]["max"] < 0.1


@pytest.mark.parametrize("call", [1, 7], ids=["while warming up", "in the fifth round"])
def test_an_interrupt_costs_no_sample_that_was_taken(tmp_path: Path, call: int) -> None:
    code = f"""{BENCHMARK}
import os
import signal

def bench_whole(benchmark):
    race(benchmark, {{'a': contender('a')}}, 3, 1)

def bench_cut(benchmark):
    calls = []
    def step():
        calls.append(0)
        if len(calls) == {call}:
            os.kill(os.getpid(), signal.SIGINT)
    race(benchmark, {{'a': contender('a'), 'b': lambda: Contender(step)}}, 9, 1)

def bench_late(benchmark):
    race(benchmark, {{'a': contender('a')}}, 3, 1)
"""
    found = outcome_of(tmp_path, code)
    assert len(found["whole"]["extra_info"]["contenders"]["a"]["samples"]) == 3
    assert "late" not in found
    if call == 1:
        assert "cut" not in found
    else:
        samples = {name: c["samples"] for name, c in found["cut"]["extra_info"]["contenders"].items()}
        assert {name: len(values) for name, values in samples.items()} == {"a": 5, "b": 4}


def test_nobody_there_is_a_skip(outcome: dict[str, Any]) -> None:
    assert "no contender can run here" in outcome["printed"]
    assert "3 failed, 4 passed, 1 skipped" in outcome["printed"]

"""What every benchmark shares: how long to measure, and what machine it was, in the JSON."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastmerge.kernels.block_conv import choice_table, fixed_choice
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.effort import Effort
from benchmarks.journal import Journal
from fastmerge.environment import environment

_JOURNAL = pytest.StashKey[Journal]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastmerge")
    group.addoption("--rounds", type=int, help="samples of each contender; default 60 on a GPU, 15 on the CPU")
    group.addoption("--seconds", type=float, default=300.0, help="limit for the samples of one benchmark")
    group.addoption(
        "--until", type=float, default=math.inf, help="time of the monotonic clock when all must have ended"
    )
    group.addoption("--contenders", metavar="REGEX", help="measure only these")
    group.addoption("--careful", action="store_true", help="use cuDNN's convolutions alone")
    group.addoption("--journal", type=Path, metavar="FILE", help="write samples down as they come; goes on with a FILE")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_JOURNAL] = Journal(config.getoption("--journal"), machine)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Warnings are errors in tests; here compilers and the like may have their say."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, None, None]:
    """Drops what was interrupted before its first sample, over which pytest-benchmark would write down none of the others."""
    found = session.config._benchmarksession  # type: ignore[attr-defined]
    found.benchmarks[:] = [benchmark for benchmark in found.benchmarks if benchmark.stats.data]
    return (yield)


@pytest.fixture
def effort(request: pytest.FixtureRequest) -> Effort:
    names = ("rounds", "seconds", "until", "contenders", "careful")
    asked = {"asked" if name == "rounds" else name: request.config.getoption(name) for name in names}
    return Effort(**asked, journal=request.config.stash[_JOURNAL])


@pytest.fixture(autouse=True)
def written_down(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Iterator[None]:
    """Benchmarks without contenders are in the journal too."""
    yield
    if "contenders" not in benchmark.extra_info and benchmark.stats is not None:
        request.config.stash[_JOURNAL].keep(benchmark, benchmark.stats.stats.data)


@pytest.fixture(autouse=True)
def clean(effort: Effort) -> Iterator[None]:
    """The same random numbers for every benchmark, the fastest convolutions, and nothing left on the GPU."""
    torch.manual_seed(0)
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    with fixed_choice("split") if effort.careful else contextlib.nullcontext():
        yield
    torch.backends.cudnn.benchmark = before
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info |= machine()


def machine() -> dict[str, Any]:
    """What a run ran on, and the convolutions that it chose so far."""
    found: dict[str, Any] = {"fastmerge": _environment()}
    found["load_average"] = os.getloadavg()[2]  # of the last quarter of an hour: was the machine ours?
    if torch.cuda.is_available():
        # What whole steps ran: timed in this run, or by an earlier one with the same versions on the same card.
        card = torch.cuda.get_device_name()
        found["convolution_choices"] = [c for c in choice_table() if c["key"].startswith(f"{card} | ")]
    return found


@functools.cache
def _environment() -> dict[str, Any]:
    found = environment()
    # A copy of a checkout without its history does not know what it is of.
    return found | {"commit": found["commit"] or os.environ.get("FASTMERGE_COMMIT")}

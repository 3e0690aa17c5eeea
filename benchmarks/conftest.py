"""What every benchmark shares: how long to measure, and what machine it was, in the JSON."""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch
from fastmerge.kernels.block_conv import choice_table

from benchmarks.effort import Effort
from fastmerge.environment import environment


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastmerge")
    group.addoption("--rounds", type=int, help="samples of each contender; default 60 on a GPU, 15 on the CPU")
    group.addoption("--seconds", type=float, default=300.0, help="limit for the samples of one benchmark")
    group.addoption("--patience", type=float, default=math.inf, help="seconds after which no contender is made")
    group.addoption("--contenders", metavar="REGEX", help="measure only these")


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
    return Effort(*(request.config.getoption(f"--{name}") for name in ("rounds", "seconds", "patience", "contenders")))


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """The same random numbers for every benchmark, the fastest convolutions, and nothing left on the GPU."""
    torch.manual_seed(0)
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    yield
    torch.backends.cudnn.benchmark = before
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["fastmerge"] = environment()
    machine_info["load_average"] = os.getloadavg()[2]  # of the last quarter of an hour: was the machine ours?
    if torch.cuda.is_available():
        # What whole steps ran: timed in this run, or by an earlier one with the same versions on the same card.
        card = torch.cuda.get_device_name()
        found = [choice for choice in choice_table() if choice["key"].startswith(f"{card} | ")]
        machine_info["convolution_choices"] = found

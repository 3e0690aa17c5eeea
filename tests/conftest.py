"""What every test starts from: one thread, one seed, and one table of tolerances."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest
import torch

from cli_files import place, tree  # noqa: F401 (fixtures)
from fastmerge.wide import blueprint

try:
    import hypothesis
except ImportError:  # on a GPU machine without the development packages, the tests that need it are left out
    hypothesis = None

# Workers run beside each other and the tensors are small: threads would only wait for each other.
torch.set_num_threads(1)
# A shell starts jobs in the background, such as ``make test &`` in a script, with interrupts ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Each test of a file goes through the whole zoo: all of its networks' graphs are kept from one test to the next.
blueprint._MOST_KNOWN = 512

if hypothesis is not None:
    hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
    hypothesis.settings.load_profile("repeatable")

# Relative and absolute, for results of order 1 after a handful of operations.
TOLERANCES = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-2},
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Gives every test the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def tolerance() -> Callable[[torch.dtype], dict[str, float]]:
    """``torch.testing.assert_close(got, expected, **tolerance(dtype))``."""
    return TOLERANCES.__getitem__


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU where there is none, so that ``pytest -m gpu`` says so instead of failing."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))

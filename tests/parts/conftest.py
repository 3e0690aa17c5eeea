"""Fixtures that several files of parts share."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from block_conv_choices import as_on_a_gpu, no_choices, own_choices  # noqa: F401
from gate_checks import poisoned_memory  # noqa: F401
from killing import forkserver
from ptx_emulator import emulator  # noqa: F401


@pytest.fixture
def no_gate_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """In so few steps no gate gets anywhere."""
    for name in ("gate_warnings", "undecided_warnings"):
        monkeypatch.setattr(f"fastmerge.merging.stages.{name}", lambda *arguments: [])


@pytest.fixture
def forked_jobs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Jobs run in processes of the tests' server, which has imported what they need; a new process takes seconds for it."""
    with forkserver() as context:
        given = SimpleNamespace(get_context=lambda method: context)
        monkeypatch.setattr("fastmerge.experiments.workers.multiprocessing", given)
        yield

"""Fixtures of the block convolution's tests: what was measured before them plays no part in them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from fastmerge.kernels.block_conv import conv2d, formulas
from fastmerge.kernels.block_conv.choice import Memory, choices, set_measuring


@pytest.fixture
def no_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty memory of choices."""
    monkeypatch.setattr(choices, "_memory", Memory(read=True))


@contextlib.contextmanager
def through_the_operation(wanted: bool = True) -> Iterator[None]:
    """Within it, everything runs through what chooses an implementation, or nothing."""
    with mock.patch.object(conv2d, "worth_an_operation", return_value=wanted):
        choices._memory.remembered.clear()
        yield


@contextlib.contextmanager
def measuring_at_once(timer: Callable[[Any], float] = lambda run: 1.0) -> Iterator[None]:
    """Within it, every pass is measured when it is first met; nothing is stored."""
    options = {"_timer": timer, "_prepare": len, "_stored": False, "_measuring": True}
    with mock.patch.multiple(choices, due=lambda layer, batch: True, **options):
        yield
    choices._memory.remembered.clear()


@pytest.fixture
def as_on_a_gpu(no_choices: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets tensors of this machine through to the operations, with an empty memory of choices."""
    monkeypatch.setattr(formulas, "fetches_boxes", lambda device: True)


@pytest.fixture
def own_choices(no_choices: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty memory of choices and a cache of the test's own; nothing is measured unless asked for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    set_measuring(False)
    yield
    set_measuring(None)

"""Fixtures of the block convolution's tests: what was measured before them plays no part in them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastmerge.kernels.block_conv import formulas
from fastmerge.kernels.block_conv.choice import choices, set_measuring


@pytest.fixture
def no_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty memory of choices."""
    monkeypatch.setattr(choices, "_known", {})
    monkeypatch.setattr(choices, "_read", True)


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

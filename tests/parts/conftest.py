"""Fixtures that several files of parts share."""

import pytest

from block_conv_choices import as_on_a_gpu, no_choices, own_choices  # noqa: F401
from gate_checks import poisoned_memory  # noqa: F401
from ptx_emulator import emulator  # noqa: F401


@pytest.fixture
def no_gate_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """In so few steps no gate gets anywhere."""
    for name in ("gate_warnings", "undecided_warnings"):
        monkeypatch.setattr(f"fastmerge.merging.stages.{name}", lambda *arguments: [])

"""How long a big student takes to build: what the script refuses, and what the documentation says of its results."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks import building


def test_a_package_that_is_missing_is_said_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(building, "ProcessPoolExecutor", never)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "timm" else object())
    with pytest.raises(SystemExit) as refused:
        building.main([])
    assert str(refused.value).startswith("benchmarks.building needs timm, which is not installed; pip install timm")
    assert "\n" not in str(refused.value)
    with pytest.raises(AssertionError):
        building.main(["--networks", "resnet18", "--rounds", "1"])


def test_the_sentence_has_every_network() -> None:
    measured = {
        "environment": {"cpu": {"name": "A CPU"}, "torch": "2.0"},
        "networks": {
            name: {"cpu_seconds": [s, s, s], "median": s} for name, s in {"a": 1.04, "b": 2, "timm/c": 10}.items()
        },
    }
    text = building.sentence(measured)
    assert "takes 1.0 s for a, 2.0 s for b and 10.0 s for c: CPU time" in text
    assert "(A CPU, PyTorch 2.0), the median of 3 fresh processes" in text

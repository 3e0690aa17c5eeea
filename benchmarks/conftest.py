"""Puts what fastmerge knows of the machine into every benchmark's JSON: card, driver, versions, commit."""

from __future__ import annotations

from typing import Any

from fastmerge.environment import environment


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["fastmerge"] = environment()

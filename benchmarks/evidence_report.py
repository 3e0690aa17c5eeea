"""docs/evidence.md from the results of benchmarks/evidence.py."""

from __future__ import annotations

from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "evidence"

"""What ablations have measured, in a file that grows with every variant."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablation_variants import BASE, Variant
from fastmerge.big_student import BigStudent
from fastmerge.environment import environment
from fastmerge.reporting.results import write_json

Scores = dict[str, list[float]]


class Record:
    """Results as they come, in a file; what is in it is not measured again.

    Args:
        path: the JSON file.
        config: what the results depend on.

    Raises:
        ValueError: the file holds the results of another configuration.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.results: dict[str, Any] = {"config": config, "environment": environment(), "teachers": {}, "variants": {}}
        if path.exists():
            self.results = json.loads(path.read_text(encoding="utf-8"))
            if self.results["config"] != config:
                raise ValueError(f"{path} holds results of another configuration; remove it or choose another --out")

    @property
    def folder(self) -> Path:
        """For what else belongs to the results, beside the file."""
        return self.path.with_suffix("")

    def missing(self, chunk: Sequence[int], wanted: Sequence[Variant]) -> list[Variant]:
        """The variants that some replicate of a chunk has no result of."""
        found = self.results["variants"]
        return [v for v in wanted if not all(str(r) in found.get(v.name, {}).get("replicates", {}) for r in chunk)]

    def add(self, variant: Variant, chunk: Sequence[int], scores: Scores, opened: list[dict[str, float]]) -> None:
        """Writes down what a variant came to; ``scores`` has one number per replicate under each name."""
        entry = self.results["variants"].setdefault(variant.name, {"what": variant.what, "replicates": {}})
        if "compact_at" in variant.changes or not variant.merges:  # it has the draws of the base until then
            entry["compared_with"] = BASE
        for position, replicate in enumerate(chunk):
            found = {name: values[position] for name, values in scores.items()}
            entry["replicates"][str(replicate)] = found | {"open_probability": opened[position]}
        self.write()

    def add_teachers(self, chunk: Sequence[int], values: list[list[float]]) -> None:
        """Writes down how good the teachers of each replicate are."""
        for replicate, each in zip(chunk, values, strict=True):
            self.results["teachers"][str(replicate)] = each
        self.write()

    def take(self, path: Path) -> None:
        """Takes over what another file has and this one lacks.

        Raises:
            ValueError: it has another configuration, or other teachers, which nothing can be compared over.
        """
        other = json.loads(path.read_text(encoding="utf-8"))
        for key in ("config", "teachers"):
            if self.results[key] and other[key] != self.results[key]:
                raise ValueError(f"{path} has another {key} than {self.path}")
        self.results["teachers"] = other["teachers"]
        for name, entry in other["variants"].items():
            mine = self.results["variants"].setdefault(name, {**entry, "replicates": {}})
            mine["replicates"] = entry["replicates"] | mine["replicates"]
        self.write()

    def write(self) -> None:
        """Replaces the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.results)


def open_probabilities(big: BigStudent) -> dict[str, float]:
    """Mean P[g > 0] of each channel group."""
    return {name: round(mean.item(), 4) for name, mean in big.open_probabilities().items()}

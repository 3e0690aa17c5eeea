"""How much to measure, as asked for on the command line."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from benchmarks.journal import Journal

Value = TypeVar("Value")


@dataclass(frozen=True)
class Effort:
    """How much to measure.

    Attributes:
        asked: samples of each contender, or None for 60 on a GPU and 15 on the CPU.
        seconds: what the samples of one benchmark may take.
        until: the time, on the monotonic clock, when all must have ended.
        contenders: a regular expression that the contenders' names must contain, or None for all.
        careful: whether a contender that ended an earlier process has another try, with cuDNN's convolutions alone.
        journal: where samples are written down as they come.
    """

    asked: int | None = None
    seconds: float = math.inf
    until: float = math.inf
    contenders: str | None = None
    careful: bool = False
    journal: Journal = field(default_factory=Journal)

    def rounds(self, device: str) -> int:
        return self.asked if self.asked is not None else 60 if device == "cuda" else 15

    def warmup(self, device: str) -> int:
        """Steps before the first sample."""
        return 5 if device == "cuda" else 2

    @property
    def left(self) -> float:
        """Seconds until all must have ended."""
        return self.until - time.monotonic()

    def chosen(self, makers: Mapping[str, Value]) -> dict[str, Value]:
        """Those of the named things that were asked for."""
        return {name: m for name, m in makers.items() if self.contenders is None or re.search(self.contenders, name)}

"""How much to measure, as asked for on the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True)
class Effort:
    """How much to measure.

    Attributes:
        asked: samples of each contender, or None for 60 on a GPU and 15 on the CPU.
        seconds: what the samples of one benchmark may take.
        patience: after which no further contender is made, compiled and warmed up.
        contenders: a regular expression that the contenders' names must contain, or None for all.
    """

    asked: int | None
    seconds: float
    patience: float
    contenders: str | None

    def rounds(self, device: str) -> int:
        return self.asked if self.asked is not None else 60 if device == "cuda" else 15

    def warmup(self, device: str) -> int:
        """Steps before the first sample."""
        return 5 if device == "cuda" else 2

    def chosen(self, makers: Mapping[str, Value]) -> dict[str, Value]:
        """Those of the named things that were asked for."""
        return {name: m for name, m in makers.items() if self.contenders is None or re.search(self.contenders, name)}

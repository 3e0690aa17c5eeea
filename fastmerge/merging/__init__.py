"""From trained teachers to one student in one call: the merge stage, compression and fine-tuning."""

from __future__ import annotations

from fastmerge.merging.api import merge

__all__ = ["merge"]

"""The progress bar of jobs: epochs and the time left, samples per second, memory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

from fastmerge.merging.progress import peak_memory
from fastmerge.training.jobs import Job

Note = Callable[[dict[str, Any]], None]


class Shown:
    """A bar of epochs, and what it says beside them and the time left.

    Args:
        bar: of tqdm, which counts epochs of single networks.
        samples: in an epoch.

    Attributes:
        memory: the most bytes that each process that trains has held so far.
    """

    def __init__(self, bar: Any, samples: int) -> None:
        self.bar, self.samples = bar, samples
        self.memory: dict[int, int] = {}

    def figures(self) -> str:
        """Samples per second, all networks' together, once that is known; and memory, all processes' together."""
        rate = self.bar.format_dict["rate"]
        speed = f", {rate * self.samples:.0f} samples/s" if rate else ""
        return f"{speed}, {sum(self.memory.values()) / 2**30:.2f} GiB"


class JobBar:
    """Shows a job's epochs."""

    def __init__(self, job: Job, shown: Shown, note: Note | None = None) -> None:
        self.job, self.shown, self.bar, self.note = job, shown, shown.bar, note

    def epoch(self, stage: str, done: int, total: int, weight: int, values: dict[str, Any] | None = None) -> None:
        self.tell(os.getpid(), peak_memory(), stage, done, total, weight, values)

    def tell(
        self,
        process: int,
        memory: int,
        stage: str,
        done: int,
        total: int,
        weight: int,
        values: dict[str, Any] | None = None,
    ) -> None:
        """Of an epoch in a process, which has held so many bytes."""
        self.shown.memory[process] = memory
        self.bar.set_postfix_str(f"{self.job.strategy}: {stage} {done}/{total}{self.shown.figures()}", refresh=False)
        self.bar.update(weight)
        if values is not None and self.note is not None:
            self.note(values)

    def skip(self, stage: str, weight: int) -> None:
        if not self.bar.disable:
            self.bar.initial += weight  # the time left follows from what is done now
        self.bar.update(weight)

    def warn(self, message: str) -> None:
        with self.bar.external_write_mode():
            warnings.warn(f"{self.job.recipe.name}, {message}", stacklevel=2)

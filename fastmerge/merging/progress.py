"""The progress bar of a merge: stage, epoch, loss, accuracy, λ, P[g>0], images per second, memory and the time left."""

from __future__ import annotations

import resource
import sys
from statistics import fmean
from typing import Any

import torch

from fastmerge.evaluation import Tally, length_of
from fastmerge.history import EpochRecord, Score, mean_of

_TITLES = {"finetune": "fine-tune"}


class Progress:
    """A bar per stage on stderr, of a stack with means; a context manager, so that no bar outlives an error.

    Args:
        show: Whether to; None means where stderr is a terminal.
        title: What to call the work; None is the stage's name.
    """

    def __init__(self, show: bool | None = None, title: str | None = None) -> None:
        self._title = title
        self._disable = not (sys.stderr.isatty() if show is None else show)
        self._bar: Any = None  # of tqdm, which is imported where there is a bar to show
        self._figures: dict[str, str] = {}
        self._epochs = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def start(self, stage: str, epochs: int, loader: object, done: int = 0) -> None:
        """Begins the bar of a stage; it knows the time left where the loader has a length.

        Args:
            stage: What to call it.
            epochs: All of the stage's.
            loader: Of its batches.
            done: Epochs done before, in a stage that goes on.
        """
        if self._bar is not None:
            self._bar.close()
        if self._disable:
            return
        from tqdm import tqdm

        steps = length_of(loader)
        self._bar = tqdm(
            total=steps and epochs * steps,
            initial=done * (steps or 0),
            desc=self._title or _TITLES.get(stage, stage),
            unit="step",
            dynamic_ncols=True,
        )
        self._figures = {"epoch": f"{min(done + 1, epochs)}/{epochs}"}
        self._epochs = epochs

    def step(self, tally: Tally, *, fresh: bool) -> None:
        """Counts a step; a fresh tally, one just read from the device, refreshes loss, accuracy and speed."""
        if self._bar is None:
            return
        if fresh:
            self._show(tally.score(), tally.rate())
        self._bar.update()

    def refresh(self, tally: Tally, processes: int) -> None:
        """Shows loss, accuracy and speed of a tally that was read just now, which is of one of so many processes."""
        if self._bar is not None and tally.samples:
            self._show(tally.score(), processes * tally.rate())

    def end_epoch(self, record: EpochRecord) -> None:
        """Shows an epoch's figures; λ, the mean P[g>0] of the groups and the validation accuracy are known but then."""
        if self._bar is None:
            return
        self._figures["epoch"] = f"{min(record.epoch + 1, self._epochs)}/{self._epochs}"
        if record.lam is not None:
            self._figures["λ"] = f"{record.lam:.3g}"
        if record.open_probability:
            self._figures["P[g>0]"] = f"{fmean(map(mean_of, record.open_probability.values())):.3f}"
        if record.val is not None and record.val.accuracy is not None:
            self._figures["val"] = f"{mean_of(record.val.accuracy):.3f}"
        self._show(record.train, record.images_per_second)

    def _show(self, score: Score, rate: float) -> None:
        self._figures["loss"] = f"{mean_of(score.loss):.4f}"
        if score.accuracy is not None:
            self._figures["accuracy"] = f"{mean_of(score.accuracy):.3f}"
        self._figures["images/s"] = f"{rate:.0f}"
        self._figures["memory"] = f"{peak_memory() / 2**30:.2f} GiB"
        self._bar.set_postfix(self._figures)


def peak_memory() -> int:
    """The most bytes this process has held so far: of the GPU that it uses, else of the machine's memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

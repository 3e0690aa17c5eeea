"""Where a job is, on its way to and from checkpoints, so that a killed run goes on bit for bit."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch

from fastmerge.data.dataset import Dataset
from fastmerge.resuming.fingerprint import fingerprint
from fastmerge.resuming.snapshots import Snapshots
from fastmerge.resuming.stop_requests import StopRequests
from fastmerge.training.jobs import Job, Outcome
from fastmerge.training.scores import Curves
from fastmerge.training.stacked import StackTraining
from fastmerge.training.stacks import StacksTraining

_FINISHED = "finished"


class JobState:
    """The checkpoints of one job, in a directory of its own; where the job has none it does nothing.

    A job that goes on runs the same code again. Stages that were over train no epoch, the one it was in begins with its
    stack as it was, and everything comes after that. What a strategy recorded until then it gets back from
    :meth:`records`, and must not record anew.

    Args:
        job: Whose.
        data: The job's, part of what a checkpoint must fit.
        stop: Signals that ask to stop; met between epochs, after a checkpoint.

    Raises:
        ValueError: As :meth:`~fastmerge.resuming.snapshots.Snapshots.load`.
    """

    def __init__(self, job: Job, data: Dataset, stop: StopRequests) -> None:
        self.job, self.stop = job, stop
        self.snapshots: Snapshots | None = None
        self._loaded: dict[str, Any] | None = None
        if job.checkpoints is not None:
            directory = job.checkpoints / f"{job.strategy}-{job.replicates[0]}"
            self.snapshots = Snapshots(directory, _options(job, data))
            if job.resume:
                self._loaded = self.snapshots.load()
        self._started = self._saved_at = time.monotonic()
        self._seconds = 0.0 if self._loaded is None else float(self._loaded["seconds"])

    @property
    def seconds(self) -> float:
        """How long the job has taken, the time between interruption and going on left out."""
        return self._seconds + time.monotonic() - self._started

    @property
    def records(self) -> dict[str, Any] | None:
        """What the strategy had recorded, where the job goes on."""
        return None if self._loaded is None else self._loaded["records"]

    def outcome(self) -> Outcome | None:
        """What the job brought back, where it was finished."""
        if self._loaded is None or self._loaded["stage"] != _FINISHED:
            return None
        saved = dict(self._loaded["outcome"])
        curves = Curves(len(self.job.replicates))
        curves.restore(saved.pop("curves"))
        return Outcome(curves=curves, **saved)

    def finish(self, outcome: Outcome) -> None:
        """Keeps what the job brought back; it need not be done again."""
        if self.snapshots is not None:
            parts = {field.name: getattr(outcome, field.name) for field in dataclasses.fields(outcome)}
            parts["curves"] = outcome.curves.to_dict()
            self.snapshots.save({"stage": _FINISHED, "outcome": parts, "seconds": self.seconds})

    def is_over(self, stage: str) -> bool:
        """Whether a stage's epochs were all done before; stages are asked for in their order."""
        return self._loaded is not None and self._loaded["stage"] != stage

    def begin(self, training: StackTraining | StacksTraining) -> None:
        """Puts the stage that the job was in back to where it was."""
        if self._loaded is not None:
            training.load_state_dict(self._loaded["training"])
            _restore_random(self._loaded["random"], training.stack.device)
            self._loaded = None

    def end_epoch(
        self, stage: str, training: StackTraining | StacksTraining, records: Callable[[], dict[str, Any]]
    ) -> None:
        """Writes a checkpoint where it is time, the stage ends, or a signal came.

        Args:
            stage: Which.
            training: Of the stage, between two epochs.
            records: What the strategy has recorded.

        Raises:
            Interrupted: A signal came.
        """
        if self.snapshots is None:
            return
        due = time.monotonic() - self._saved_at >= self.job.checkpoint_seconds
        if due or self.stop.number is not None or training.done == training.stage.epochs:
            self.snapshots.save(
                {
                    "stage": stage,
                    "training": training.state_dict(),
                    "random": _random(training.stack.device),
                    "records": records(),
                    "seconds": self.seconds,
                }
            )
            self._saved_at = time.monotonic()
        self.stop.raise_if_any()


def _options(job: Job, data: Dataset) -> dict[str, Any]:
    return {
        "strategy": job.strategy,
        "replicates": list(job.replicates),
        "seed": job.seed,
        **job.recipe.config(),
        "data": fingerprint(vars(data)),
    }


def _random(device: torch.device) -> dict[str, Any]:
    """The default generators, from which gates are drawn; a stack's other randomness has generators of its own."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def _restore_random(states: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)

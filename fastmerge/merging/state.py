"""Everything that a merge needs to go on where it stopped, and when it is written down."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from fastmerge.checkpoints import Snapshots, loader_state, random_states, restore_loader_state, restore_random_states
from fastmerge.evaluation import Tally, length_of
from fastmerge.history import History, Stage
from fastmerge.processes import Processes, seed_of_rank
from fastmerge.stack import load_tensors, tensors_of


class MergeState:
    """The state of a merge on its way to and from checkpoints; without ``snapshots`` it does nothing.

    Within an epoch the place in the data is the number of steps done and the random states at the epoch's start: the
    loader then gives the same batches again, of which those done are passed over.

    Args:
        snapshots: Where checkpoints are, or None.
        seconds: At least so long between two of them; the end of a stage always has one.
        device: Of the merge.
        loader: The training data.
        history: Restored in place.
        processes: That merge together: the first writes, and a checkpoint holds the random states of each. Going on
            with fewer or more of them, the new ones get random states of their own, and within an epoch the place in the
            data is the nearest.
        accumulate: Batches per step; a merge may go on with fewer or more of them in a step.
    """

    def __init__(
        self,
        snapshots: Snapshots | None,
        seconds: float,
        device: torch.device,
        loader: Iterable[Any],
        history: History,
        processes: Processes,
        accumulate: int = 1,
    ) -> None:
        self.snapshots, self.seconds, self.device, self.loader = snapshots, seconds, device, loader
        self.history, self.processes, self.accumulate = history, processes, accumulate
        self._loaded: dict[str, Any] | None = None
        self._saved_at = time.monotonic()
        self._now: dict[str, Any] = {}
        self._at_start: dict[str, Any] = {}

    def load(self) -> None:
        """Reads the last good checkpoint, if there is one, for the stages to come.

        Raises:
            ValueError: As :meth:`Snapshots.load`.
        """
        if self.snapshots is not None:
            self._loaded = self.processes.done_by_first(self.snapshots.load)
        if self._loaded is not None:
            self.history.restore(self._loaded["history"])

    @property
    def stage(self) -> Stage | None:
        """The stage in which the loaded checkpoint goes on."""
        return None if self._loaded is None else self._loaded["stage"]

    def saved(self, stage: Stage) -> tuple[int, dict[str, Tensor]]:
        """The network that the loaded checkpoint has of a stage: the epochs before it, and its tensors; 0 and none without."""
        if self._loaded is None or self._loaded["stage"] != stage:
            return 0, {}
        return self._loaded.get("first", 0), self._loaded["network"]

    def begin(self, stage: Stage, network: nn.Module, parts: dict[str, Any], total: int, first: int = 0) -> int:
        """Begins a stage, from the loaded checkpoint where it is of this stage; returns how many epochs are done.

        Args:
            stage: Which.
            network: Trained in it.
            parts: What else changes with it, by name: optimizers, λ, a scheduler, all with ``state_dict``.
            total: Epochs of the stage; all of them count as done where it was ended early.
            first: Those of them before this network's.

        Raises:
            ValueError: The checkpoint has the state of another kind of part, such as another scheduler.
        """
        self.network: Any = network
        self.parts = parts
        self._now = {"stage": stage, "epoch": first, "first": first, "ended": False}
        loaded = self._loaded
        if loaded is None or loaded["stage"] != stage:
            return first
        big: Any = network
        if stage == "merge":
            if loaded["linked"]:
                big.link()
            if left := big.candidates_in(loaded["network"]):
                big.keep_only(left)
        load_tensors(network, loaded["network"])
        for name, part in parts.items():
            then, now = loaded.get("kinds", {}).get(name), type(part).__name__
            if then not in (None, now):
                raise ValueError(
                    f"the checkpoint has the state of a {then} as the {name} of the {stage} stage, and this merge makes a "
                    f"{now}; go on with the same one{self.whereabouts()}"
                )
            part.load_state_dict(loaded["parts"][name])
        self._now["epoch"] = loaded["epoch"]
        if not loaded["step"]:
            mine = self._mine(loaded)
            self._resume_loader(mine["random"], mine["loader"])
            self._loaded = None
        self._now["ended"] = loaded["ended"]
        return total if loaded["ended"] else int(loaded["epoch"])

    def batches(self, tally: Tally) -> Iterator[Any]:
        """The epoch's batches that are left, with the tally and the random states as they were."""
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            if self.snapshots is not None:
                self._at_start = {"random": random_states(self.device), "loader": loader_state(self.loader)}
            yield from self.loader
            return
        mine = self._mine(loaded)
        self._at_start = mine["at_start"]
        self._resume_loader(self._at_start["random"], self._at_start["loader"])
        tally.load_state_dict(mine["tally"])
        batches = iter(self.loader)
        done = sum(1 for _ in islice(batches, tally.steps))
        if done < tally.steps:
            raise ValueError(
                f"the checkpoint was written after {tally.steps} steps of an epoch, and an epoch now has "
                f"{done}; go on with the same data and batch size"
            )
        restore_random_states(mine["random"], self.device)
        yield from batches

    def is_due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return self.snapshots is not None and time.monotonic() - self._saved_at >= self.seconds

    def end_epoch(self, epoch: int, last: bool, ended: bool = False) -> None:
        """Counts an epoch, and writes a checkpoint where it is time or the stage ends, by itself or before its time."""
        self._now |= {"epoch": epoch, "ended": ended}
        (due,) = self.processes.most(self.is_due() or last or ended)
        if due:
            self.save(random_states(self.device))

    def save(self, random: dict[str, Any], tally: Tally | None = None) -> None:
        """Writes a checkpoint.

        Args:
            random: The random states to go on with.
            tally: Of the epoch in which this is, read up to date; None between epochs.
        """
        if self.snapshots is None:
            return
        own: dict[str, Any] = {"random": random, "loader": loader_state(self.loader)}
        if tally is not None:
            own |= {"tally": tally.state_dict(), "at_start": self._at_start}
        each = self.processes.gather(own)
        if self.processes.is_first:
            self.snapshots.save(
                {
                    **self._now,
                    "step": 0 if tally is None else tally.steps,
                    "linked": self._now["stage"] == "merge" and self.network.linked,
                    "network": tensors_of(self.network),
                    "parts": {name: part.state_dict() for name, part in self.parts.items()},
                    "kinds": {name: type(part).__name__ for name, part in self.parts.items()},
                    "processes": each,
                    "length": length_of(self.loader),
                    "accumulate": self.accumulate,
                    "history": self.history.record(),
                }
            )
        self._saved_at = time.monotonic()

    def _mine(self, loaded: dict[str, Any]) -> dict[str, Any]:
        """What this process needs to go on, from what each of those then had."""
        each, rank, size = loaded["processes"], self.processes.rank, self.processes.size
        mine: dict[str, Any] = dict(each[min(rank, len(each) - 1)])
        if rank >= len(each):
            mine["random"] = _of_another_rank(mine["random"], rank)
        then = loaded["accumulate"]
        if "tally" in mine and (size, self.accumulate) != (len(each), then):
            length = length_of(self.loader)
            steps = mine["tally"]["steps"] * (length / loaded["length"] if length and loaded["length"] else 1)
            mine["tally"] = _shared_tally([one["tally"] for one in each], size)
            most = round(steps) if length is None else length  # the epoch's last step may be of fewer batches
            mine["tally"]["steps"] = min(self.accumulate * round(steps / self.accumulate), most)
        return mine

    def whereabouts(self) -> str:
        """Where the last checkpoint is, as an end of a sentence."""
        files = [] if self.snapshots is None else self.snapshots.files()
        return f"; the last checkpoint is {files[-1]}" if files else ""

    def _resume_loader(self, random: dict[str, Any], loader: dict[str, Any]) -> None:
        restore_random_states(random, self.device)
        restore_loader_state(self.loader, loader)


def _of_another_rank(states: dict[str, Any], rank: int) -> dict[str, Any]:
    """Random states for a process that had none, made from another's."""
    seed = seed_of_rank(states["torch"], rank)
    states = states | {"torch": torch.Generator().manual_seed(seed).get_state()}
    if "cuda" in states:
        del states["cuda"]
        torch.cuda.manual_seed(seed)
    return states


def _shared_tally(each: list[dict[str, Any]], size: int) -> dict[str, Any]:
    """The tally of one of another number of processes: the mean of those there were."""
    part = 1 / size
    names = each[0]["sums"]
    return {
        "samples": round(sum(one["samples"] for one in each) * part),
        "sums": {name: sum(one["sums"][name] for one in each) * part for name in names},
        "seconds": each[0]["seconds"],
    }

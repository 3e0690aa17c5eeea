"""The processes that train one network together (DistributedDataParallel): which one this is, and what they tell each other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Found = TypeVar("Found")


class ProcessLostError(RuntimeError):
    """Another process of the run ended, or can't be reached."""


_PATIENCE = timedelta(days=365)  # of groups that wait for each other; a process that dies is noticed all the same


class Processes:
    """The default process group of torch.distributed where there is one, else this process alone.

    Every method that tells or asks must be called by all processes, in the same order, and raises ProcessLostError where
    another one is gone.

    Args:
        device: Where tensors of messages go, for backends that know one kind of device.
        group: Some of the processes, as torch.distributed made it, instead of all.

    Attributes:
        rank, size: Which process this is, and of how many.
    """

    def __init__(self, device: torch.device, group: Any = None) -> None:
        self.device, self.group = device, group
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(group), dist.get_world_size(group)) if together else (0, 1)
        self._first = 0 if group is None else dist.get_global_rank(group, 0)

    @classmethod
    def alone(cls, device: torch.device) -> Processes:
        """This process by itself, whatever group it is in."""
        found = cls(device)
        found.rank, found.size = 0, 1
        return found

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Sums, in float64, of what each process has."""
        return self._reduced(values, dist.ReduceOp.SUM) if self.size > 1 else values

    def most(self, *values: float) -> list[float]:
        """The largest of what each process has, value by value."""
        return self._reduced(list(values), dist.ReduceOp.MAX) if self.size > 1 else list(values)

    def gather(self, value: Any) -> list[Any]:
        """What each process has, in the order of ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self.watched():
            dist.all_gather_object(found, value, group=self.group)
        return found

    def joined(self, values: dict[str, Any]) -> dict[str, Any]:
        """The entries of all processes' dictionaries in one, sorted."""
        return dict(sorted(entry for each in self.gather(values) for entry in each.items()))

    def from_first(self, value: Any) -> Any:
        """What the first process has."""
        if self.size == 1:
            return value
        values = [value]
        with self.watched():
            dist.broadcast_object_list(values, src=self._first, group=self.group)
        return values[0]

    def done_by_first(self, work: Callable[[], Found]) -> Found:
        """What some work of the first process comes to, for all; where it raises a ValueError or OSError there, all do."""
        found: Any = None
        problem = None
        if self.is_first:
            try:
                found = work()
            except (ValueError, OSError) as error:
                problem = error
        found, problem = self.from_first((found, problem))
        if problem is not None:
            raise problem
        return found

    def share_buffers(self, network: nn.Module) -> None:
        """Gives every process the first one's buffers, such as running statistics, of which each has its own."""
        if self.size == 1:
            return
        with self.watched():
            for tensor in network.buffers():
                whole = tensor.detach().contiguous()  # messages know no strides
                dist.broadcast(whole, src=self._first, group=self.group)
                if whole.data_ptr() != tensor.data_ptr():
                    tensor.detach().copy_(whole)

    @contextlib.contextmanager
    def together(self, *kinds: type[Exception]) -> Iterator[None]:
        """Where exceptions of these kinds are raised within this context, all processes raise one, at its end: the one whose
        arguments are the least, such as the first step's.
        """
        problem = None
        try:
            yield
        except kinds as error:
            problem = error
        if self.most(problem is not None)[0]:
            raise min((error for error in self.gather(problem) if error is not None), key=lambda error: error.args)

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network with gradients averaged over the processes; itself where there is one process.

        Every process gets the first one's parameters. To be wrapped anew when parameters change their shapes.
        """
        if self.size == 1:
            return network
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=ids, process_group=self.group)

    def split(self, parts: int) -> Split:
        """Divides the processes into so many groups of equal size, neighbours together.

        Raises:
            ValueError: They can't be divided evenly.
        """
        size, rest = divmod(self.size, parts)
        if rest or not size:
            raise ValueError(
                f"{parts} groups of equal size need a multiple of {parts} processes; there are {self.size}"
            )
        groups = [dist.new_group(range(part * size, (part + 1) * size)) for part in range(parts)]
        mine = self.rank // size
        return Split(mine, size, Processes(self.device, groups[mine]), self.patient())

    def patient(self) -> Processes:
        """All processes, as a group in which one may wait for another however long, without a GPU."""
        return Processes(torch.device("cpu"), dist.new_group(backend="gloo", timeout=_PATIENCE))

    def check_same(self, what: str, value: str) -> None:
        """Raises where the processes don't have the same.

        Raises:
            ValueError: They don't.
        """
        found = self.gather(value)
        if any(other != found[0] for other in found):
            raise ValueError(f"all processes must have the same {what}; they have {', '.join(map(str, found))}")

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Turns the errors of a message that does not arrive into one that says so.

        Raises:
            ProcessLostError: A process ended or hangs.
        """
        try:
            yield
        except ProcessLostError:
            raise
        except RuntimeError as error:
            if self.size > 1 and _is_of_a_message(error):
                raise ProcessLostError(
                    f"process {self.rank} of {self.size} lost another one, which ended or hangs "
                    f"({str(error).splitlines()[0]}); its own message tells why"
                ) from error
            raise

    def _reduced(self, values: list[float], operation: Any) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        with self.watched():
            dist.all_reduce(tensor, operation, group=self.group)
        found: list[float] = tensor.tolist()
        return found


def share_of(batch_size: int, processes: int, accumulate: int = 1, sets: int = 1) -> int:
    """Images of each process in each part of a step.

    Args:
        batch_size: Images in the step, of all processes together.
        processes: How many there are.
        accumulate: Parts of the step.
        sets: Data sets that each part has equally many images of.

    Raises:
        ValueError: They can't be shared out evenly.
    """
    shares = processes * accumulate * sets
    share, rest = divmod(batch_size, shares)
    if rest or not share:
        of_sets = f" of {sets} data sets" if sets > 1 else ""
        raise ValueError(
            f"a batch of {batch_size} can't be shared out evenly to {processes} processes times {accumulate} "
            f"accumulated batches{of_sets}; it needs a multiple of {shares}"
        )
    return share


@dataclass(frozen=True)
class Split:
    """All processes, divided into groups.

    Attributes:
        number: Of this process's group.
        size: Processes in each.
        own: The processes of this one's group.
        waiting: All processes, for a group that has to wait for another, however long.
    """

    number: int
    size: int
    own: Processes
    waiting: Processes

    def first_of(self, number: int) -> int:
        """The rank of a group's first process among all."""
        return number * self.size


def without_averaging(model: nn.Module, wanted: bool) -> AbstractContextManager[None]:
    """Within this context backward adds up gradients in each process alone, until the last part of a step."""
    if wanted and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def seed_of_rank(states: Tensor, rank: int) -> int:
    """A seed for a process that has no random state of its own yet, from another's."""
    digest = int(states.long().mul(torch.arange(1, len(states) + 1, device="cpu")).sum())
    return (digest * 1_000_003 + rank) % 2**63


def _is_of_a_message(error: RuntimeError) -> bool:
    text = str(error)
    return isinstance(error, getattr(dist, "DistError", ())) or any(
        part in text for part in ("gloo", "NCCL", "Connection closed", "Connection reset", "Socket", "Broken pipe")
    )

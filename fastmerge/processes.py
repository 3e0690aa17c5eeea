"""The processes that train one network together (DistributedDataParallel): which one this is, and what they tell each other."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class ProcessLostError(RuntimeError):
    """Another process of the run ended, or can't be reached."""


class Processes:
    """The default process group of torch.distributed where there is one, else this process alone.

    Every method that tells or asks must be called by all processes, in the same order.

    Args:
        device: Where tensors of messages go, for backends that know one kind of device.

    Attributes:
        rank, size: Which process this is, and of how many.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    def share(self, batch_size: int, accumulate: int = 1) -> int:
        """Images of each process in each part of a step, of so many in the step.

        Raises:
            ValueError: They can't be shared out evenly.
        """
        share, rest = divmod(batch_size, self.size * accumulate)
        if rest or not share:
            raise ValueError(
                f"a batch of {batch_size} can't be shared out evenly to {self.size} processes times {accumulate} "
                f"accumulated batches; it needs a multiple of {self.size * accumulate}"
            )
        return share

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
        dist.all_gather_object(found, value)
        return found

    def from_first(self, value: Any) -> Any:
        """What the first process has."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def share_buffers(self, network: nn.Module) -> None:
        """Gives every process the first one's buffers, such as running statistics, of which each has its own."""
        if self.size > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, src=0)

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network with gradients averaged over the processes; itself where there is one process.

        Every process gets the first one's parameters. To be wrapped anew when parameters change their shapes.
        """
        if self.size == 1:
            return network
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=ids)

    def check_same(self, what: str, value: str) -> None:
        """Raises where the processes don't have the same.

        Raises:
            RuntimeError: They don't.
        """
        found = self.gather(value)
        if any(other != found[0] for other in found):
            raise RuntimeError(f"all processes must have the same {what}; they have {', '.join(map(str, found))}")

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Turns the errors of a message that does not arrive into one that says so.

        Raises:
            ProcessLostError: A process ended or hangs.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size > 1 and _is_of_a_message(error):
                raise ProcessLostError(
                    f"process {self.rank} of {self.size} lost another one, which ended or hangs "
                    f"({str(error).splitlines()[0]}); its own message tells why"
                ) from error
            raise

    def _reduced(self, values: list[float], operation: Any) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, operation)
        found: list[float] = tensor.tolist()
        return found


def without_averaging(model: nn.Module, wanted: bool) -> AbstractContextManager[None]:
    """Within this context backward adds up gradients in each process alone, until the last part of a step."""
    if wanted and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def join_processes(device: str) -> tuple[str, Processes]:
    """Joins the processes that ``torchrun`` started; does nothing where it did not.

    Args:
        device: "cuda" is the card of this process's place on its machine.

    Returns:
        The device of this process, and the processes.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return device, Processes(torch.device("cpu"))
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return device, Processes(torch.device(device))


def leave_processes() -> None:
    """Undoes :func:`join_processes`."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def seed_of_rank(states: Tensor, rank: int) -> int:
    """A seed for a process that has no random state of its own yet, from another's."""
    digest = int(states.long().mul(torch.arange(1, len(states) + 1)).sum())
    return (digest * 1_000_003 + rank) % 2**63


def _is_of_a_message(error: RuntimeError) -> bool:
    text = str(error)
    return isinstance(error, getattr(dist, "DistError", ())) or any(
        part in text for part in ("gloo", "NCCL", "Connection closed", "Connection reset", "Socket", "Broken pipe")
    )

"""What a method costs: counted operations, in epochs of training one teacher, and memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class _Counting(TorchDispatchMode):
    """Counts operations as ``torch.utils.flop_counter`` does, without its hooks on all modules."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None and not _is_meta(out):  # a trace computes nothing
            self.operations += count(*args, **(kwargs or {}), out_val=out)
        return out


def _is_meta(out: Any) -> bool:
    return any(isinstance(y, Tensor) and (y.is_meta or isinstance(y, FakeTensor)) for y in pytree.tree_leaves(out))


class Meter:
    """Counts operations of matrix products and convolutions within its context.

    To watch each operation makes small ones slow, so that training is left out, by :meth:`paused`, and added by what one step
    takes, by :meth:`add_training`.

    Attributes:
        operations: counted so far.
    """

    _running: ClassVar[list[Meter]] = []

    def __init__(self) -> None:
        self.operations = 0.0
        self._mode: _Counting | None = None

    def __enter__(self) -> Meter:
        Meter._running.append(self)
        self._start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()
        Meter._running.remove(self)

    @classmethod
    def current(cls) -> Meter | None:
        """The innermost that runs."""
        return cls._running[-1] if cls._running else None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within, nothing is watched."""
        self._stop()
        try:
            yield
        finally:
            self._start()

    def add_training(self, network: nn.Module, batches: Iterable[Any], epochs: float) -> None:
        """Adds what training takes: the operations of a step, times the steps."""
        if epochs:
            self.operations += epochs * step_operations(network, batches) * steps_of(batches)

    def add_forward(self, network: nn.Module, batches: Iterable[Any], epochs: float) -> None:
        """Adds what forward passes over the data take."""
        self.operations += epochs * step_operations(network, batches, backward=False) * steps_of(batches)

    def epochs(self, teacher: nn.Module, batches: Iterable[Any]) -> float:
        """The operations in epochs of training a teacher on these batches."""
        return self.operations / (step_operations(teacher, batches) * steps_of(batches)) if self.operations else 0.0

    def _start(self) -> None:
        self._mode = _Counting()
        self._mode.__enter__()

    def _stop(self) -> None:
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
            self.operations += self._mode.operations
            self._mode = None


@contextmanager
def unwatched() -> Iterator[Meter | None]:
    """Within, the meter that runs is paused, if one does."""
    meter = Meter.current()
    if meter is None:
        yield None
        return
    with meter.paused():
        yield meter


def step_operations(network: nn.Module, batches: Iterable[Any], *, backward: bool = True) -> float:
    """Operations of a training step on the first batch, or of its forward pass alone."""
    clone = copy.deepcopy(network).train().requires_grad_(backward)
    device = next(clone.parameters()).device
    devices = [device] if device.type == "cuda" else []
    inputs, _ = next(iter(batches))
    inputs = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    with torch.random.fork_rng(devices), torch.enable_grad(), _Counting() as counter:
        outputs = pytree.tree_leaves(clone(*(x.to(device) for x in inputs)))
        if backward:
            torch.autograd.backward([y.sum() for y in outputs if isinstance(y, Tensor) and y.requires_grad])
    return float(counter.operations)


def steps_of(batches: Iterable[Any]) -> int:
    """Steps of an epoch."""
    return len(batches) if isinstance(batches, Sized) else sum(1 for _ in batches)


@contextmanager
def peak_memory(networks: Sequence[nn.Module]) -> Iterator[Callable[[], int | None]]:
    """Gives a function that says, afterwards, how many bytes were used at the peak beyond those before; None if unknown."""
    device = next(networks[0].parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    try:
        _CLEAR.write_text("5")  # the peak counts from here
        resident = _resident("VmRSS")
    except (OSError, StopIteration):
        yield lambda: None
        return
    yield lambda: max(_resident("VmHWM") - resident, 0)


def _resident(name: str) -> int:
    return int(next(line for line in _STATUS.read_text().splitlines() if line.startswith(name)).split()[1]) << 10

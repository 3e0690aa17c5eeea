"""Executes a kernel: all threads of many programs at once, each register an array over them.

Threads run in step. Where they part at a branch, those that are least far in the text go first, until they meet the others
again; a barrier keeps those that have arrived. So whoever waits for what can't come any more is found out.

Dims: L lanes = P programs × T threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ptx_emulator.hazards import Hazards
from ptx_emulator.memory import GlobalMemory, SharedMemory, TensorMap
from ptx_emulator.parse import Kernel

WARP = 32
# In place of an instruction to go on at: the lanes wait at several, or have ended.
PARTED = -1
# Lanes at a time, and bytes of their registers: more of them take longer than what NumPy costs by the call.
_MOST_LANES = 8192
_MOST_BYTES = 2**26
_MOST_INSTRUCTIONS = 3_000_000

Step = Callable[["Machine", "np.ndarray | None"], None]


class EmulationError(RuntimeError):
    """What would hang a device or is undefined there."""


@dataclass
class Launch:
    """What a launch hands over.

    Attributes:
        kernel: the function.
        grid: programs along x, y and z.
        threads: of a program.
        shared: bytes of shared memory of a program.
        parameters: bits of each parameter, by name: a tensor map's are its address.
        maps: the tensor maps, by address.
        memory: the tensors.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    threads: int
    shared: int
    parameters: dict[str, int]
    maps: dict[int, TensorMap]
    memory: GlobalMemory


def run(launch: Launch, steps: list[Step]) -> None:
    """Executes all programs of a launch, many at a time."""
    places = [(x, y, z) for z, y, x in itertools.product(*(range(size) for size in reversed(launch.grid)))]
    lane_bytes = sum(-(-width // 8) * count for width, count in launch.kernel.counts.items())
    most = max(1, min(_MOST_LANES, _MOST_BYTES // lane_bytes) // launch.threads)
    with np.errstate(all="ignore"):
        for first in range(0, len(places), most):
            Machine(launch, np.array(places[first : first + most], np.uint32)).run(steps)


@dataclass
class Barrier:
    """An mbarrier of each program: how many arrivals and bytes its current phase waits for, and that phase's number."""

    count: int
    arrivals: np.ndarray
    bytes: np.ndarray
    phase: np.ndarray
    valid: np.ndarray

    def complete(self) -> None:
        done = self.valid & (self.arrivals == 0) & (self.bytes == 0)
        self.phase[done] += 1
        self.arrivals[done] = self.count


@dataclass
class Group:
    """Lanes that wait at one instruction, and whether they can't go on before others come."""

    lanes: np.ndarray
    blocked: bool = False


class _Views(dict):
    """The registers of a width as arrays of a type of that width, by the type."""

    def __init__(self, banks: dict[int, np.ndarray]) -> None:
        super().__init__()
        self._banks = banks

    def __missing__(self, dtype: type) -> list[np.ndarray]:
        width = 1 if dtype is np.bool_ else 8 * np.dtype(dtype).itemsize
        self[dtype] = list(self._banks[width].view(dtype))
        return self[dtype]


class Machine:
    """Programs of one launch that run together.

    Args:
        launch: what is launched.
        places: x, y and z of each program in the grid.
    """

    def __init__(self, launch: Launch, places: np.ndarray) -> None:
        self.launch, self.programs, self.threads = launch, len(places), launch.threads
        self.lanes = self.programs * self.threads
        self.program = np.repeat(np.arange(self.programs), self.threads)
        self.thread = np.tile(np.arange(self.threads, dtype=np.uint32), self.programs)
        self.place = np.repeat(places, self.threads, 0).T.copy()
        self.shared = SharedMemory(self.programs, launch.shared)
        self.hazards = Hazards(launch.kernel, self.programs, self.threads, self.shared.stride)
        self.barriers: dict[int, Barrier] = {}
        # What nobody has written is NaN, of every width.
        self.banks = {
            width: np.full((max(count, 1), self.lanes), fill, dtype)
            for (width, count), fill, dtype in zip(
                sorted(launch.kernel.counts.items()),
                (False, 0xFFFF, 0xFFFFFFFF, 2**64 - 1),
                (np.bool_, np.uint16, np.uint32, np.uint64),
                strict=True,
            )
        }
        self.views = _Views(self.banks)
        self.alive = np.ones(self.lanes, bool)
        self.waiting: dict[int, Group] = {}
        # The instruction that is executed, by which lanes, and where they go on unless it is the next.
        self.at, self.active, self.jump = 0, None, None

    def run(self, steps: list[Step]) -> None:
        kernel, at, lanes, executed = self.launch.kernel, 0, None, 0
        while True:
            # Whoever waits further on is met again there.
            stop = min((other for other in self.waiting if other > at), default=len(steps))
            while at < stop:
                executed += 1
                self.at, self.active = at, lanes
                try:
                    steps[at](self, lanes)
                except Exception as error:
                    where = f"{kernel.name}, {kernel.instructions[at].line}, {kernel.instructions[at]}"
                    raise type(error)(f"{where}: {error}") from error
                if self.jump is not None:
                    at, self.jump = self.jump, None
                    break
                at += 1
            if at == len(steps):
                raise EmulationError(f"{kernel.name} ends without a return")
            if executed > _MOST_INSTRUCTIONS:
                raise EmulationError(f"{kernel.name} still runs after {executed} instructions")
            if at != PARTED:
                if not self.waiting:
                    continue
                self.wait(at, self.lanes_of(lanes))
            if not self.waiting:
                return
            at = min((at for at, group in self.waiting.items() if not group.blocked), default=PARTED)
            if at == PARTED:
                held = "; ".join(
                    f"{group.lanes.sum()} at {kernel.instructions[at]} ({kernel.instructions[at].line})"
                    for at, group in self.waiting.items()
                )
                raise EmulationError(f"{kernel.name} hangs, threads wait for ever: {held}")
            mask = self.waiting.pop(at).lanes
            lanes = None if mask.all() else mask

    def lanes_of(self, mask: np.ndarray | None) -> np.ndarray:
        return np.ones(self.lanes, bool) if mask is None else mask

    def wait(self, at: int, lanes: np.ndarray, blocked: bool = False) -> None:
        """Lets lanes go on at an instruction later, or once others have come there."""
        group = self.waiting.get(at)
        self.waiting[at] = Group(lanes if group is None else group.lanes | lanes, blocked)

    def hold(self, lanes: np.ndarray) -> None:
        """Keeps some of the lanes here, until others come to this instruction or an mbarrier's phase ends."""
        self.wait(self.at, lanes, blocked=True)
        self._part(lanes)

    def end(self, lanes: np.ndarray) -> None:
        """Lets lanes end. Barriers wait for them no more."""
        self.alive &= ~lanes
        ended = np.flatnonzero(~self.alive.reshape(self.programs, -1).any(1))
        self.hazards.end(ended)
        self.release()
        self._part(lanes)

    def _part(self, lanes: np.ndarray) -> None:
        rest = self.lanes_of(self.active) & ~lanes
        if rest.any():
            self.wait(self.at + 1, rest)
        self.jump = PARTED

    def release(self) -> None:
        """Lets those look again who were kept."""
        for group in self.waiting.values():
            group.blocked = False

    def check_whole(self, mask: np.ndarray | None, size: int) -> np.ndarray | None:
        """Which warps, or groups of ``size`` threads, execute an instruction that takes all threads of one; None for all."""
        if mask is None:
            return None
        groups = mask.reshape(-1, size)
        some = groups.any(1)
        if (some != groups.all(1)).any():
            raise EmulationError(f"only some of {size} threads come to an instruction that takes all of them")
        return some

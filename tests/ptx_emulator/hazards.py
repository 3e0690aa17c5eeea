"""Shared-memory hazards: accesses whose order nothing guarantees, although the emulator's own order may give the right result.

Between two barriers, what one warp writes no other may touch, and what one reads no other may write. Copies by TMA and by
``cp.async``, stores by TMA, and wgmma's reads go on by themselves: what they touch is free once they were waited for, and for
other warps once a barrier came after that. What threads wrote is seen by TMA and wgmma after a proxy fence.

Within a warp, threads are taken to run in step.

Dims: P programs, W warps, S units of shared memory: as many bytes as the kernel's smallest access.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ptx_emulator.parse import Kernel

_MANY = -2


class HazardError(RuntimeError):
    """Two accesses to shared memory whose order nothing guarantees."""


class _Units(NamedTuple):
    """Units that are touched: number of each among those of all programs, its program, and the warp that does."""

    at: np.ndarray
    program: np.ndarray
    warp: np.ndarray


class Hazards:
    """What has touched each unit of shared memory.

    Args:
        kernel: that runs.
        programs: P.
        threads: of a program.
        size: bytes of shared memory of a program.
    """

    def __init__(self, kernel: Kernel, programs: int, threads: int, size: int) -> None:
        self.unit = _smallest_access(kernel)
        self._per_program, self._now, warps = size // self.unit, 1, threads // 32
        total = programs * self._per_program
        self._barrier = np.zeros(programs, np.int32)
        self._fence = np.zeros((programs, warps), np.int32)
        self._written, self._writer = np.zeros(total, np.int32), np.zeros(total, np.int16)
        self._read, self._reader = np.zeros(total, np.int32), np.zeros(total, np.int16)
        # The mbarrier that bytes on their way arrive at, plus 1; and where mbarriers are.
        self._arriving, self._mbarriers = np.zeros(total, np.int32), np.zeros(total, bool)
        self._has_mbarriers = False
        self._groups = {kind: _Groups(programs, warps, total) for kind in ("copies", "stores", "products")}

    def barrier(self, programs: np.ndarray) -> None:
        self._barrier[programs] = self._tick()
        for groups in self._groups.values():
            groups.safe[programs] = groups.done[programs]
        self._tick()

    def fence(self, programs: np.ndarray, warps: np.ndarray) -> None:
        """A proxy fence of some warps."""
        self._fence[programs, warps] = self._tick()
        self._tick()

    def read(self, programs: np.ndarray, addresses: np.ndarray, size: int, warps: np.ndarray) -> None:
        """Reads of ``size`` bytes by threads of some warps."""
        units = self._units(programs, addresses, size, warps)
        self._check_thread(units)
        since = self._barrier[units.program]
        several = (self._read[units.at] > since) & (self._reader[units.at] != units.warp)
        self._reader[units.at] = units.warp
        # Who reads in this very instruction counts too: one of them was stored last.
        several |= self._reader[units.at] != units.warp
        self._reader[units.at[several]] = _MANY
        self._read[units.at] = self._now

    def write(self, programs: np.ndarray, addresses: np.ndarray, size: int, warps: np.ndarray) -> _Units:
        """Writes of threads."""
        units = self._units(programs, addresses, size, warps)
        self._check_thread(units)
        self._check_change(units)
        self._writer[units.at], self._written[units.at] = units.warp, self._now
        return units

    def check_agreed(self, stored: list[np.ndarray], found: list[np.ndarray]) -> None:
        """Threads may write to one place at once if they agree: what is there is to be what each of them stored."""
        for value, there in zip(stored, found, strict=True):
            self._require(value == there, "is given different values at once")

    def copy(self, programs: np.ndarray, addresses: np.ndarray, size: int, warps: np.ndarray) -> None:
        """``cp.async`` of threads."""
        self._groups["copies"].mark(self.write(programs, addresses, size, warps))

    def fetch(self, programs: np.ndarray, address: int, size: int, warps: np.ndarray, mbarrier: int) -> None:
        """TMA begins to write one box in each of the programs."""
        units = self._box(programs, address, size, warps)
        self._check_change(units)
        self._require(self._arriving[units.at] == 0, "is fetched while a box is on its way there")
        self._require(~self._mbarriers[units.at], "holds an mbarrier, and a box is fetched there")
        self._arriving[units.at] = mbarrier + 1
        self._written[units.at] = 0

    def arrived(self, programs: np.ndarray, mbarrier: int) -> None:
        """Somebody has waited for the boxes of an mbarrier."""
        arriving = self._arriving.reshape(-1, self._per_program)
        rows = arriving[programs]
        rows[rows == mbarrier + 1] = 0
        arriving[programs] = rows

    def send(self, programs: np.ndarray, address: int, size: int, warps: np.ndarray) -> None:
        """TMA begins to read one box in each of the programs."""
        units = self._box(programs, address, size, warps)
        self._check_proxy(units, "TMA stores")
        recent = self._written[units.at] > self._barrier[units.program]
        recent &= self._writer[units.at] != units.warp
        self._require(~recent, "is stored by TMA without a barrier after it was written")
        self._groups["stores"].mark(units)

    def multiply(self, programs: np.ndarray, warps: np.ndarray, units_of_one: np.ndarray) -> None:
        """wgmma of the warpgroups that begin at these warps begins to read some units."""
        units = self._spread(programs, units_of_one, warps)
        self._check_proxy(units, "wgmma reads")
        recent = self._written[units.at] > self._barrier[units.program]
        self._require(~recent, "is read by wgmma without a barrier after it was written")
        self._groups["products"].mark(units)

    def commit(self, kind: str, programs: np.ndarray, warps: np.ndarray) -> None:
        """Closes a group of ``"products"``, ``"stores"`` or ``"copies"``."""
        self._groups[kind].now[programs, warps] += 1

    def wait(self, kind: str, programs: np.ndarray, warps: np.ndarray, left: int) -> None:
        """Waits until no more than ``left`` groups go on."""
        groups = self._groups[kind]
        groups.wait(programs, warps, left)
        if kind == "copies" and groups.used:
            # As if written now: it takes another barrier before other warps may read it.
            at = np.flatnonzero(groups.group)
            at = at[groups.group[at] <= groups.done[at // self._per_program, groups.owner[at]]]
            self._written[at], groups.group[at] = self._tick(), 0

    def end(self, programs: np.ndarray) -> None:
        """Programs end, and their shared memory with them."""
        for kind, going_on in (("stores", "TMA still stores"), ("products", "wgmma still reads")):
            groups = self._groups[kind]
            if groups.used:
                at = (programs[:, None] * self._per_program + np.arange(self._per_program)).ravel()
                units = _Units(at, np.repeat(programs, self._per_program), at)
                self._require(~groups.open(units), f"is what {going_on} when its program ends")
        if self._has_mbarriers:
            arriving = self._arriving.reshape(-1, self._per_program)[programs]
            self._require(arriving == 0, "is what a box is on its way to when its program ends")

    def mbarrier(self, programs: np.ndarray, address: int, warps: np.ndarray, there: bool) -> None:
        """An mbarrier begins or ceases to be."""
        self._has_mbarriers = True
        units = self._box(programs, address, 8, warps)
        self._written[units.at], self._writer[units.at] = self._now, units.warp
        self._mbarriers[units.at] = there

    def use(self, programs: np.ndarray, address: int, warps: np.ndarray) -> None:
        """Threads arrive at an mbarrier, or wait for it."""
        at = programs * self._per_program + address // self.unit
        recent = (self._written[at] > self._barrier[programs]) & (self._writer[at] != warps)
        self._require(~recent, "holds an mbarrier that is used without a barrier after its initialisation")

    def _tick(self) -> int:
        self._now += 1
        return self._now

    def _units(self, programs: np.ndarray, addresses: np.ndarray, size: int, warps: np.ndarray) -> _Units:
        self._tick()
        count = size // self.unit
        first = programs * self._per_program + addresses // self.unit
        at = (first[:, None] + np.arange(count)).ravel()
        return _Units(at, np.repeat(programs, count), np.repeat(warps, count))

    def _box(self, programs: np.ndarray, address: int, size: int, warps: np.ndarray) -> _Units:
        return self._spread(programs, np.arange(address // self.unit, (address + size) // self.unit), warps)

    def _spread(self, programs: np.ndarray, units_of_one: np.ndarray, warps: np.ndarray) -> _Units:
        """The same units in each of some programs."""
        self._tick()
        at = (programs[:, None] * self._per_program + units_of_one).ravel()
        return _Units(at, np.repeat(programs, len(units_of_one)), np.repeat(warps, len(units_of_one)))

    def _check_thread(self, units: _Units) -> None:
        """What forbids a thread to touch a unit in any way."""
        self._check_written(units)
        if self._has_mbarriers:
            self._require(
                self._arriving[units.at] == 0, "is touched by a thread before the wait for a box on its way there"
            )
            self._require(~self._mbarriers[units.at], "holds an mbarrier, and a thread touches it")
        self._require(~self._groups["copies"].open(units), "is touched before the wait for a copy on its way there")

    def _check_change(self, units: _Units) -> None:
        """What forbids to overwrite a unit, be it by a thread or by TMA."""
        self._check_written(units)
        recent = (self._read[units.at] > self._barrier[units.program]) & (self._reader[units.at] != units.warp)
        self._require(~recent, "is overwritten without a barrier after another warp's reading")
        unsafe = self._groups["products"].unsafe(units)
        self._require(~unsafe, "is overwritten without wait and barrier after wgmma's reading")
        stores = self._groups["stores"]
        if stores.used:
            # The warp that waited for its own stores needs no barrier.
            unsafe = stores.unsafe(units) & ((stores.owner[units.at] != units.warp) | stores.open(units))
            self._require(~unsafe, "is overwritten without wait and barrier after a store by TMA")

    def _check_written(self, units: _Units) -> None:
        recent = (self._written[units.at] > self._barrier[units.program]) & (self._writer[units.at] != units.warp)
        self._require(~recent, "was written by another warp, and no barrier came after that")

    def _check_proxy(self, units: _Units, who: str) -> None:
        self._require(self._arriving[units.at] == 0, f"is what {who} before the wait for a box on its way there")
        unfenced = self._written[units.at] > self._fence[units.program, self._writer[units.at]]
        self._require(~unfenced, f"is what {who} without a proxy fence after threads wrote it")
        self._require(~self._groups["copies"].open(units), f"is what {who} before the wait for a copy on its way there")

    @staticmethod
    def _require(kept: np.ndarray, what: str) -> None:
        if not kept.all():
            raise HazardError(f"shared memory {what} (hazard in {int((~kept).sum())} places)")


class _Groups:
    """Asynchronous accesses in groups that each warp closes and waits for.

    Attributes:
        used: whether there was one.
        now: number of the group that each warp fills, from 1.
        done: number of the last one it waited for.
        safe: number of the last one that was waited for when the last barrier came.
        group, owner: the last group that touched each unit, and whose.
    """

    _NONE = np.zeros(1, bool)

    def __init__(self, programs: int, warps: int, total: int) -> None:
        self.used = False
        self.now = np.ones((programs, warps), np.int32)
        self.done, self.safe = np.zeros((programs, warps), np.int32), np.zeros((programs, warps), np.int32)
        self.group, self.owner = np.zeros(total, np.int32), np.zeros(total, np.int16)

    def mark(self, units: _Units) -> None:
        self.used = True
        self.group[units.at], self.owner[units.at] = self.now[units.program, units.warp], units.warp

    def wait(self, programs: np.ndarray, warps: np.ndarray, left: int) -> None:
        self.done[programs, warps] = np.maximum(self.done[programs, warps], self.now[programs, warps] - 1 - left)

    def open(self, units: _Units) -> np.ndarray:
        """Which units are still touched."""
        return self.group[units.at] > self.done[units.program, self.owner[units.at]] if self.used else self._NONE

    def unsafe(self, units: _Units) -> np.ndarray:
        """Which units are still touched, or were so until the last barrier."""
        return self.group[units.at] > self.safe[units.program, self.owner[units.at]] if self.used else self._NONE


def _smallest_access(kernel: Kernel) -> int:
    opcodes = [i.opcode for i in kernel.instructions if i.opcode.startswith(("ld.shared", "st.shared"))]
    return min([4, *(int(opcode.rsplit(".", 1)[1][1:]) // 8 for opcode in opcodes)])

"""Shared-memory hazards: accesses whose order nothing guarantees, although the emulator's own order may give the right result.

Between two barriers, what one warp writes no other may touch, and what one reads no other may write. Copies by TMA and by
``cp.async``, stores by TMA, and wgmma's reads go on by themselves: what they touch is free once they were waited for, and for
other warps once a barrier came after that. What threads wrote is seen by TMA and wgmma after a proxy fence.

Within a warp, threads are taken to run in step.

Dims: P programs, W warps, S units of shared memory: as many bytes as the kernel's smallest access.
"""

from __future__ import annotations

import functools

import numpy as np

from ptx_emulator.parse import Kernel

_MANY = -2


class HazardError(RuntimeError):
    """Two accesses to shared memory whose order nothing guarantees."""


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
        shape, warps = (programs, size // self.unit), threads // 32
        self._threads, self._now = threads, 1
        self._barrier = np.zeros(programs, np.int32)
        self._fence = np.zeros((programs, warps), np.int32)
        self._written, self._writer = np.zeros(shape, np.int32), np.zeros(shape, np.int16)
        self._read, self._reader = np.zeros(shape, np.int32), np.zeros(shape, np.int16)
        # The mbarrier that bytes on their way arrive at, plus 1.
        self._arriving = np.zeros(shape, np.int32)
        self._mbarriers = np.zeros(shape, bool)
        self._groups = {kind: _Groups(programs, warps, shape) for kind in ("copies", "stores", "products")}

    def barrier(self, programs: np.ndarray) -> None:
        self._now += 1
        self._barrier[programs] = self._now
        for groups in self._groups.values():
            groups.safe[programs] = groups.done[programs]
        self._now += 1

    def fence(self, programs: np.ndarray, warps: np.ndarray) -> None:
        """A proxy fence of some warps."""
        self._now += 1
        self._fence[programs, warps] = self._now
        self._now += 1

    def read(self, programs: np.ndarray, addresses: np.ndarray, size: int, warps: np.ndarray) -> None:
        """Reads of ``size`` bytes by threads of some warps."""
        p, s, w = self._units(programs, addresses, size, warps)
        self._check_thread(p, s, w)
        others = (self._read[p, s] > self._barrier[p]) & (self._reader[p, s] != w)
        # A later pair of readers in this very instruction counts too: the last one to be stored may be any.
        self._reader[p, s] = w
        others |= self._reader[p, s] != w
        self._reader[p[others], s[others]] = _MANY
        self._read[p, s] = self._now

    def write(self, programs: np.ndarray, addresses: np.ndarray, size: int, warps: np.ndarray) -> None:
        """Writes of threads."""
        p, s, w = self._units(programs, addresses, size, warps)
        self._check_thread(p, s, w)
        self._check_change(p, s, w)
        self._writer[p, s] = w
        self._written[p, s] = self._now

    def check_agreed(self, stored: list[np.ndarray], found: list[np.ndarray]) -> None:
        """Threads may write to one place at once if they agree: what is there is to be what each of them stored."""
        for value, there in zip(stored, found, strict=True):
            self._require(value == there, "is given different values at once")

    def copy(self, programs: np.ndarray, addresses: np.ndarray, size: int, warps: np.ndarray) -> None:
        """``cp.async`` of threads."""
        self.write(programs, addresses, size, warps)
        p, s, w = self._units(programs, addresses, size, warps)
        self._groups["copies"].mark(p, s, w)

    def fetch(self, programs: np.ndarray, address: int, size: int, warps: np.ndarray, mbarrier: int) -> None:
        """TMA begins to write one box in each of the programs."""
        p, s, w = self._box(programs, address, size, warps)
        self._check_change(p, s, w)
        self._require(self._arriving[p, s] == 0, "is fetched while a box is on its way there")
        self._require(~self._mbarriers[p, s], "holds an mbarrier, and a box is fetched there")
        self._arriving[p, s] = mbarrier + 1
        self._written[p, s] = 0

    def arrived(self, programs: np.ndarray, mbarrier: int) -> None:
        """Somebody has waited for the boxes of an mbarrier."""
        rows = self._arriving[programs]
        rows[rows == mbarrier + 1] = 0
        self._arriving[programs] = rows

    def send(self, programs: np.ndarray, address: int, size: int, warps: np.ndarray) -> None:
        """TMA begins to read one box in each of the programs."""
        p, s, w = self._box(programs, address, size, warps)
        self._check_proxy(p, s, "TMA stores")
        recent = (self._written[p, s] > self._barrier[p]) & (self._writer[p, s] != w)
        self._require(~recent, "is stored by TMA without a barrier after it was written")
        self._groups["stores"].mark(p, s, w)

    def multiply(self, programs: np.ndarray, warps: np.ndarray, units: np.ndarray) -> None:
        """wgmma of the warpgroups that begin at these warps begins to read some units."""
        p, s = (a.ravel() for a in np.broadcast_arrays(programs[:, None], units[None, :]))
        self._check_proxy(p, s, "wgmma reads")
        self._require(
            self._written[p, s] <= self._barrier[p], "is read by wgmma without a barrier after it was written"
        )
        self._groups["products"].mark(p, s, np.repeat(warps, len(units)))

    def commit(self, kind: str, programs: np.ndarray, warps: np.ndarray) -> None:
        """Closes a group of ``"products"``, ``"stores"`` or ``"copies"``."""
        self._groups[kind].now[programs, warps] += 1

    def wait(self, kind: str, programs: np.ndarray, warps: np.ndarray, left: int) -> None:
        """Waits until no more than ``left`` groups go on."""
        self._groups[kind].wait(programs, warps, left)
        if kind == "copies":
            # As if written now: it takes another barrier before other warps may read it.
            copies = self._groups[kind]
            arrived = (copies.group > 0) & (copies.group <= np.take_along_axis(copies.done, copies.owner, 1))
            self._written[arrived] = self._now
            copies.group[arrived] = 0

    def mbarrier(self, programs: np.ndarray, address: int, warps: np.ndarray, there: bool) -> None:
        """An mbarrier begins or ceases to be."""
        for at in range(address // self.unit, (address + 8) // self.unit):
            self._written[programs, at], self._writer[programs, at] = self._now, warps
            self._mbarriers[programs, at] = there

    def use(self, programs: np.ndarray, address: int, warps: np.ndarray) -> None:
        """Threads arrive at an mbarrier, or wait for it."""
        at = address // self.unit
        recent = (self._written[programs, at] > self._barrier[programs]) & (self._writer[programs, at] != warps)
        self._require(~recent, "holds an mbarrier that is used without a barrier after its initialisation")

    def _units(
        self, programs: np.ndarray, addresses: np.ndarray, size: int, warps: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self._now += 1
        count = size // self.unit
        units = (addresses // self.unit)[:, None] + np.arange(count)
        return np.repeat(programs, count), units.ravel(), np.repeat(warps, count)

    def _box(
        self, programs: np.ndarray, address: int, size: int, warps: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self._now += 1
        units = np.arange(address // self.unit, (address + size) // self.unit)
        return np.repeat(programs, len(units)), np.tile(units, len(programs)), np.repeat(warps, len(units))

    def _check_thread(self, p: np.ndarray, s: np.ndarray, w: np.ndarray) -> None:
        """What forbids a thread to touch a unit in any way."""
        recent = (self._written[p, s] > self._barrier[p]) & (self._writer[p, s] != w)
        self._require(~recent, "was written by another warp, and no barrier came after that")
        self._require(self._arriving[p, s] == 0, "is touched by a thread before the wait for a box on its way there")
        self._require(~self._mbarriers[p, s], "holds an mbarrier, and a thread touches it")
        self._require(~self._groups["copies"].open(p, s), "is touched before the wait for a copy on its way there")

    def _check_change(self, p: np.ndarray, s: np.ndarray, w: np.ndarray) -> None:
        """What forbids to overwrite a unit, be it by a thread or by TMA."""
        recent = (self._written[p, s] > self._barrier[p]) & (self._writer[p, s] != w)
        self._require(~recent, "was written by another warp, and no barrier came after that")
        recent = (self._read[p, s] > self._barrier[p]) & (self._reader[p, s] != w)
        self._require(~recent, "is overwritten without a barrier after another warp's reading")
        self._require(
            ~self._groups["products"].unsafe(p, s), "is overwritten without wait and barrier after wgmma's reading"
        )
        self._require(
            ~self._groups["stores"].unsafe(p, s, w), "is overwritten without wait and barrier after a store by TMA"
        )

    def _check_proxy(self, p: np.ndarray, s: np.ndarray, who: str) -> None:
        self._require(self._arriving[p, s] == 0, f"is what {who} before the wait for a box on its way there")
        unfenced = self._written[p, s] > self._fence[p, self._writer[p, s]]
        self._require(~unfenced, f"is what {who} without a proxy fence after threads wrote it")
        self._require(~self._groups["copies"].open(p, s), f"is what {who} before the wait for a copy on its way there")

    @staticmethod
    def _require(kept: np.ndarray, what: str) -> None:
        if not kept.all():
            raise HazardError(f"shared memory {what} (hazard in {int((~kept).sum())} places)")


class _Groups:
    """Asynchronous accesses in groups that each warp closes and waits for.

    Attributes:
        now: number of the group that each warp fills, from 1.
        done: number of the last one it waited for.
        safe: number of the last one that was waited for when the last barrier came.
        group, owner: the last group that touched each unit, and whose.
    """

    def __init__(self, programs: int, warps: int, shape: tuple[int, int]) -> None:
        self.now = np.ones((programs, warps), np.int32)
        self.done, self.safe = np.zeros((programs, warps), np.int32), np.zeros((programs, warps), np.int32)
        self.group, self.owner = np.zeros(shape, np.int32), np.zeros(shape, np.int64)

    def mark(self, p: np.ndarray, s: np.ndarray, w: np.ndarray) -> None:
        self.group[p, s], self.owner[p, s] = self.now[p, w], w

    def wait(self, programs: np.ndarray, warps: np.ndarray, left: int) -> None:
        self.done[programs, warps] = np.maximum(self.done[programs, warps], self.now[programs, warps] - 1 - left)

    def open(self, p: np.ndarray, s: np.ndarray) -> np.ndarray:
        """Which units are still touched."""
        return self.group[p, s] > self.done[p, self.owner[p, s]]

    def unsafe(self, p: np.ndarray, s: np.ndarray, w: np.ndarray | None = None) -> np.ndarray:
        """Which units are still touched, or for others than the warps ``w`` were so until the last barrier."""
        owner, group = self.owner[p, s], self.group[p, s]
        found = group > self.safe[p, owner]
        return found if w is None else found & ((owner != w) | (group > self.done[p, owner]))


@functools.lru_cache(maxsize=512)
def _access_bytes(opcode: str) -> int:
    digits = opcode.rsplit(".", 1)[1][1:]
    return int(digits) // 8


def _smallest_access(kernel: Kernel) -> int:
    sizes = [_access_bytes(i.opcode) for i in kernel.instructions if i.opcode.startswith(("ld.shared", "st.shared"))]
    return min([4, *sizes])

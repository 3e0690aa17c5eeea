"""Global and shared memory of the emulated device, and the boxes that TMA moves between them.

Global memory is this process's own: tensors on the CPU stand for tensors on the device, and an address is an address.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# Address bits that the swizzles of 32, 64 and 128 bytes exchange 16-byte units by: bits 7 to 9, as many as are used.
SWIZZLES = {0: 0, 1: 1, 2: 3, 3: 7}


class MemoryAccessError(RuntimeError):
    """An access that the device would refuse, or that reaches outside of the tensors."""


def swizzled(addresses: np.ndarray, mode: int) -> np.ndarray:
    """Where shared memory has the bytes of these addresses; ``mode`` is TMA's: 0 for none, 1 to 3 for 32 to 128 bytes."""
    return addresses ^ (((addresses >> 7) & SWIZZLES[mode]) << 4)


class GlobalMemory:
    """The memory of all tensors.

    Args:
        tensors: address and bytes of each one's storage. A kernel may reach all of them: where it serves several streams, it
            is given the first one's address and the distance to the next.
    """

    def __init__(self, tensors: Iterable[tuple[int, int]]) -> None:
        merged: list[list[int]] = []
        for start, size in sorted(tensors):
            if merged and start < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], start + size)
            else:
                merged.append([start, start + size])
        self._starts, self._ends = np.array(merged, np.int64).T
        self._low = merged[0][0] // 64 * 64
        size = -(-(merged[-1][1] - self._low) // 64) * 64
        whole = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self._low))
        self._words = {bytes_: whole.view(word) for bytes_, word in WORDS.items()}

    def _check(self, addresses: np.ndarray, size: int, what: str) -> None:
        at = np.searchsorted(self._starts, addresses, "right") - 1
        inside = (at >= 0) & (addresses + size <= self._ends[at])
        if not inside.all():
            outside = addresses[~inside]
            raise MemoryAccessError(
                f"{what} {size} bytes outside of all tensors, {outside.size} times, first at {int(outside.flat[0]):#x}"
            )

    def _places(self, addresses: np.ndarray, bytes_: int, count: int, what: str) -> np.ndarray:
        if (addresses % (bytes_ * count)).any():
            raise MemoryAccessError(f"{what} {bytes_ * count} bytes at an address that isn't a multiple of that")
        self._check(addresses, bytes_ * count, what)
        return (addresses - self._low) // bytes_

    def load(self, addresses: np.ndarray, bytes_: int, count: int) -> list[np.ndarray]:
        """``count`` consecutive words of ``bytes_`` at each address."""
        at = self._places(addresses, bytes_, count, "a load of")
        return [self._words[bytes_][at + i] for i in range(count)]

    def store(self, addresses: np.ndarray, bytes_: int, values: list[np.ndarray]) -> None:
        """Writes the words of ``values`` one behind the other at each address."""
        at = self._places(addresses, bytes_, len(values), "a store of")
        for i, value in enumerate(values):
            self._words[bytes_][at + i] = value

    def box(self, tensor_map: TensorMap, corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the elements of boxes are, and which of them exist, both of shape (boxes, elements)."""
        addresses, inside = tensor_map.elements(corners)
        rows = addresses.reshape(len(corners), -1, tensor_map.box[0])
        exist = inside.reshape(rows.shape)
        lengths = exist.sum(-1)
        for length in np.unique(lengths[lengths > 0]):
            picked = lengths == length
            first = rows[picked, exist[picked].argmax(-1)]
            self._check(first, int(length) * tensor_map.element, "TMA moves")
        return (addresses - self._low) // tensor_map.element, inside

    def words(self, bytes_: int) -> np.ndarray:
        return self._words[bytes_]


class SharedMemory:
    """Shared memory of each program.

    Args:
        programs: how many.
        size: bytes of each.
    """

    def __init__(self, programs: int, size: int) -> None:
        self.size = size
        self.stride = -(-size // 1024) * 1024 + 1024
        # What nobody has written reads as NaN.
        whole = np.full(programs * self.stride, 0xFF, np.uint8)
        self._words = {bytes_: whole.view(word) for bytes_, word in WORDS.items()}
        self._rows = {bytes_: words.reshape(programs, -1) for bytes_, words in self._words.items()}

    def check(self, addresses: np.ndarray, size: int, multiple: int, what: str) -> None:
        if (addresses % multiple).any():
            raise MemoryAccessError(f"{what} shared memory at an address that isn't a multiple of {multiple}")
        if addresses.size and (addresses.min() < 0 or addresses.max() + size > self.size):
            raise MemoryAccessError(
                f"{what} shared memory at {addresses.min()} to {addresses.max() + size}; it has {self.size} bytes"
            )

    def load(self, programs: np.ndarray, addresses: np.ndarray, bytes_: int, count: int = 1) -> list[np.ndarray]:
        self.check(addresses, bytes_ * count, bytes_ * count, "a load from")
        at = (programs * self.stride + addresses) // bytes_
        return [self._words[bytes_][at + i] for i in range(count)]

    def store(self, programs: np.ndarray, addresses: np.ndarray, bytes_: int, values: list[np.ndarray]) -> None:
        self.check(addresses, bytes_ * len(values), bytes_ * len(values), "a store to")
        at = (programs * self.stride + addresses) // bytes_
        for i, value in enumerate(values):
            self._words[bytes_][at + i] = value

    def rows(self, bytes_: int) -> np.ndarray:
        """All of it as words, of shape (programs, words)."""
        return self._rows[bytes_]


@dataclass(frozen=True)
class TensorMap:
    """What ``cuTensorMapEncodeTiled`` was told, innermost dimension first.

    Attributes:
        address: of the tensor.
        element: bytes of an element.
        swizzle: 0 for none, 1 to 3 for 32, 64 and 128 bytes.
        sizes, strides, box: of each dimension; strides in bytes, the innermost one an element's.
    """

    address: int
    element: int
    swizzle: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]

    _FORMAT = struct.Struct("<QBBB5Q5Q5I")

    def pack(self) -> bytes:
        """As the 128 bytes that travel through Triton's launcher."""
        padded = [[*values, *[0] * (5 - len(values))] for values in (self.sizes, self.strides, self.box)]
        head = self.address, self.element, self.swizzle, len(self.box)
        return self._FORMAT.pack(*head, *(value for values in padded for value in values))

    @classmethod
    def unpack(cls, data: bytes) -> TensorMap:
        address, element, swizzle, rank, *values = cls._FORMAT.unpack_from(data)
        sizes, strides, box = (tuple(values[i : i + rank]) for i in (0, 5, 10))
        return cls(address, element, swizzle, sizes, strides, box)

    def refusal(self) -> str | None:
        """What CUDA's documentation forbids of it, or None.

        Strides that grow from dimension to dimension, which its pseudo-code has, are no rule that drivers ask for.
        """
        inner = self.box[0] * self.element if self.box else 0
        rules = [
            ("1 to 5 dimensions", len(self.box), 1 <= len(self.box) <= 5),
            ("an address that is a multiple of 16", hex(self.address), self.address % 16 == 0),
            ("sizes of 1 to 2^32", self.sizes, all(1 <= size <= 2**32 for size in self.sizes)),
            (
                "strides that are multiples of 16 bytes below 2^40",
                self.strides[1:],
                all(stride % 16 == 0 and 0 < stride < 2**40 for stride in self.strides[1:]),
            ),
            ("boxes of 1 to 256 elements along each dimension", self.box, all(1 <= edge <= 256 for edge in self.box)),
            ("rows of a box of a multiple of 16 bytes", inner, inner % 16 == 0),
            (
                "rows of a box no longer than the swizzle",
                (inner, self.swizzle),
                self.swizzle == 0 or inner <= 16 << self.swizzle,
            ),
        ]
        broken = [f"a tensor map takes {rule}; got {got}" for rule, got, kept in rules if not kept]
        return broken[0] if broken else None

    def elements(self, corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Addresses of the elements of boxes, and whether each lies in the tensor; corners innermost dimension first."""
        addresses = np.full((len(corners), 1), self.address, np.int64)
        inside = np.ones((len(corners), 1), bool)
        for dim in reversed(range(len(self.box))):
            position = corners[:, dim, None] + np.arange(self.box[dim])
            exists = (position >= 0) & (position < self.sizes[dim])
            addresses = (addresses[:, :, None] + (position * self.strides[dim])[:, None, :]).reshape(len(corners), -1)
            inside = (inside[:, :, None] & exists[:, None, :]).reshape(len(corners), -1)
        return addresses, inside

    @property
    def bytes(self) -> int:
        """Of a box."""
        return math.prod(self.box) * self.element

    def places(self, address: int) -> np.ndarray:
        """Word of shared memory of each element of a box that begins at this address."""
        return _places(address, self.bytes, self.element, self.swizzle)


@functools.lru_cache(maxsize=256)
def _places(address: int, size: int, element: int, swizzle: int) -> np.ndarray:
    return swizzled(address + np.arange(0, size, element), swizzle) // element

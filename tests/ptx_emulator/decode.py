"""Turns each instruction into a function of the machine: where its operands come from, and where its result goes."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import numpy as np

from ptx_emulator.machine import Machine, Step
from ptx_emulator.parse import Instruction, Kernel, UnsupportedError

Source = Callable[[Machine], np.ndarray]
Target = Callable[[Machine, np.ndarray, "np.ndarray | None"], None]
Builder = Callable[[Instruction, "Operands"], Step]

_BUILDERS: dict[str, Builder] = {}
# By width, what a register is read as unless a type says otherwise.
UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
TYPES = {
    "pred": np.bool_,
    **{f"b{w}": UNSIGNED[w] for w in (8, 16, 32, 64)},
    **{f"u{w}": UNSIGNED[w] for w in (8, 16, 32, 64)},
    "s8": np.int8,
    "s16": np.int16,
    "s32": np.int32,
    "s64": np.int64,
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
    # Two halves, and bits that NumPy has no type for.
    "bf16": np.uint16,
    "bf16x2": np.uint32,
    "f16x2": np.uint32,
    "s16x2": np.uint32,
    "u16x2": np.uint32,
}
_PLACE = re.compile(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\d+)\s*)?\]$")


def instruction(*opcodes: str) -> Callable[[Builder], Builder]:
    """Registers what builds the instructions whose opcode begins with one of these."""

    def register(builder: Builder) -> Builder:
        _BUILDERS.update(dict.fromkeys(opcodes, builder))
        return builder

    return register


def decode(kernel: Kernel) -> list[Step]:
    """The instructions of a kernel as functions of a machine and the mask of its lanes."""
    operands = Operands(kernel)
    return [_build(i, operands) for i in kernel.instructions]


def _build(i: Instruction, operands: Operands) -> Step:
    # The longest part of the opcode that is known: cp.async.bulk.tensor before cp.async.
    parts = i.parts
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    name = next((name for name in names if name in _BUILDERS), None)
    if name is None:
        raise UnsupportedError(f"{i.line}: the emulator doesn't know {i}")
    step = _BUILDERS[name](i, operands)
    if i.guard is None or name == "bra":
        return step
    guard = operands.guard(i)

    def guarded(m: Machine, mask: np.ndarray | None) -> None:
        lanes = guard(m)
        if mask is not None:
            lanes = lanes & mask
        if lanes.all():
            step(m, None)
        elif lanes.any():
            step(m, lanes)

    return guarded


class Operands:
    """What the operands of a kernel's instructions mean."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self._parameters = dict(kernel.parameters)

    def source(self, text: str, dtype: type) -> Source:
        """The operand's value as an array of a type, or as a scalar that all lanes share."""
        found = self.kernel.registers.get(text)
        if found is not None:
            width, index = found
            own = UNSIGNED[width]
            if dtype is np.bool_ or np.dtype(dtype).itemsize * 8 == width:
                return lambda m: m.views[dtype][index]
            return lambda m: m.views[own][index].astype(dtype)
        if text.startswith("%"):
            return _special(text)
        if text in self._parameters:
            return lambda m: dtype(m.launch.parameters[text])
        if text == "global_smem":
            return lambda m: dtype(0)
        value = _immediate(text, dtype)
        return lambda m: value

    def register(self, text: str) -> tuple[int, int]:
        """Width and number of a register."""
        return self.kernel.registers[text]

    def target(self, text: str, dtype: type) -> Target:
        """Where a result of a type goes: a wider register is filled up with its sign, or with zeros."""
        if text == "_":
            return lambda m, value, mask: None
        width, index = self.register(text)
        view = dtype if width == 1 or np.dtype(dtype).itemsize * 8 == width else UNSIGNED[width]

        def store(m: Machine, value: np.ndarray, mask: np.ndarray | None) -> None:
            row = m.views[view][index]
            if view is not dtype:
                value = np.asarray(value, dtype).astype(view)
            if mask is None:
                row[...] = value
            else:
                np.copyto(row, value, where=mask)

        return store

    def place(self, text: str) -> Source:
        """The address in brackets, of each lane."""
        found = _PLACE.match(text)
        if found is None:
            raise UnsupportedError(f"the address {text}")
        base, offset = found[1], int(found[2] or 0)
        width = self.kernel.registers[base][0] if base in self.kernel.registers else 64
        read = self.source(base, UNSIGNED[width])
        return lambda m: np.broadcast_to(np.asarray(read(m)).astype(np.int64) + offset, (m.lanes,))

    def guard(self, i: Instruction) -> Source:
        assert i.guard is not None
        name, negated = i.guard
        read = self.source(name, np.bool_)
        return (lambda m: ~read(m)) if negated else (lambda m: read(m).copy())


def members(text: str) -> list[str]:
    """The registers of a vector, or the one that stands alone."""
    return [part.strip() for part in text.strip("{}").split(",")]


def bits_of_bfloat16(values: np.ndarray) -> np.ndarray:
    """Float32 rounded to the nearest bfloat16, as its 16 bits."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def of_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The float32 that 16 bits of a bfloat16 mean."""
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


@functools.lru_cache(maxsize=4096)
def _immediate(text: str, dtype: type) -> np.generic:
    if re.fullmatch("0[fF][0-9a-fA-F]{8}", text):
        value = np.uint32(int(text[2:], 16))
        return value.view(np.float32).astype(dtype) if dtype is np.float64 else value.view(dtype)
    if re.fullmatch("0[dD][0-9a-fA-F]{16}", text):
        return np.uint64(int(text[2:], 16)).view(dtype)
    number = int(text.rstrip("U"), 0)
    if dtype is np.bool_:
        return np.bool_(number != 0)
    size = np.dtype(dtype).itemsize
    return np.frombuffer((number % (1 << 8 * size)).to_bytes(size, "little"), dtype)[0]


def _special(text: str) -> Source:
    name, _, axis = text[1:].partition(".")
    along = "xyz".find(axis or "x")
    if name == "tid":
        return (lambda m: m.thread) if along == 0 else (lambda m: np.uint32(0))
    if name == "ntid":
        return lambda m: np.uint32(m.threads if along == 0 else 1)
    if name == "ctaid":
        return lambda m: m.place[along]
    if name == "nctaid":
        return lambda m: np.uint32(m.launch.grid[along])
    if name == "laneid":
        return lambda m: m.thread % np.uint32(32)
    if name == "warpid":
        return lambda m: m.thread // np.uint32(32)
    raise UnsupportedError(f"the register {text}")

"""wgmma: matrix products of warpgroups, whose operands lie in shared memory where descriptors say.

Dims: G warpgroups, N columns of the result, K summed over.
"""

from __future__ import annotations

import functools
import re

import numpy as np

from ptx_emulator.decode import Operands, instruction, members, of_bfloat16
from ptx_emulator.machine import EmulationError, Machine, Step
from ptx_emulator.memory import WORDS, swizzled
from ptx_emulator.parse import Instruction, UnsupportedError

_ROWS, _THREADS = 64, 128
_ELEMENT = {"bf16": 2, "f16": 2, "tf32": 4}
# The descriptor's layout, bits 62 and 63, to TMA's swizzle.
_SWIZZLE = {0: 0, 3: 1, 2: 2, 1: 3}


@instruction("wgmma.mma_async")
def _multiply(i: Instruction, operands: Operands) -> Step:
    found = re.fullmatch(r"m64n(\d+)k(\d+)", i.parts[4])
    kind = i.parts[-1]
    if found is None or kind not in _ELEMENT or i.parts[-2] != kind or i.parts[5] != "f32":
        raise UnsupportedError(str(i))
    n, k = int(found[1]), int(found[2])
    sums = np.array([operands.register(name)[1] for name in members(i.operands[0])])
    from_registers = i.operands[1].startswith("{")
    left = [operands.source(name, np.uint32 if from_registers else np.uint64) for name in members(i.operands[1])]
    right = operands.source(i.operands[2], np.uint64)
    keeps = operands.source(i.operands[3], np.bool_)
    signs, turned = i.operands[4:6], [flag == "1" for flag in i.operands[6:]]
    if signs != ("1", "1"):
        raise UnsupportedError(f"a product with its sign exchanged: {i}")
    # 16-bit operands in shared memory each have a flag that says whether K is not their innermost dimension.
    left_turned = turned[0] if len(turned) == 2 else False
    right_turned = turned[-1] if turned else False

    def step(m: Machine, mask: np.ndarray | None) -> None:
        some = m.check_whole(mask, _THREADS)
        groups = np.arange(m.lanes // _THREADS) if some is None else np.flatnonzero(some)
        lanes = (groups[:, None] * _THREADS + np.arange(_THREADS)).ravel()
        b = _operand(m, right, groups, n, k, kind, right_turned)
        a = (
            _fragments(m, left, lanes, k, kind)
            if from_registers
            else _operand(m, left[0], groups, _ROWS, k, kind, left_turned)
        )
        product = np.matmul(a, b.transpose(0, 2, 1))
        # Row 16w + 8h + l // 4, column 8j + 2(l % 4) + q: register 4j + 2h + q of lane l of warp w.
        product = product.reshape(len(groups), 4, 2, 8, n // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5).reshape(n // 2, -1)
        bank = m.banks[32].view(np.float32)
        kept = np.broadcast_to(keeps(m), (m.lanes,))[lanes]
        places = np.ix_(sums, lanes) if some is not None else sums
        bank[places] = product + bank[places] if kept.all() else np.where(kept, product + bank[places], product)

    return step


def _operand(m: Machine, descriptor, groups: np.ndarray, rows: int, k: int, kind: str, turned: bool) -> np.ndarray:
    """The matrix (rows, K) of each group, float32."""
    described = np.broadcast_to(descriptor(m), (m.lanes,)).reshape(-1, _THREADS)[groups, 0]
    element = _ELEMENT[kind]
    per_program = m.threads // _THREADS
    alike = bool((described == described[0]).all())
    matrices = np.empty((len(groups), rows, k), np.float32)
    for value in described[:1] if alike else np.unique(described):
        same = groups if alike else groups[described == value]
        words = _places(int(value), rows, k, element, turned)
        if (words.max() + 1) * element > m.shared.size:
            raise EmulationError("a wgmma descriptor reaches beyond shared memory")
        programs = same // per_program
        units = _units(int(value), rows, k, element, turned, m.hazards.unit)
        m.hazards.multiply(programs, same % per_program * 4, units)
        # The warpgroups of a program that read the same lie one behind the other.
        changes = np.diff(programs, prepend=-1) > 0
        bits = m.shared.rows(element)[programs[changes][:, None], words[None, :]]
        values = _numbers(bits, kind).reshape(-1, rows, k)[np.cumsum(changes) - 1]
        if alike:
            return values
        matrices[described == value] = values
    return matrices


def _numbers(bits: np.ndarray, kind: str) -> np.ndarray:
    if kind == "bf16":
        return of_bfloat16(bits)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    # The tensor core reads the upper 19 bits alone.
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


@functools.lru_cache(maxsize=4096)
def _places(descriptor: int, rows: int, k: int, element: int, turned: bool) -> np.ndarray:
    """Word of shared memory of each element (row, k) of the operand that a descriptor describes."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    swizzle = _SWIZZLE[descriptor >> 62 & 3]
    if descriptor >> 49 & 7:
        raise UnsupportedError("a wgmma descriptor with a base offset")
    # An atom has 8 lines, each as long as the swizzle and 16 bytes without one.
    line = 16 << swizzle
    row, at = np.arange(rows)[:, None], np.arange(k)[None, :]
    if not turned:
        across = at * element
        if swizzle == 0:
            across = at * element // 16 * leading + at * element % 16
        elif k * element > line:
            raise UnsupportedError("a wgmma operand whose rows are longer than its swizzle")
        places = start + row // 8 * stride + row % 8 * line + across
    else:
        if swizzle == 0:
            raise UnsupportedError("a turned wgmma operand without a swizzle")
        per_line = line // element
        places = start + row // per_line * leading + row % per_line * element + at // 8 * stride + at % 8 * line
    return swizzled(places.ravel(), swizzle) // element


@functools.lru_cache(maxsize=4096)
def _units(descriptor: int, rows: int, k: int, element: int, turned: bool, unit: int) -> np.ndarray:
    """The units of some bytes that hold the operand."""
    return np.unique(_places(descriptor, rows, k, element, turned) * element // unit)


def _fragments(m: Machine, registers: list, lanes: np.ndarray, k: int, kind: str) -> np.ndarray:
    """The left operand from registers: row 16w + 8h + l // 4 of lane l of warp w, as the result's."""
    bits = np.stack([np.broadcast_to(register(m), (m.lanes,))[lanes] for register in registers])
    if kind == "tf32":
        # Register h + 2j holds column 4j + l % 4.
        values = _numbers(bits, kind).reshape(k // 4, 2, -1, 4, 8, 4)
        return values.transpose(2, 3, 1, 4, 0, 5).reshape(-1, _ROWS, k)
    # Register h + 2j holds columns 8j + 2(l % 4) + 0 and 1.
    values = _numbers(np.ascontiguousarray(bits).view(WORDS[2]), kind).reshape(k // 8, 2, -1, 4, 8, 4, 2)
    return values.transpose(2, 3, 1, 4, 0, 5, 6).reshape(-1, _ROWS, k)

"""Instructions that compute from registers to registers."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import numpy as np

from ptx_emulator.decode import (
    TYPES,
    UNSIGNED,
    Operands,
    Source,
    Target,
    bits_of_bfloat16,
    instruction,
    members,
    of_bfloat16,
)
from ptx_emulator.machine import Machine, Step
from ptx_emulator.parse import Instruction, UnsupportedError

_TINY = np.finfo(np.float32).tiny


def _is_float(dtype: type) -> bool:
    return np.issubdtype(dtype, np.floating)


def _flushed(value: np.ndarray) -> np.ndarray:
    """Subnormal float32 as 0, which ``.ftz`` asks for."""
    return (
        np.where(np.abs(value) < _TINY, np.copysign(np.float32(0), value), value)
        if value.dtype == np.float32
        else value
    )


def _elementwise(i: Instruction, operands: Operands, dtype: type, function: Callable[..., np.ndarray]) -> Step:
    """One result of one type from operands of that type."""
    sources = [operands.source(text, dtype) for text in i.operands[1:]]
    target = operands.target(i.operands[0], dtype)
    if "ftz" in i.parts:

        def flushing(m: Machine, mask: np.ndarray | None) -> None:
            target(m, _flushed(np.asarray(function(*(_flushed(np.asarray(source(m))) for source in sources)))), mask)

        return flushing
    if len(sources) == 2:
        a, b = sources
        return lambda m, mask: target(m, function(a(m), b(m)), mask)
    return lambda m, mask: target(m, function(*(source(m) for source in sources)), mask)


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    if np.asarray(a).dtype == np.float32:
        # The product is exact in float64; its sum is rounded twice, hardly ever otherwise than once.
        return (np.multiply(a, b, dtype=np.float64) + c).astype(np.float32)
    return a * b + c


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Towards zero; by zero, all bits set."""
    dtype = np.asarray(a).dtype
    if np.issubdtype(dtype, np.unsignedinteger):
        return np.where(b == 0, ~dtype.type(0), a // np.where(b == 0, dtype.type(1), b))
    quotient = np.abs(a) // np.where(b == 0, dtype.type(1), np.abs(b))
    return np.where(b == 0, dtype.type(-1), np.where((a < 0) != (b < 0), -quotient, quotient))


def _shift(i: Instruction, operands: Operands, dtype: type, left: bool) -> Step:
    source, amount = operands.source(i.operands[1], dtype), operands.source(i.operands[2], np.uint32)
    target, width = operands.target(i.operands[0], dtype), 8 * np.dtype(dtype).itemsize
    move = operator.lshift if left else operator.rshift
    beyond = width - 1 if np.issubdtype(dtype, np.signedinteger) else None

    def step(m: Machine, mask: np.ndarray | None) -> None:
        by = amount(m)
        result = move(source(m), np.minimum(by, width - 1).astype(dtype))
        target(m, result if beyond is not None else np.where(by < width, result, dtype(0)), mask)

    return step


def _minimum(largest: bool, parts: list[str], dtype: type) -> Callable[..., np.ndarray]:
    if _is_float(dtype) and "NaN" not in parts:
        function = np.fmax if largest else np.fmin
    else:
        function = np.maximum if largest else np.minimum
    if "relu" in parts:
        return lambda a, b: np.maximum(function(a, b), dtype(0))
    return function


_FLOAT_FUNCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "div": np.divide,
    "sqrt": np.sqrt,
    "rcp": np.reciprocal,
    "rsqrt": lambda a: np.reciprocal(np.sqrt(a)),
    "ex2": np.exp2,
    "lg2": np.log2,
}
_FUNCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": _fma,
    "mad": lambda a, b, c: a * b + c,
    "div": _divide,
    "rem": lambda a, b: a - _divide(a, b) * b,
    "neg": np.negative,
    "abs": np.abs,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
}


@instruction(*_FUNCTIONS, *_FLOAT_FUNCTIONS, "min", "max")
def _compute(i: Instruction, operands: Operands) -> Step:
    name, suffix = i.parts[0], i.parts[-1]
    if suffix.endswith("x2") or suffix == "bf16":
        return _in_halves(i, operands, suffix)
    dtype = TYPES[suffix]
    if "wide" in i.parts or "hi" in i.parts:
        return _long_product(i, operands, dtype)
    if name in ("min", "max"):
        return _elementwise(i, operands, dtype, _minimum(name == "max", i.parts, dtype))
    functions = _FLOAT_FUNCTIONS if _is_float(dtype) and name in _FLOAT_FUNCTIONS else _FUNCTIONS
    if "sat" in i.parts:
        raise UnsupportedError(f"saturation: {i}")
    return _elementwise(i, operands, dtype, functions[name])


def _long_product(i: Instruction, operands: Operands, dtype: type) -> Step:
    """``mul`` and ``mad`` with the whole product, or its upper half."""
    width = 8 * np.dtype(dtype).itemsize
    if width == 64:
        raise UnsupportedError(f"products of 128 bits: {i}")
    long = {16: np.int32, 32: np.int64}[width] if _signed(dtype) else {16: np.uint32, 32: np.uint64}[width]
    a, b = (operands.source(text, dtype) for text in i.operands[1:3])
    result = dtype if "hi" in i.parts else long
    add = operands.source(i.operands[3], result) if i.parts[0] == "mad" else None
    target = operands.target(i.operands[0], result)

    def step(m: Machine, mask: np.ndarray | None) -> None:
        product = np.multiply(a(m), b(m), dtype=long)
        if result is dtype:
            product = (product >> long(width)).astype(dtype)
        target(m, product if add is None else product + add(m), mask)

    return step


def _signed(dtype: type) -> bool:
    return np.issubdtype(dtype, np.signedinteger)


def _in_halves(i: Instruction, operands: Operands, suffix: str) -> Step:
    """One number of 16 bits, or two to a register. Floats are computed in float64 and rounded at the end."""
    name, kind = i.parts[0], suffix.removesuffix("x2")
    word = np.uint32 if suffix.endswith("x2") else np.uint16
    dtype = TYPES[kind] if kind[0] in "us" else np.float64
    function = _minimum(name == "max", i.parts, dtype) if name in ("min", "max") else _FUNCTIONS[name]
    sources = [operands.source(text, word) for text in i.operands[1:]]
    target = operands.target(i.operands[0], word)

    def compute(values: list[np.ndarray]) -> np.ndarray:
        if kind == "bf16":
            return bits_of_bfloat16(function(*(of_bfloat16(v).astype(dtype) for v in values)).astype(np.float32))
        result = function(*(v.view(TYPES[kind]).astype(dtype) for v in values))
        return result.astype(TYPES[kind]).view(np.uint16)

    def step(m: Machine, mask: np.ndarray | None) -> None:
        values = [np.broadcast_to(source(m), (m.lanes,)) for source in sources]
        result = np.zeros(m.lanes, word)
        for by in range(0, 8 * np.dtype(word).itemsize, 16):
            result |= compute([(v >> word(by)).astype(np.uint16) for v in values]).astype(word) << word(by)
        target(m, result, mask)

    return step


@instruction("shl", "shr")
def _shifts(i: Instruction, operands: Operands) -> Step:
    return _shift(i, operands, TYPES[i.parts[-1]], i.parts[0] == "shl")


@instruction("bfe")
def _field(i: Instruction, operands: Operands) -> Step:
    dtype = TYPES[i.parts[-1]]
    width = 8 * np.dtype(dtype).itemsize
    word = UNSIGNED[width]
    source = operands.source(i.operands[1], word)
    first, length = (operands.source(text, np.uint32) for text in i.operands[2:])
    target = operands.target(i.operands[0], word)

    def step(m: Machine, mask: np.ndarray | None) -> None:
        at, bits = (np.asarray(value(m)) & np.uint32(255) for value in (first, length))
        if np.any(at + bits > width) or np.any(bits == 0):
            raise UnsupportedError("a field of bits beyond the register")
        # Up to the left end and back: the sign comes along with an arithmetic shift.
        up = source(m) << (width - at - bits).astype(word)
        target(m, (up.view(dtype) >> (width - bits).astype(dtype)).view(word), mask)

    return step


@instruction("prmt")
def _permute(i: Instruction, operands: Operands) -> Step:
    if i.parts[-1] != "b32":
        raise UnsupportedError(str(i))
    a, b, selector = (operands.source(text, np.uint32) for text in i.operands[1:])
    target = operands.target(i.operands[0], np.uint32)

    def step(m: Machine, mask: np.ndarray | None) -> None:
        both = np.asarray(a(m)).astype(np.uint64) | (np.asarray(b(m)).astype(np.uint64) << np.uint64(32))
        chosen, result = np.asarray(selector(m)).astype(np.uint64), np.uint64(0)
        for byte in range(4):
            select = chosen >> np.uint64(4 * byte)
            value = (both >> ((select & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            sign = (value >> np.uint64(7)) * np.uint64(255)
            result = result | (np.where(select & np.uint64(8), sign, value) << np.uint64(8 * byte))
        target(m, result.astype(np.uint32), mask)

    return step


_COMPARISONS: dict[str, Callable[..., np.ndarray]] = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
    # True for NaN.
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}


@instruction("setp")
def _compare(i: Instruction, operands: Operands) -> Step:
    compare, suffix = _COMPARISONS[i.parts[1]], i.parts[-1]
    targets = [operands.target(name, np.bool_) for name in i.operands[0].split("|")]
    if suffix in ("bf16x2", "f16x2"):
        a, b = (operands.source(text, np.uint32) for text in i.operands[1:])
        number = of_bfloat16 if suffix == "bf16x2" else lambda bits: bits.view(np.float16)

        def halves(m: Machine, mask: np.ndarray | None) -> None:
            both = [np.broadcast_to(source(m), (m.lanes,)) for source in (a, b)]
            for target, by in zip(targets, (0, 16), strict=True):
                target(m, compare(*(number((v >> np.uint32(by)).astype(np.uint16)) for v in both)), mask)

        return halves
    a, b = (_number(operands, text, suffix) for text in i.operands[1:3])
    join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(i.parts[2])
    other = operands.source(i.operands[3], np.bool_) if join else None

    def step(m: Machine, mask: np.ndarray | None) -> None:
        result = compare(a(m), b(m))
        for target, value in zip(targets, (result, ~np.asarray(result)), strict=False):
            target(m, value if join is None or other is None else join(value, other(m)), mask)

    return step


@instruction("selp")
def _select(i: Instruction, operands: Operands) -> Step:
    dtype = UNSIGNED[8 * np.dtype(TYPES[i.parts[-1]]).itemsize]
    a, b = (operands.source(text, dtype) for text in i.operands[1:3])
    chosen, target = operands.source(i.operands[3], np.bool_), operands.target(i.operands[0], dtype)
    return lambda m, mask: target(m, np.where(chosen(m), a(m), b(m)), mask)


@instruction("mov")
def _move(i: Instruction, operands: Operands) -> Step:
    dtype = TYPES[i.parts[-1]]
    if i.operands[0].startswith("{"):
        return _unpack(i, operands, dtype)
    if i.operands[1].startswith("{"):
        return _pack(i, operands, dtype)
    dtype = dtype if dtype is np.bool_ else UNSIGNED[8 * np.dtype(dtype).itemsize]
    source, target = operands.source(i.operands[1], dtype), operands.target(i.operands[0], dtype)
    return lambda m, mask: target(m, source(m), mask)


def _unpack(i: Instruction, operands: Operands, dtype: type) -> Step:
    names = members(i.operands[0])
    width = 8 * np.dtype(dtype).itemsize // len(names)
    source = operands.source(i.operands[1], dtype)
    targets = [operands.target(name, UNSIGNED[width]) for name in names]

    def step(m: Machine, mask: np.ndarray | None) -> None:
        value = source(m)
        for place, target in enumerate(targets):
            target(m, (value >> dtype(place * width)).astype(UNSIGNED[width]), mask)

    return step


def _pack(i: Instruction, operands: Operands, dtype: type) -> Step:
    names = members(i.operands[1])
    width = 8 * np.dtype(dtype).itemsize // len(names)
    sources = [operands.source(name, UNSIGNED[width]) for name in names]
    target = operands.target(i.operands[0], dtype)

    def step(m: Machine, mask: np.ndarray | None) -> None:
        values = (np.asarray(source(m)).astype(dtype) << dtype(place * width) for place, source in enumerate(sources))
        target(m, functools.reduce(np.bitwise_or, values), mask)

    return step


@instruction("cvta")
def _address(i: Instruction, operands: Operands) -> Step:
    source, target = operands.source(i.operands[1], np.uint64), operands.target(i.operands[0], np.uint64)
    return lambda m, mask: target(m, source(m), mask)


@instruction("cvt")
def _convert(i: Instruction, operands: Operands) -> Step:
    *modes, to, of = i.parts[1:]
    if "sat" in modes or "relu" in modes:
        raise UnsupportedError(str(i))
    if to.endswith("x2"):
        return _convert_two(i, operands, to)
    read = _number(operands, i.operands[1], of)
    write = _written(operands, i.operands[0], to)
    if of in ("f16", "f32", "f64", "bf16") and not to.endswith(("f16", "f32", "f64")):
        rounding = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
        function = next((rounding[mode] for mode in modes if mode in rounding), None)
        if function is None:
            raise UnsupportedError(str(i))
        limits = np.iinfo(TYPES[to])

        def whole(m: Machine, mask: np.ndarray | None) -> None:
            value = np.nan_to_num(function(np.asarray(read(m), np.float64)), nan=0)
            clipped = np.clip(value, float(limits.min), float(limits.max))
            # float64 holds the largest int64 rounded up.
            write(m, np.where(value >= float(limits.max), limits.max, clipped.astype(TYPES[to])), mask)

        return whole
    return lambda m, mask: write(m, read(m), mask)


def _convert_two(i: Instruction, operands: Operands, to: str) -> Step:
    high, low = (operands.source(text, np.float32) for text in i.operands[1:])
    target = operands.target(i.operands[0], np.uint32)
    bits = bits_of_bfloat16 if to == "bf16x2" else lambda v: np.asarray(v).astype(np.float16).view(np.uint16)

    def step(m: Machine, mask: np.ndarray | None) -> None:
        upper, lower = (bits(source(m)).astype(np.uint32) for source in (high, low))
        target(m, (upper << np.uint32(16)) | lower, mask)

    return step


def _number(operands: Operands, text: str, suffix: str) -> Source:
    """The operand's value as NumPy has it: bfloat16 as float32."""
    read = operands.source(text, TYPES[suffix])
    return (lambda m: of_bfloat16(read(m))) if suffix == "bf16" else read


def _written(operands: Operands, text: str, suffix: str) -> Target:
    dtype = TYPES[suffix]
    write = operands.target(text, dtype)
    if suffix == "bf16":
        return lambda m, value, mask: write(m, bits_of_bfloat16(value), mask)
    return lambda m, value, mask: write(m, np.asarray(value).astype(dtype), mask)

"""The emulator of PTX: instructions, threads that part, what it refuses, hazards; and two small kernels through Triton."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from block_conv_checks import Case, operands
from block_conv_tiles import check_tiles
from gate_checks import check_against_float64
from ptx_emulator.hazards import HazardError
from ptx_emulator.launch import load
from ptx_emulator.machine import EmulationError, Launch, run
from ptx_emulator.memory import GlobalMemory, MemoryAccessError
from ptx_emulator.parse import UnsupportedError

_WHOLE = """
.visible .entry snippet(
    .param .u64 .ptr .global .align 1 snippet_param_0,
    .param .u64 .ptr .global .align 1 snippet_param_1
)
.reqntid {threads}
{{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<19>;
    .reg .b64 %rd<19>;
    ld.param.b64 %rd1, [snippet_param_0];
    ld.param.b64 %rd2, [snippet_param_1];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd3, %r1, 8;
    add.s64 %rd1, %rd1, %rd3;
    add.s64 %rd2, %rd2, %rd3;
{body}
    ret;
$L__func_end0:
}}
"""


def execute(body: str, values: Tensor, result: Tensor, threads: int = 32, programs: int = 1, shared: int = 0) -> Tensor:
    """Runs a piece of PTX in which %rd1 and %rd2 are each thread's words of 64 bits of ``values`` and ``result``."""
    kernel, steps = load(_WHOLE.format(body=body, threads=threads))
    pointers = {f"snippet_param_{i}": tensor.data_ptr() for i, tensor in enumerate((values, result))}
    sizes = [(tensor.data_ptr(), tensor.untyped_storage().nbytes()) for tensor in (values, result)]
    memory = GlobalMemory(sizes)
    run(Launch(kernel, (programs, 1, 1), threads, shared, pointers, {}, memory), steps)
    return result


def signed(bits: int, width: int) -> int:
    return (bits & (1 << width) - 1) - ((bits >> width - 1 & 1) << width)


def as_float(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits & 0xFFFFFFFF))[0]


def of_float(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def quotient(a: int, b: int) -> int:
    return int(math.copysign(1, a) * math.copysign(1, b)) * (abs(a) // abs(b))


# Instruction, and what Python makes of the unsigned words a and b. Results are 32 bits unless they go to %rd5.
INTEGERS: dict[str, Callable[[int, int], int]] = {
    "add.s32 %r5, %r3, %r4": lambda a, b: a + b,
    "sub.s32 %r5, %r3, -7": lambda a, b: a + 7,
    "mul.lo.s32 %r5, %r3, %r4": lambda a, b: a * b,
    "mul.hi.u32 %r5, %r3, %r4": lambda a, b: a * b >> 32,
    "mul.hi.s32 %r5, %r3, %r4": lambda a, b: signed(a, 32) * signed(b, 32) >> 32,
    "mul.wide.s32 %rd5, %r3, %r4": lambda a, b: signed(a, 32) * signed(b, 32),
    "mad.wide.u32 %rd5, %r3, %r4, %rd4": lambda a, b: a * b + b,
    "mad.lo.s32 %r5, %r3, %r4, 3": lambda a, b: a * b + 3,
    "div.s32 %r5, %r3, %r4": lambda a, b: quotient(signed(a, 32), signed(b, 32)) if b else -1,
    "rem.s32 %r5, %r3, 7": lambda a, b: int(math.fmod(signed(a, 32), 7)),
    "div.u32 %r5, %r3, 7": lambda a, b: a // 7,
    "min.s32 %r5, %r3, %r4": lambda a, b: min(signed(a, 32), signed(b, 32)),
    "max.u32 %r5, %r3, %r4": lambda a, b: max(a, b),
    "min.relu.s32 %r5, %r3, %r4": lambda a, b: max(min(signed(a, 32), signed(b, 32)), 0),
    "shl.b32 %r5, %r3, %r6": lambda a, b: a << (b & 63),
    "shr.u32 %r5, %r3, %r6": lambda a, b: a >> (b & 63),
    "shr.s32 %r5, %r3, %r6": lambda a, b: signed(a, 32) >> (b & 63),
    "bfe.u32 %r5, %r3, 5, 3": lambda a, b: a >> 5 & 7,
    "bfe.s32 %r5, %r3, 5, 3": lambda a, b: signed(a >> 5, 3),
    "not.b32 %r5, %r3": lambda a, b: ~a,
    "xor.b32 %r5, %r3, 0x0F": lambda a, b: a ^ 15,
    "prmt.b32 %r5, %r3, %r4, 0x5410": lambda a, b: a & 0xFFFF | b << 16,
    "prmt.b32 %r5, %r3, %r4, 0x8B23": lambda a, b: int.from_bytes(
        bytes([a >> 24 & 255, a >> 16 & 255, 255 if a >> 31 & 1 else 0, 255 if a >> 7 & 1 else 0]), "little"
    ),
    "setp.lt.s32 %p1, %r3, %r4; selp.b32 %r5, 1, 0, %p1": lambda a, b: signed(a, 32) < signed(b, 32),
    "setp.lt.u32 %p1, %r3, %r4; selp.b32 %r5, 1, 0, %p1": lambda a, b: a < b,
    "cvt.s64.s32 %rd5, %r3": lambda a, b: signed(a, 32),
    "cvt.u64.u32 %rd5, %r3": lambda a, b: a,
    "cvt.u16.u32 %rs1, %r3; cvt.s32.s16 %r5, %rs1": lambda a, b: signed(a, 16),
    "cvt.u16.u32 %rs1, %r3; cvt.s16.s8 %rs2, %rs1; cvt.u32.u16 %r5, %rs2": lambda a, b: signed(a, 8) & 0xFFFF,
    "mov.b64 %rd5, {%r4, %r3}": lambda a, b: b | a << 32,
    "mov.b32 {%rs1, %rs2}, %r3; mov.b32 %r5, {%rs2, %rs1}": lambda a, b: a >> 16 | a << 16,
    "max.s16x2 %r5, %r3, %r4": lambda a, b: (
        max(signed(a, 16), signed(b, 16)) & 0xFFFF | (max(signed(a >> 16, 16), signed(b >> 16, 16)) & 0xFFFF) << 16
    ),
    "mul.bf16x2 %r5, %r3, %r4": lambda a, b: bfloat16_product(a >> 16, b >> 16) << 16 | bfloat16_product(a, b),
    "mov.b32 {%rs1, _}, %r3; setp.gt.bf16 %p1, %rs1, 0x3F80; selp.b32 %r5, 1, 0, %p1": lambda a, b: (
        as_float(a << 16) > 1
    ),
    "cvt.rn.f32.s32 %r5, %r3": lambda a, b: of_float(signed(a, 32)),
    "cvt.rn.bf16x2.f32 %r5, %r3, %r4": lambda a, b: bfloat16(a) << 16 | bfloat16(b),
    "mov.b32 %r5, 0f3FC00000": lambda a, b: 0x3FC00000,
}
FLOATS: dict[str, Callable[[float, float], float]] = {
    "add.f32 %r5, %r3, %r4": lambda a, b: a + b,
    "fma.rn.f32 %r5, %r3, %r4, %r3": lambda a, b: a * b + a,
    "div.full.f32 %r5, %r3, %r4": lambda a, b: float(torch.tensor(a) / torch.tensor(b)),
    "neg.f32 %r5, %r3": lambda a, b: -a,
    "min.f32 %r5, %r3, %r4": lambda a, b: b if math.isnan(a) else a if math.isnan(b) else min(a, b),
    "max.NaN.f32 %r5, %r3, %r4": lambda a, b: math.nan if math.isnan(a) or math.isnan(b) else max(a, b),
    "ex2.approx.f32 %r5, %r3": lambda a, b: 2.0**a,
    "setp.gt.f32 %p1, %r3, %r4; selp.f32 %r5, 0f3F800000, 0f00000000, %p1": lambda a, b: float(a > b),
    "setp.leu.f32 %p1, %r3, %r4; selp.f32 %r5, 0f3F800000, 0f00000000, %p1": lambda a, b: float(not a > b),
    "cvt.rn.f16.f32 %rs1, %r3; cvt.f32.f16 %r5, %rs1": lambda a, b: float(torch.tensor(a).half()),
    "mul.ftz.f32 %r5, %r3, 0f00800000": lambda a, b: a * 2.0**-126 if abs(a) >= 1 else a * 0,
}
WORDS = [0, 1, 7, 31, 32, 33, 0x7F, 0x80, 0x8000, 0x12345678, 0x7FFFFFFF, 0x80000001, 0xFFFFFFF9, 0xFFFFFFFF]
WORDS += [0x3F808000, 0xBEC18001]  # floats that lie in the middle between two of bfloat16, or just beyond
NUMBERS = [0.0, -0.5, 1.0, 1.5, -2.75, 3.0, 10.0, math.nan]


def bfloat16(bits: int) -> int:
    value = torch.tensor([signed(bits, 32)], dtype=torch.int32).view(torch.float32).bfloat16()
    return 0x7FFF if value.isnan() else int(value.view(torch.int16)) & 0xFFFF


def bfloat16_product(a: int, b: int) -> int:
    return bfloat16(of_float(as_float(a << 16) * as_float(b << 16)))


def compute(instruction: str, pairs: list[tuple[int, int]]) -> list[int]:
    """The results of an instruction for words %r3 and %r4, whose lower bits are %r6 too, or %rd4."""
    values = torch.tensor([signed(a | b << 32, 64) for a, b in pairs])
    long = "%rd5" in instruction
    body = f"""
    ld.global.v2.b32 {{%r3, %r4}}, [%rd1];
    and.b32 %r6, %r4, 63;
    cvt.u64.u32 %rd4, %r4;
    {instruction};
    {"" if long else "cvt.u64.u32 %rd5, %r5;"}
    st.global.b64 [%rd2], %rd5;"""
    found = execute(body, values, torch.zeros_like(values), threads=len(pairs))
    return [value & (2**64 - 1 if long else 2**32 - 1) for value in found.tolist()]


@pytest.mark.parametrize("instruction", INTEGERS)
def test_instructions_on_integers(instruction: str) -> None:
    pairs = [(a, b) for a in WORDS for b in WORDS]
    mask = 2**64 - 1 if "%rd5" in instruction else 2**32 - 1
    assert compute(instruction, pairs) == [INTEGERS[instruction](a, b) & mask for a, b in pairs]


@pytest.mark.parametrize("instruction", FLOATS)
def test_instructions_on_floats(instruction: str) -> None:
    pairs = [(a, b) for a in NUMBERS for b in NUMBERS]
    found = compute(instruction, [(of_float(a), of_float(b)) for a, b in pairs])
    expected = torch.tensor([FLOATS[instruction](a, b) for a, b in pairs])
    torch.testing.assert_close(torch.tensor([as_float(bits) for bits in found]), expected, equal_nan=True)


COLLATZ = """
    ld.global.b64 %rd4, [%rd1];
    mov.b64 %rd5, 0;
$loop:
    setp.le.s64 %p1, %rd4, 1;
    @%p1 bra $done;
    and.b64 %rd6, %rd4, 1;
    setp.eq.s64 %p2, %rd6, 0;
    @%p2 bra $even;
    mad.lo.s64 %rd4, %rd4, 3, 1;
    bra.uni $next;
$even:
    shr.u64 %rd4, %rd4, 1;
$next:
    add.s64 %rd5, %rd5, 1;
    bra.uni $loop;
$done:
    st.global.b64 [%rd2], %rd5;"""


def test_threads_part_and_meet_again() -> None:
    def steps(n: int) -> int:
        return 0 if n == 1 else 1 + steps(n // 2 if n % 2 == 0 else 3 * n + 1)

    values = torch.arange(1, 65)
    found = execute(COLLATZ, values, torch.zeros_like(values), threads=64)
    assert found.tolist() == [steps(n) for n in range(1, 65)]


# Each thread stores a word, reads that of the thread 32 further on, and stores again where it did before.
EXCHANGE = """
    mul.lo.s32 %r2, %r1, 8;
    xor.b32 %r3, %r2, 256;
    ld.global.b64 %rd4, [%rd1];
    st.shared.b64 [%r2], %rd4;
    bar.sync 0;
    ld.shared.b64 %rd4, [%r3];
    bar.sync 0;
    st.shared.b64 [%r2], %rd4;
    st.global.b64 [%rd2], %rd4;"""


def exchange(body: str = EXCHANGE, shared: int = 512) -> Tensor:
    values = torch.arange(64)
    return execute(body, values, torch.zeros_like(values), threads=64, shared=shared)


def test_warps_exchange_through_shared_memory() -> None:
    assert exchange().tolist() == [*range(32, 64), *range(32)]


@pytest.mark.parametrize(
    ("missing", "what"), [(0, "no barrier came after"), (1, "without a barrier after another warp's reading")]
)
def test_a_missing_barrier_is_a_hazard(missing: int, what: str) -> None:
    pieces = EXCHANGE.split("bar.sync 0;")
    pieces[missing : missing + 2] = ["".join(pieces[missing : missing + 2])]
    with pytest.raises(HazardError, match=what):
        exchange("bar.sync 0;".join(pieces))


# The same exchange, the words fetched by copies that go on by themselves; the last 8 threads ask for zeros.
COPY = """
    mul.lo.s32 %r2, %r1, 8;
    xor.b32 %r3, %r2, 256;
    setp.lt.u32 %p1, %r1, 56;
    selp.b32 %r4, 8, 0, %p1;
    cp.async.ca.shared.global [%r2], [%rd1], 8, %r4;
    cp.async.commit_group;
    cp.async.wait_group 0;
    bar.sync 0;
    ld.shared.b64 %rd4, [%r3];
    st.global.b64 [%rd2], %rd4;"""


def test_copies_that_go_on_by_themselves() -> None:
    assert exchange(COPY).tolist() == [*range(32, 56), *[0] * 8, *range(32)]
    with pytest.raises(HazardError, match="before the wait for a copy"):
        exchange(COPY.replace("cp.async.wait_group 0;", "cp.async.wait_group 1;"))
    with pytest.raises(HazardError, match="no barrier came after"):
        exchange(COPY.replace("bar.sync 0;", ""))


@pytest.mark.parametrize(
    ("body", "error", "what"),
    [
        ("ld.global.b64 %rd4, [%rd1+8];", MemoryAccessError, "outside of all tensors, 1 times"),
        ("ld.global.b64 %rd4, [%rd1+4];", MemoryAccessError, "isn't a multiple"),
        ("st.global.v2.b64 [%rd2], {%rd1, %rd2};", MemoryAccessError, "isn't a multiple"),
        ("mov.b32 %r2, 512; st.shared.b32 [%r2], 1;", MemoryAccessError, "it has 512 bytes"),
        ("setp.lt.u32 %p1, %r1, 40;\n@%p1 bra $skip;\nbar.sync 0;\nret;\n$skip:\nbar.sync 0;", EmulationError, "hangs"),
        ("setp.lt.u32 %p1, %r1, 8;\n@%p1 elect.sync %r2|%p2, -1;", EmulationError, "only some of 32 threads"),
        ("mov.b32 %r2, 64;\nmbarrier.arrive.expect_tx.shared.b64 _, [%r2], 8;", EmulationError, "no mbarrier"),
        ("$loop:\nbra.uni $loop;", EmulationError, "still runs"),
        ("sin.approx.f32 %r2, %r1;", UnsupportedError, "doesn't know sin.approx.f32"),
    ],
)  # fmt: skip
def test_what_a_device_would_refuse_is_an_error(
    body: str, error: type[Exception], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptx_emulator.machine._MOST_INSTRUCTIONS", 1000)
    with pytest.raises(error, match=what):
        exchange(body)


def test_a_wait_that_nothing_ends_hangs() -> None:
    body = """
    mov.b32 %r2, 64;
    setp.eq.u32 %p1, %r1, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r2], 1;
    bar.sync 0;
    mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 0;"""
    with pytest.raises(EmulationError, match=r"64 at mbarrier\.try_wait"):
        exchange(body)
    exchange(body.replace("mbarrier.try", "@%p1 mbarrier.arrive.shared.b64 _, [%r2];\n    mbarrier.try"))


@pytest.mark.usefixtures("emulator", "poisoned_memory")
def test_gates_of_a_kernel_of_triton() -> None:
    check_against_float64((7, 13), torch.float32, "cpu")


@pytest.mark.usefixtures("emulator", "poisoned_memory")
def test_a_convolution_by_boxes_and_tensor_cores() -> None:
    case = Case(2, 2, 3, 4, 16, 24, 3, 1)
    given = operands(case, torch.bfloat16)
    check_tiles(case, given, given.xs, given.dys, most=1)

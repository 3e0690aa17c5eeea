"""Compiles Triton kernels for a GPU that needn't be there, and reads what the assembler says about them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from interpreter import INTERPRETING

# The names under which Triton assembles: Hopper's wgmma exists on sm_90a alone.
TARGETS = {90: "sm_90a", 80: "sm_80"}


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel takes up.

    Attributes:
        ptx: its PTX, for counting instructions.
        registers: registers per thread.
        stack_bytes: stack frame per thread; 0 unless local arrays or spills are left.
        spill_bytes: bytes of spill stores and loads per thread.
        shared_bytes: shared memory per block.
    """

    ptx: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int


def compile_offline(
    kernel: Any,
    arguments: Mapping[str, str],
    constants: Mapping[str, Any],
    capability: int,
    *,
    aligned: bool = True,
    unaligned: Sequence[str] = (),
    num_warps: int = 4,
    num_stages: int = 3,
) -> Compiled:
    """Compiles a kernel for one of ``TARGETS``.

    Args:
        kernel: a function under ``triton.jit``.
        arguments: Triton type of each argument that is passed at run time, such as "*fp32" or "i32", by name.
        constants: value of each constexpr, by name.
        capability: a key of ``TARGETS``.
        aligned: whether pointers and integers are multiples of 16, as Triton finds out about most at a launch.
        unaligned: names of integers that may be anything all the same, such as those under ``do_not_specialize``.
        num_warps: warps per program.
        num_stages: stages of software pipelining.
    """
    if INTERPRETING:
        pytest.skip("kernels of an interpreted process can't be compiled")
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: arguments.get(name, "constexpr") for name in kernel.arg_names}
    divisible = [
        i
        for i, name in enumerate(kernel.arg_names)
        if name in arguments and name not in unaligned and not arguments[name].startswith(("fp32", "tensordesc"))
    ]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=dict(constants),
        attrs={(i,): [["tt.divisibility", 16]] for i in divisible} if aligned else {},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    report = _assembler_report(triton.knobs.nvidia.ptxas.path, compiled.asm["ptx"], TARGETS[capability])
    stack, stores, loads = _numbers(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
    )
    (registers,) = _numbers(r"Used (\d+) registers", report)
    return Compiled(compiled.asm["ptx"], registers, stack, stores + loads, compiled.metadata.shared)


def _assembler_report(ptxas: str, ptx: str, target: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={target}", str(source), "-o", str(source.with_suffix(".cubin"))]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _numbers(pattern: str, report: str) -> tuple[int, ...]:
    found = re.search(pattern, report)
    assert found, f"no {pattern!r} in the assembler's report:\n{report}"
    return tuple(int(number) for number in found.groups())

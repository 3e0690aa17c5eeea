"""The kernel of compaction compiles for Hopper and Ampere, with nothing left on the stack."""

from __future__ import annotations

import pytest
import torch

from offline_compile import TARGETS, compile_offline

pytest.importorskip("triton")


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("word", ["i8", "i16", "i32", "i64"])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("aligned", [True, False])
def test_gather(word: str, index: torch.dtype, capability: int, aligned: bool) -> None:
    from fastmerge.kernels.compact import gather_triton

    offset = "i32" if index == torch.int32 else "i64"
    compiled = compile_offline(
        gather_triton.gather_kernel,
        {"source_ptr": f"*{word}", "target_ptr": f"*{word}", "outer_ptr": f"*{offset}", "inner_ptr": f"*{offset}"}
        | dict.fromkeys(["first", "last", "row", "run"], offset),
        gather_triton.gather_constants(index),
        capability,
        aligned=aligned,
        unaligned=gather_triton._UNSPECIALIZED,
    )
    assert (compiled.stack_bytes, compiled.spill_bytes) == (0, 0)
    assert compiled.registers <= 128  # four blocks of 128 threads on a multiprocessor at the least
    # 64-bit division is a call of a hundred instructions: it must not be the usual way.
    assert ("div.s64" in compiled.ptx or "rem.s64" in compiled.ptx) == (index == torch.int64)

"""The kernels of the gate sampling compile for Hopper and Ampere, with nothing left on the stack."""

from __future__ import annotations

import re

import pytest
import torch
from fastmerge.kernels.gate.formulas import BETA, GAMMA, ZETA

from offline_compile import TARGETS, compile_offline

triton = pytest.importorskip("triton")

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
by_target = pytest.mark.parametrize("capability", TARGETS)
# Sizes that are no multiples of 16 take the most registers, float64 most of all.
by_dtype = pytest.mark.parametrize(("dtype", "aligned"), [*((dtype, True) for dtype in TYPES), (torch.float64, False)])


@by_target
@by_dtype
def test_forward(dtype: torch.dtype, capability: int, aligned: bool) -> None:
    from fastmerge.kernels.gate import sampling_triton

    pointer = f"*{TYPES[dtype]}"
    compiled = compile_offline(
        sampling_triton.sample_kernel,
        {"loc_ptr": pointer, "seed_ptr": "*i64", "z_ptr": pointer}
        | dict.fromkeys(["n", "channels", "channels_per_seed"], "i32"),
        sampling_triton.sample_constants(dtype, dtype, BETA, GAMMA, ZETA),
        capability,
        aligned=aligned,
    )
    assert (compiled.stack_bytes, compiled.spill_bytes) == (0, 0)
    if aligned:
        assert all(re.search(r"\.v[24]\.", store) for store in re.findall(r"st\.global\S*", compiled.ptx))


@by_target
@by_dtype
def test_backward(dtype: torch.dtype, capability: int, aligned: bool) -> None:
    from fastmerge.kernels.gate import sampling_triton

    pointer = f"*{TYPES[dtype]}"
    strides = {"dz_stride_n": "i32"} if aligned else {"dz_stride_n": "i32", "dz_stride_c": "i32"}
    compiled = compile_offline(
        sampling_triton.sample_backward_kernel,
        {"dz_ptr": pointer, "z_ptr": pointer, "dloc_ptr": pointer, "n": "i32", "channels": "i32"} | strides,
        sampling_triton.sample_backward_constants(dtype, BETA, GAMMA, ZETA) | ({"dz_stride_c": 1} if aligned else {}),
        capability,
        aligned=aligned,
    )
    assert (compiled.stack_bytes, compiled.spill_bytes) == (0, 0)
    if aligned:
        assert all(re.search(r"\.v[248]\.", load) for load in re.findall(r"ld\.global\S*", compiled.ptx))

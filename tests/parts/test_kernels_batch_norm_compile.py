"""The kernels of the fused BatchNorm compile for Hopper and Ampere, with nothing left on the stack and vectors loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from fastmerge.kernels.batch_norm.tiles import patch_warps, patches, tiles

from batch_norm_checks import OTHER_ACTIVATIONS
from offline_compile import TARGETS, Compiled, compile_offline

triton = pytest.importorskip("triton")

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
by_target = pytest.mark.parametrize("capability", TARGETS)
by_dtype = pytest.mark.parametrize("dtype", TYPES)
OPTIONAL = (
    "weight",
    "bias",
    "running_mean",
    "running_var",
    "residual",
    "gate",
    "more",
    "dz",
    "dgate",
    "dgate_parts",
    "batches",
    "dbias",
    "dweight",
    "peak",
    "place",
)
# N, P and C of a layer of ResNet-18, two teachers wide.
LAYER = (256, 56 * 56, 128)
TENSORS = ("x", "y", "dy", "more", "dz", "dx", "residual", "place", "peak")


def compiled(
    kernel: Any,
    dtype: torch.dtype,
    constants: Mapping[str, Any],
    capability: int,
    channels_last: bool = True,
    num_warps: int = 4,
    **given: Any,
) -> Compiled:
    """Compiles a kernel for tensors of one dtype; every argument not ``given`` gets the type that its name tells."""
    constants = (
        {"GATE_VECTOR": 8}
        | dict(constants)
        | {name: value for name, value in given.items() if not isinstance(value, str)}
    )
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = {}
    for name in kernel.arg_names:
        tensor = re.fullmatch(rf"({'|'.join(TENSORS)})_(ptr|stride_[tnpchw])", name)
        if name in constants:
            continue
        if name in given:
            types[name] = given[name]
        elif tensor and tensor[2] == "ptr":
            types[name] = "*i8" if tensor[1] == "place" else f"*{TYPES[dtype]}"
        elif tensor and tensor[2] in (("stride_c",) if channels_last else ("stride_p", "stride_w")):
            constants[name] = 1
        elif name.endswith("_ptr"):
            types[name] = "*i64" if name == "batches_ptr" else "*fp32"
        elif name in ("eps", "momentum", "count"):
            types[name] = "fp32"
        else:
            types[name] = "i64" if name.endswith("_stride_t") else "i32"
    # As at a launch, nothing is known of sizes and strides but what VECTOR tells.
    integers = [name for name, kind in types.items() if kind[0] == "i"]
    return compile_offline(kernel, types, constants, capability, unaligned=integers, num_warps=num_warps)


def check(kernel: Compiled, tensors: int) -> None:
    """Nothing on the stack, and what a thread takes of each of the tensors at once are 16 bytes."""
    assert (kernel.stack_bytes, kernel.spill_bytes) == (0, 0)
    loads = re.findall(r"ld\.global\S*", kernel.ptx)
    assert sum(load.endswith(".v4.b32") for load in loads) >= tensors
    # The rest are places in a window, 8 of one byte, and numbers in float32 of a channel whose positions lie side by side.
    assert {load for load in loads if not load.endswith(".v4.b32")} <= {"ld.global.v2.b32", "ld.global.b32"}


def blocks(
    dtype: torch.dtype, summing: bool, channels_last: bool, layer: tuple[int, int, int] = LAYER, vector: int = 8
) -> dict[str, Any]:
    cut = tiles(*layer, dtype.itemsize, channels_last, summing)
    return {**cut.blocks, "LAST": channels_last, "VECTOR": vector, "STAGES": 1}


# Both layouts in one dtype; the assembler sees no difference between the two of 16 bits but the conversions.
@by_target
@pytest.mark.parametrize(
    ("dtype", "channels_last"),
    [(torch.float32, True), (torch.float16, True), (torch.bfloat16, True), (torch.bfloat16, False)],
)
@pytest.mark.parametrize("name", ["statistics", "normalize", "sums", "input gradient"])
def test_passes(name: str, dtype: torch.dtype, channels_last: bool, capability: int) -> None:
    from fastmerge.kernels.batch_norm import backward_triton, forward_triton, statistics_triton, sums_triton

    # With everything: residual, gates, the gradients of both, a second gradient of the result.
    kernel, summing, tensors, constants = {
        "statistics": (statistics_triton.partial_statistics_kernel, True, 1, {}),
        "normalize": (forward_triton.normalize_kernel, False, 2, {"ACTIVATION": "relu"}),
        "sums": (sums_triton.sum_gradients_kernel, True, 4, {"ACTIVATION": "relu", "DGATE": 2}),
        "input gradient": (
            backward_triton.input_gradient_kernel,
            False,
            2,
            {"ACTIVATION": "relu", "TRAINING": True},
        ),
    }[name]
    constants = constants | blocks(dtype, summing, channels_last)
    result = compiled(kernel, dtype, constants, capability, channels_last)
    check(result, tensors)
    if channels_last:
        # Four programs of 128 threads on a multiprocessor at the least; three where float32 is summed with everything.
        assert result.registers <= (168 if name == "sums" and dtype is torch.float32 else 128)
        # A result leaves in 16 bytes; the sums are single numbers.
        stores = re.findall(r"st\.global\S*", result.ptx)
        assert summing or all(store.endswith(".v4.b32") for store in stores)


@pytest.mark.parametrize("activation", OTHER_ACTIVATIONS)
def test_other_activations(activation: str) -> None:
    from fastmerge.kernels.batch_norm import pool_triton, sums_triton

    constants = {"ACTIVATION": activation, "DGATE": 2} | blocks(torch.bfloat16, True, True)
    sums = compiled(sums_triton.sum_gradients_kernel, torch.bfloat16, constants, 90)
    check(sums, 4)
    constants = pool_triton.window_constants((3, 3, 2, 2, 1, 1)) | {"ACTIVATION": activation, "VECTOR": 8}
    block_h, block_w, block_c = patches(56, 56, 128, 2, True, True)
    constants |= {"BLOCK_H": block_h, "BLOCK_W": block_w, "BLOCK_C": block_c}
    pool = compiled(pool_triton.pool_kernel, torch.bfloat16, constants, 90, True, patch_warps(True, True))
    check(pool, 9)
    # 384 threads on a multiprocessor at the least.
    assert max(sums.registers, pool.registers) <= 168


def test_the_other_passes_with_silu() -> None:
    """What takes most registers: an exponential."""
    from fastmerge.kernels.batch_norm import backward_triton, forward_triton

    for kernel, more in (
        (forward_triton.normalize_kernel, {}),
        (backward_triton.input_gradient_kernel, {"TRAINING": True}),
    ):
        constants = {"ACTIVATION": "silu"} | more | blocks(torch.bfloat16, False, True)
        result = compiled(kernel, torch.bfloat16, constants, 90)
        check(result, 2)
        assert result.registers <= 128


@pytest.mark.parametrize("name", ["normalize", "sums"])
def test_channels_that_are_a_multiple_of_eight_alone(name: str) -> None:
    """What early compaction leaves: Triton itself sees multiples of 16 only."""
    from fastmerge.kernels.batch_norm import forward_triton, sums_triton

    kernel, more = {
        "normalize": (forward_triton.normalize_kernel, {"ACTIVATION": "relu"}),
        "sums": (sums_triton.sum_gradients_kernel, {"ACTIVATION": "relu", "DGATE": 2}),
    }[name]
    constants = more | blocks(torch.bfloat16, name == "sums", True, (256, 56 * 56, 24))
    check(compiled(kernel, torch.bfloat16, constants, 90), 2)


@by_target
@by_dtype
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("pooling", [True, False])
def test_pooling(dtype: torch.dtype, capability: int, channels_last: bool, pooling: bool) -> None:
    from fastmerge.kernels.batch_norm import pool_triton as kernels
    from fastmerge.kernels.batch_norm.unpool_triton import unpool_kernel

    block_h, block_w, block_c = patches(56, 56, 128, dtype.itemsize, channels_last, pooling)
    constants = kernels.window_constants((3, 3, 2, 2, 1, 1)) | {"ACTIVATION": "relu"}
    constants |= {"BLOCK_H": block_h, "BLOCK_W": block_w, "BLOCK_C": block_c, "VECTOR": 8 if channels_last else 1}
    if not pooling:
        constants |= {"TRAINING": True}
    kernel, warps = kernels.pool_kernel if pooling else unpool_kernel, patch_warps(channels_last, pooling)
    result = compiled(kernel, dtype, constants, capability, channels_last, warps)
    assert (result.stack_bytes, result.spill_bytes) == (0, 0)
    # 512 threads on a multiprocessor at the least.
    assert result.registers <= 128
    if channels_last:
        check(result, 9 if pooling else 2)


@by_target
def test_merging(capability: int) -> None:
    from fastmerge.kernels.batch_norm import statistics_triton, sums_triton
    from fastmerge.kernels.batch_norm.walk_triton import MERGE_C, MERGE_PARTS

    constants = {"PARTS": MERGE_PARTS, "BLOCK_C": MERGE_C}
    for kernel, more in (
        (statistics_triton.merge_statistics_kernel, {}),
        (sums_triton.merge_sums_kernel, {"DGATE": 1}),
    ):
        result = compiled(kernel, torch.float32, constants | more, capability)
        assert (result.stack_bytes, result.spill_bytes) == (0, 0)


@pytest.mark.parametrize("kind", ["ones", "nothing optional", "long"])
def test_arguments_that_triton_treats_by_themselves(kind: str) -> None:
    # A 1 becomes a constant, a None too, and what doesn't fit 32 bits is passed in 64.
    from fastmerge.kernels.batch_norm import (
        backward_triton,
        forward_triton,
        pool_triton,
        statistics_triton,
        sums_triton,
        unpool_triton,
    )

    cut = blocks(torch.float16, True, False, vector=1)
    pooling = pool_triton.window_constants((3, 3, 2, 2, 1, 1)) | {"BLOCK_H": 4, "BLOCK_W": 4, "BLOCK_C": 8, "VECTOR": 1}
    merging = {"PARTS": 16, "BLOCK_C": 8}
    for kernel, constants in (
        (statistics_triton.partial_statistics_kernel, cut),
        (statistics_triton.merge_statistics_kernel, merging),
        (forward_triton.normalize_kernel, cut | {"ACTIVATION": "identity"}),
        (sums_triton.sum_gradients_kernel, cut | {"ACTIVATION": "identity", "DGATE": 0}),
        (sums_triton.merge_sums_kernel, merging | {"DGATE": 0}),
        (backward_triton.input_gradient_kernel, cut | {"ACTIVATION": "identity", "TRAINING": False}),
        (pool_triton.pool_kernel, pooling | {"ACTIVATION": "identity"}),
        (unpool_triton.unpool_kernel, pooling | {"ACTIVATION": "identity", "TRAINING": False}),
    ):
        given: dict[str, Any] = {}
        # Optional in other kernels alone.
        needed = {
            "unpool_kernel": ["place_ptr"],
            "input_gradient_kernel": ["dz_ptr"],
            "merge_sums_kernel": ["dbias_ptr", "dweight_ptr"],
        }.get(kernel.__name__, [])
        for name in kernel.arg_names:
            integer = not name.endswith("_ptr") and name not in constants and name not in ("eps", "momentum", "count")
            fixed = name.endswith("_stride_t") or (kind == "ones" and name[-1] not in "pchw")
            if integer and kind != "nothing optional" and not fixed:
                given[name] = 1 if kind == "ones" else "i64"
            if name.removesuffix("_ptr") in OPTIONAL and kind == "nothing optional" and name not in needed:
                given[name] = None
        result = compiled(kernel, torch.float16, constants, 90, channels_last=False, **given)
        assert (result.stack_bytes, result.spill_bytes) == (0, 0)

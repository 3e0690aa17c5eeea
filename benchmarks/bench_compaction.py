"""compact_ beside index_select: rows and columns of weights as a merge of two teachers halves them.

``index_select`` leaves the old tensor standing; ``compact_`` includes giving its memory back. On a GPU the kernel takes the
place of the extension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastmerge.kernels.compact import compact_reference
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from fastmerge import compaction
from fastmerge.compaction import compact_

# Weights of a big student of two ResNet-50s, or of two multilayer perceptrons.
SHAPES = {
    "batchnorm 4096": ((4096,), torch.contiguous_format),
    "linear 4096x4096": ((4096, 4096), torch.contiguous_format),
    "conv 1024x1024x3x3": ((1024, 1024, 3, 3), torch.contiguous_format),
    "conv 1024x1024x3x3 channels-last": ((1024, 1024, 3, 3), torch.channels_last),
    "conv 4096x1024x1x1 channels-last": ((4096, 1024, 1, 1), torch.channels_last),
}


def compact_in_torch(weight: Tensor, keep_out: Tensor, keep_in: Tensor | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compaction, "_compaction", None)
        patch.setattr(compaction, "_warned", True)
        patch.setattr(compaction, "compact", compact_reference)
        compact_(weight, keep_out, keep_in)


def select(weight: Tensor, keep_out: Tensor, keep_in: Tensor | None) -> Tensor:
    rows = weight.index_select(0, keep_out)
    return rows if keep_in is None else rows.index_select(1, keep_in)


OPERATIONS: dict[str, Callable[..., Any]] = {"fused": compact_, "torch": compact_in_torch, "index_select": select}
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def bench_compaction(benchmark: BenchmarkFixture, operation: str, shape: str, device: str) -> None:
    if operation == "fused" and device == "cpu" and compaction._compaction is None:
        pytest.skip("the C++ extension is not built")
    benchmark.group = f"compaction, {shape} {device}"
    size, memory_format = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    keeps = [torch.randperm(n, generator=generator)[: n // 2].sort().values for n in size[:2]]
    if operation == "index_select":
        keeps = [keep.to(device) for keep in keeps]
    keep_in = keeps[1] if len(size) > 1 else None

    def setup() -> tuple[tuple[Tensor, Tensor, Tensor | None], dict[str, None]]:
        return (torch.empty(size, device=device).to(memory_format=memory_format).normal_(), keeps[0], keep_in), {}

    def run(weight: Tensor, keep_out: Tensor, keep_in: Tensor | None) -> None:
        OPERATIONS[operation](weight, keep_out, keep_in)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, setup=setup, rounds=20, warmup_rounds=2)

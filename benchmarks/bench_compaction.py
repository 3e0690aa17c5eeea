"""compact_ beside index_select: rows and columns of weights as a merge of two teachers halves them.

``index_select`` leaves the old tensor standing; ``compact_`` includes giving its memory back.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
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
        compact_(weight, keep_out, keep_in)


def select(weight: Tensor, keep_out: Tensor, keep_in: Tensor | None) -> Tensor:
    rows = weight.index_select(0, keep_out)
    return rows if keep_in is None else rows.index_select(1, keep_in)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operation", [compact_, compact_in_torch, select], ids=["cpp", "torch", "index_select"])
def bench_compaction(
    benchmark: BenchmarkFixture, operation: Callable[[Tensor, Tensor, Tensor | None], Tensor | None], shape: str
) -> None:
    if operation is compact_ and compaction._compaction is None:
        pytest.skip("the C++ extension is not built")
    benchmark.group = f"compaction, {shape}"
    size, memory_format = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    keeps = [torch.randperm(n, generator=generator)[: n // 2].sort().values for n in size[:2]]
    keep_in = keeps[1] if len(size) > 1 else None

    def setup() -> tuple[tuple[Tensor, Tensor, Tensor | None], dict[str, None]]:
        return (torch.empty(size).to(memory_format=memory_format).normal_(), keeps[0], keep_in), {}

    benchmark.pedantic(operation, setup=setup, rounds=20, warmup_rounds=2)

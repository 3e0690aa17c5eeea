"""What the tests of compaction share: both ways through it, and the comparison with index_select."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from fastmerge import compaction
from fastmerge.compaction import compact_

needs_extension = pytest.mark.skipif(compaction._compaction is None, reason="the C++ extension is not built")
by_path = pytest.mark.parametrize("path", [pytest.param("cpp", marks=needs_extension), "torch"])


@contextmanager
def through(path: str) -> Iterator[None]:
    """Runs CPU compaction in C++ or, as if it were not built, in PyTorch."""
    before = compaction._compaction, compaction._warned
    if path == "torch":
        compaction._compaction, compaction._warned = None, True
    try:
        yield
    finally:
        compaction._compaction, compaction._warned = before


def raw(tensor: Tensor) -> Tensor:
    """The bytes behind a tensor's elements: NaN equals NaN and -0 differs from 0."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.testing.make_tensor(shape, dtype=dtype, device="cpu")


def selected(tensor: Tensor, keep_out: Tensor, keep_in: Tensor | None) -> Tensor:
    rows = tensor.detach().index_select(0, keep_out)
    return rows if keep_in is None else rows.index_select(1, keep_in)


def select(size: int, generator: torch.Generator, share: float = 0.5) -> Tensor:
    return torch.randperm(size, generator=generator)[: int(size * share)].sort().values


def check(tensor: Tensor, keep_out: Tensor, keep_in: Tensor | None = None) -> None:
    expected = selected(tensor, keep_out, keep_in)
    storage = tensor.untyped_storage()
    assert compact_(tensor, keep_out, keep_in) is None
    assert tensor.shape == expected.shape
    assert torch.equal(raw(tensor), raw(expected))
    assert tensor.untyped_storage()._cdata == storage._cdata
    assert storage.nbytes() == tensor.numel() * tensor.element_size()

"""What the tests of the compaction kernel share: tensors in many layouts, and the comparison with index_select."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

DTYPES = [torch.bool, torch.bfloat16, torch.float32, torch.complex128]  # words of 1 to 8 bytes, and two of 8
# Smallest, odd, typical, and just past a block of 1024 words.
SHAPES: list[tuple[int, ...]] = [(1,), (7, 1), (65, 17), (1025,), (12, 10, 3, 3), (6, 5, 3, 2, 2), (3, 700), (0, 4)]
Compact = Callable[[Tensor, list["Tensor | None"]], None]
LAYOUTS = ["contiguous", "channels-last", "reversed", "holes"]

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def make(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str = "cpu") -> Tensor:
    """A tensor of any bytes that alone uses its storage."""
    values = torch.randint(0, 2 if dtype is torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    values = values.view(dtype).squeeze(-1).to(device)
    if layout == "channels-last" and len(shape) > 2:
        values = values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "reversed":
        order = tuple(reversed(range(len(shape))))
        values = values.permute(order).contiguous().permute(order)
    if layout == "holes":
        holed = torch.zeros([3 * size for size in shape], dtype=dtype, device=device)
        values = holed[tuple(slice(None, None, 3) for _ in shape)].copy_(values)
    return values.detach()


def keeps_of(tensor: Tensor, seed: int) -> list[list[Tensor | None]]:
    """Rows, columns, both, everything and nothing to keep."""
    generator = torch.Generator().manual_seed(seed)

    def some(dim: int) -> Tensor:
        size = tensor.shape[dim]
        return torch.randperm(size, generator=generator)[: (size + 1) // 2].sort().values

    rest: list[Tensor | None] = [None] * (tensor.dim() - 1)
    cases = [[some(0), *rest], [torch.arange(tensor.shape[0]), *rest], [some(0)[:0], *rest], [None, *rest]]
    if tensor.dim() > 1:
        cases += [[some(0), some(1), *rest[1:]], [None, some(1), *rest[1:]]]
    return cases


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.cpu().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def check_every_layout(compact: Compact, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    for layout in LAYOUTS:
        for case in range(len(keeps_of(make(shape, dtype, layout), 0))):
            tensor = make(shape, dtype, layout, device)
            check_moves(compact, tensor, keeps_of(tensor, 0)[case])


def check_moves(compact: Compact, tensor: Tensor, keeps: list[Tensor | None]) -> None:
    """What stays lies at the front of the memory, densely, in the order of dimensions it had."""
    expected = tensor
    for dim, keep in enumerate(keeps):
        expected = expected if keep is None else expected.index_select(dim, keep.to(tensor.device))
    order = sorted(range(tensor.dim()), key=lambda d: (tensor.shape[d] == 1, -tensor.stride(d)))
    expected = expected.permute(order).contiguous()
    compact(tensor, keeps)
    moved = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    moved.set_(tensor.untyped_storage(), 0, (expected.numel(),), (1,))
    assert torch.equal(as_bytes(moved), as_bytes(expected))

"""Compaction in place of a strided tensor: fused on CUDA, plain PyTorch elsewhere. Formula and plan: ``plan``."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence

import torch
from fastmerge.kernels.compact.plan import memory_order
from torch import Tensor

SCRATCH_BYTES = 1 << 24
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def compact_reference(tensor: Tensor, keeps: Sequence[Tensor | None], scratch_bytes: int = SCRATCH_BYTES) -> None:
    """As :func:`compact`, in plain PyTorch, on any device, a few rows at a time.

    Scratch memory holds one position of the outermost dimension at least, and one of the others may be copied for each
    dimension that is cut.
    """
    order = memory_order(tensor.shape, tensor.stride())
    source = tensor.detach().permute(order)
    indices = [None if (keep := keeps[d]) is None else keep.to(tensor.device) for d in order]
    if all(keep is None for keep in indices):  # holes between the elements close all the same
        indices[0] = torch.arange(source.shape[0], device=tensor.device)
    shape = [size if keep is None else len(keep) for size, keep in zip(source.shape, indices, strict=True)]
    if 0 in shape:
        return
    target = source.as_strided(shape, torch.empty(shape, device="meta").stride())
    row_bytes = math.prod(source.shape[1:]) * tensor.element_size()
    step = max(1, scratch_bytes // row_bytes)
    for first in range(0, shape[0], step):
        last = min(first + step, shape[0])
        rows = source[first:last] if indices[0] is None else source.index_select(0, indices[0][first:last])
        for d, keep in enumerate(indices[1:], start=1):
            rows = rows if keep is None else rows.index_select(d, keep)
        # Some keep is not None, so rows are a copy by now and the target may begin where they lay.
        target[first:last] = rows


def compact(tensor: Tensor, keeps: Sequence[Tensor | None], scratch_bytes: int = SCRATCH_BYTES) -> None:
    """Moves what stays of a tensor to the front of its memory, densely, in the order of dimensions it had there.

    A Triton kernel on a CUDA device where Triton is installed, :func:`compact_reference` elsewhere. The tensor's own shape
    and strides stay as they are, and what lies behind the moved elements is undefined: see ``fastmerge.compaction.compact_``,
    which also checks the arguments.

    Args:
        tensor: strided, at the start of its storage, its elements not overlapping; any dtype.
        keeps: per dimension the int64 indices that stay, ascending and unique, on the CPU; None keeps all.
        scratch_bytes: memory to use beside the tensor's; the reference may take more.
    """
    if tensor.is_cuda and _HAS_TRITON:
        # Imported here: a machine without CUDA never imports Triton.
        from fastmerge.kernels.compact import gather_triton

        gather_triton.compact(tensor, keeps, scratch_bytes)
    else:
        compact_reference(tensor, keeps, scratch_bytes)

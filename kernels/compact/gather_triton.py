"""Triton kernel of compaction in place, imported at the first launch.

Formula and plan: ``plan``. Reference: ``in_place.compact_reference``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from fastmerge.kernels.compact.plan import Plan, make_plan
from torch import Tensor

_BLOCK = 1024
_INT32_WORDS = 2**31 - 2 * _BLOCK


# Each pass has its own: specialised, they would be compiled up to eight times within one compaction.
_UNSPECIALIZED = ["first", "last"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def gather_kernel(
    source_ptr,
    target_ptr,
    outer_ptr,
    inner_ptr,
    first,
    last,
    row,
    run,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One division per program finds the row; what is left is below row + BLOCK, which int32 holds but for huge tensors.
    start = first + tl.program_id(0).to(INDEX) * BLOCK
    first_row = start // row
    place = (start - first_row * row).to(INDEX) + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < last - start
    outer = first_row + place // row
    within = place % row
    offset = (
        tl.load(outer_ptr + outer, inside, other=0) + tl.load(inner_ptr + within // run, inside, other=0) + within % run
    )
    word = tl.load(source_ptr + offset, inside, other=0)
    tl.store(target_ptr + (start - first) + tl.arange(0, BLOCK), word, inside)


def index_dtype(plan: Plan) -> torch.dtype:
    """Dtype of offsets: int32 where the memory has few enough words."""
    return torch.int32 if plan.extent <= _INT32_WORDS else torch.int64


def gather_constants(index: torch.dtype) -> dict[str, Any]:
    """The constexpr arguments of ``gather_kernel``."""
    return {"INDEX": tl.int32 if index == torch.int32 else tl.int64, "BLOCK": _BLOCK}


def compact(tensor: Tensor, keeps: Sequence[Tensor | None], scratch_bytes: int) -> None:
    """Launches ``gather_kernel`` pass by pass; see ``fastmerge.kernels.compact.compact`` for the arguments."""
    plan = make_plan(tensor, keeps)
    if plan.total == 0:
        return
    index = index_dtype(plan)
    outer, inner = (table.to(tensor.device, index) for table in (plan.outer, plan.inner))
    memory = torch.empty(0, dtype=plan.word, device=tensor.device)
    memory.set_(tensor.untyped_storage(), 0, (plan.extent,), (1,))
    passes = list(plan.passes(max(1, scratch_bytes // memory.element_size())))
    scratch = memory.new_empty(max((last - first for first, last, direct in passes if not direct), default=0))
    constants = gather_constants(index)
    with torch.cuda.device_of(tensor):
        for first, last, direct in passes:
            target = memory[first:last] if direct else scratch[: last - first]
            grid = (triton.cdiv(last - first, _BLOCK),)
            gather_kernel[grid](memory, target, outer, inner, first, last, plan.row, plan.run, **constants)
            if not direct:
                memory[first:last] = target

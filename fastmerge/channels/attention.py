"""Attention: a head is one unit, with its rows of query, key and value and what reads it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastmerge.channels.aten import bound
from fastmerge.channels.record import Computed, IdRun


def attention(run: IdRun, func: Any, args: Any, kwargs: Any, out: Tensor) -> Computed | list[Tensor]:
    """``scaled_dot_product_attention`` of tensors (N, ..., heads, positions, channels)."""
    arguments = bound(func, args, kwargs)
    given = (arguments[name] for name in ("query", "key", "value", "attn_mask"))
    query, key, value, mask = (run.find(x) if isinstance(x, Tensor) else None for x in given)
    if query is None or key is None or value is None:
        known = [ids for ids in (query, key, value, mask) if ids is not None]
        return [run.record.collapse(known, run.where(), "attention").expand(out.shape)]
    head = query[..., :1, :1]
    if mask is not None and not run.record.is_constant(mask):
        run.record.unite(head, mask)  # is added to the products, as in attention written out
    for operand in (query, key, value):
        if run.record.is_constant(operand):
            continue
        # fewer keys than queries, each for several
        if operand.dim() > 2 and operand.shape[-3] not in (1, head.shape[-3]):
            operand = operand.repeat_interleave(head.shape[-3] // operand.shape[-3], dim=-3)
        run.record.tie(head, operand)
    if value.shape[-3:-2] != out.shape[-3:-2]:
        value = value.repeat_interleave(out.shape[-3] // value.shape[-3], dim=-3)
    return Computed(value[..., :1, :].expand(out.shape), [])


def matmul(run: IdRun, args: Any, out: Tensor) -> Computed | list[Tensor]:
    """A product of batches of matrices, as in attention written out: each matrix of the batch is one unit."""
    a, b = (run.find(x) for x in args[:2])
    if a is not None and b is not None and run.record.is_constant(a) != run.record.is_constant(b):
        a, b = (None if run.record.is_constant(x) else x for x in (a, b))
    if a is None or b is None or a.dim() < 2 or b.dim() < 2:
        return _with_constant(run, a, b, out)
    a, b = (x.expand(*out.shape[:-2], *x.shape[-2:]) for x in (a, b))
    head = a[..., :1, :1]
    run.record.tie(head, a)
    run.record.tie(head, b)
    if _same(b, b[..., :1, :]):  # probabilities by values: what the values hold
        return Computed(b[..., :1, :].expand(out.shape), [])
    return Computed((a[..., :1] if _same(a, a[..., :1]) else head).expand(out.shape), [])


def _with_constant(run: IdRun, a: Tensor | None, b: Tensor | None, out: Tensor) -> list[Tensor]:
    """By a matrix that is the same for all teachers: what is summed over is one channel, the other dimensions stay."""
    ids, dim = (a, -1) if b is None else (b, -2)
    assert ids is not None
    if (a is None) == (b is None) or ids.dim() < 2 or out.dim() < 2:
        one = run.record.collapse([x for x in (a, b) if x is not None], run.where(), "matmul")
        return [one.expand(out.shape)]
    first = ids.amax(dim=dim, keepdim=True)
    if not _same(ids, first):
        run.record.collapse([ids], run.where(), "matmul")
    return [first.expand(*out.shape[:-2], *(out.shape[-2:]))]


def _same(ids: Tensor, first: Tensor) -> bool:
    return bool((ids == first).all())

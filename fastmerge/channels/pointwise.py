"""Operations element by element: what meets in one is one channel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastmerge.channels.record import NO_ID, Computed, IdRun, compact


def pointwise(run: IdRun, name: str, args: Any, kwargs: Any, out: Any) -> Computed:
    shape = tree_leaves(out)[0].shape
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    found = [(t, ids) for t in tensors if (ids := run.find(t)) is not None]
    hidden = [(t, ids) for t, ids in found if not run.record.is_constant(ids)] or found
    every = [ids.expand(shape) for _, ids in hidden]
    scalars = [ids for ids in every if run.record.is_scalar(ids)]
    operands = [ids for ids in every if not run.record.is_scalar(ids)]
    result = _united(run, name, operands, torch.tensor(NO_ID).expand(shape))
    if scalars and not (operands and _acts_on_channels(run, scalars, result)):
        operands, result = every, _united(run, name, scalars, result)
    for t in tensors:
        if not any(t is other for other, _ in hidden) and t not in run.noise and t.numel() > 1:
            _fixed_positions(run, t, result)
    return Computed(result, operands)


def _united(run: IdRun, name: str, operands: Sequence[Tensor], result: Tensor) -> Tensor:
    """The ids of what meets, all of one shape."""
    for operand in operands:
        a, b = compact(result, operand)
        _unite_pairwise(run, name, a, b)
        result = torch.maximum(a, b).expand(result.shape)
    return result


def _acts_on_channels(run: IdRun, scalars: Sequence[Tensor], ids: Tensor) -> bool:
    """Whether tensors of one element act on several channels and nothing else, which is noted: it makes them none."""
    met = torch.unique(compact(ids))
    if len(met) < 2 or bool(run.record.constant_ids(met).any()):
        return False
    run.record.scalars += [(int(compact(scalar)), met.numpy()) for scalar in scalars]
    return True


def _unite_pairwise(run: IdRun, name: str, a: Tensor, b: Tensor) -> None:
    """Unites what meets, and notes where one channel meets several (a single slope or map for many channels)."""
    meet = (a != NO_ID) & (b != NO_ID)
    if not meet.any():
        return
    a, b = a[meet], b[meet]
    run.record.unite(a, b)
    pairs = torch.unique(a << 32 | b)
    if len(pairs) > min(len(torch.unique(a)), len(torch.unique(b))):
        run.record.mixed.append((run.where(), name, torch.unique(torch.cat([a, b])).numpy()))


def _fixed_positions(run: IdRun, constant: Tensor, ids: Tensor) -> None:
    """A constant that differs from channel to channel: those that meet different entries of it can't change places."""
    small = compact(ids)
    constant = constant.reshape(*[1] * (small.dim() - constant.dim()), *constant.shape)
    varying = [d for d in range(small.dim()) if small.shape[d] > 1 and constant.shape[d] > 1]
    if any(not torch.equal(constant, constant.narrow(d, 0, 1).expand_as(constant)) for d in varying):
        assert run.node is not None
        label = f"constant in {run.node.name} of {run.mode}"
        sizes = [size if d in varying else 1 for d, size in enumerate(small.shape)]
        where = torch.arange(math.prod(sizes)).view(sizes).expand(small.shape)
        meeting = torch.stack([where, small]).flatten(1)[:, small.flatten() != NO_ID]
        entries, met = torch.unique(meeting, dim=1).numpy()
        starts = np.flatnonzero(np.diff(entries, prepend=-1))
        for start, own in zip(starts, np.split(met, starts[1:]), strict=True):
            run.record.patterns.append((f"{label} {entries[start]}", own))

"""Operations that mix the elements of a dimension: pooling, reductions, softmax and cumulative sums."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastmerge.channels.aten import bound, reduced_dims
from fastmerge.channels.record import NO_ID, IdRun, compact


def pool(run: IdRun, name: str, x: Tensor, outs: list[Any]) -> list[Tensor]:
    """Channels stay; a channel of several ids becomes one, as pooling mixes them."""
    spatial = x.dim() - 2
    first = x.flatten(2).amax(dim=2)[(...,) + (None,) * spatial] if spatial else x
    _unite_with(run, name, first, x)
    return [first.expand(t.shape) for t in outs if isinstance(t, Tensor)]


def reduce(run: IdRun, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> Any:
    x: Tensor = run.ids[args[0]]
    arguments = bound(func, args, kwargs)
    dims, keep = reduced_dims(arguments.get("dim"), x.dim()), arguments.get("keepdim", False)
    first = x.amax(dim=dims, keepdim=True)
    _unite_with(run, name, first, x)
    if not keep:
        for d in sorted(dims, reverse=True):
            first = first.squeeze(d)
    return [first] * sum(isinstance(t, Tensor) for t in tree_leaves(out))


def along(run: IdRun, func: Any, name: str, args: Any, kwargs: Any) -> list[Tensor]:
    x: Tensor = run.ids[args[0]]
    first = x.amax(dim=bound(func, args, kwargs)["dim"], keepdim=True)
    _unite_with(run, name, first, x)
    return [first.expand(x.shape)] * 2


def scatter(run: IdRun, name: str, args: Any) -> Tensor:
    """A dimension whose elements are added up where an index says, such as the nodes of a graph."""
    x, dim, _, source = args
    found = [ids.amax(dim=dim, keepdim=True) for t in (x, source) if (ids := run.find(t)) is not None]
    first = found[0].expand([1 if d == dim % x.dim() else size for d, size in enumerate(x.shape)])
    for t in (x, source):
        ids = run.find(t)
        if ids is not None:
            _unite_with(run, name, first, ids)
    return first.expand(x.shape)


def _unite_with(run: IdRun, name: str, first: Tensor, x: Tensor) -> None:
    """Unites ids with the one that stands for them; more than one in a place means that the operation mixes channels."""
    first, x = compact(first.expand(x.shape), x)
    mixed = (first != x) & (x != NO_ID)
    if mixed.any():
        run.record.unite(first, x)
        run.record.mixed.append((run.where(), name, np.unique(x[x != NO_ID].numpy())))

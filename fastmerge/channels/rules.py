"""What each kind of ATen operation does to channel ids.

Movements apply to ids as they apply to numbers; pointwise operations unite what meets; pooling keeps channels; reductions and
normalisations unite or tie what they mix; an operation without a rule unites everything it reads, which is always exact,
because channels that are one are kept from one teacher as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastmerge.channels.operations import (
    ALONG,
    KEEPING,
    LINEAR,
    LINEAR_PREFIXES,
    MOVEMENTS,
    NEW,
    POOLS,
    REDUCTIONS,
    RESHAPES,
    SAME,
    is_pointwise,
)
from fastmerge.channels.record import NO_ID, compact

if TYPE_CHECKING:
    from fastmerge.channels.ids import _IdMode


@dataclass(frozen=True)
class _Computed:
    """The ids of an output, and of all operands it was computed from."""

    ids: Tensor
    operands: list[Tensor]


def apply_rule(mode: _IdMode, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Gives an operation's outputs their ids."""
    name = func.overloadpacket.__name__
    name = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
    known = [t for t in tensors if t in mode.ids]
    random = torch.Tag.nondeterministic_seeded in func.tags
    if not known:
        if random or (tensors and all(t in mode.noise or t.numel() == 1 for t in tensors)):
            for t in tree_leaves(out):
                if isinstance(t, Tensor):
                    mode.noise[t] = True
        return
    if name in NEW:
        if name in ("empty_like", "rand_like", "randn_like"):  # to be filled with noise
            mode.noise[out] = True
        return
    if name == "bernoulli" or (random and name in ("normal", "uniform", "random", "exponential")):
        mode.noise[out] = True
        return
    result = _result(mode, func, name, args, kwargs, out, known)
    if result is not None:
        _write(mode, name, result, out)
    if (
        name not in LINEAR
        and not name.startswith(LINEAR_PREFIXES)
        and not _scaling(name, known)
        and mode.node is not None
    ):
        mode.record.nonlinear_nodes.add((mode.mode, mode.node.name))


def _scaling(name: str, known: list[Tensor]) -> bool:
    return name in ("mul", "div") and len(known) == 1


def _write(mode: _IdMode, name: str, result: Any, out: Any) -> None:
    """Stores the outputs' ids, fresh ones where the operation made new values.

    Args:
        mode: the running mode.
        name: of the operation.
        result: per output its ids, or a pair of them and of the further operands' ids.
        out: the outputs.
    """
    outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    results = result if isinstance(result, (list, tuple)) else [result]
    assert mode.node is not None
    for k, (tensor, ids) in enumerate(zip(outs, results, strict=False)):
        computed = ids if isinstance(ids, _Computed) else _Computed(ids, [])
        ids = computed.ids
        if name not in KEEPING:
            label = f"{mode.node.name} {name} {k} of {mode.mode}"
            ids = mode.record.issue(label, ids, computed.operands, known=name not in mode.mixing)
        mode.ids[tensor] = ids


def _result(mode: _IdMode, func: Any, name: str, args: Any, kwargs: Any, out: Any, known: list[Tensor]) -> Any:
    ids = mode.ids
    if name in SAME:
        return ids[known[0]]
    if name in RESHAPES:
        return ids[args[0]].reshape(out.shape)
    if name in MOVEMENTS:
        return _move(mode, func, args, kwargs)
    if name == "constant_pad_nd":
        return torch.constant_pad_nd(ids[args[0]], args[1], NO_ID)
    if name == "copy":
        return ids[args[1]].expand(out.shape) if args[1] in ids else None
    if name.startswith(POOLS):
        return _pool(mode, name, ids[args[0]], tree_leaves(out))
    if "batch_norm" in name:
        return _batch_norm(mode, args)
    if name == "native_group_norm":
        return _group_norm(mode, args)
    if name == "native_layer_norm" or "rms_norm" in name:
        raise ValueError(
            f"layer '{mode.where()}' is a layer normalisation, which fastmerge can't merge yet: its statistics would mix the "
            "teachers' channels. Networks of convolutions, linear layers and Batch-, Group- or InstanceNorm can be merged"
        )
    if name in ("_local_scalar_dense", "item"):
        raise ValueError(
            f"module '{mode.where()}' can't be traced: it turns a tensor into a Python number, by which the teachers' channels "
            "would depend on each other unseen. Keep it a tensor, and the control flow independent of the data"
        )
    if name == "glu":
        first, second = mode.ids[args[0]].chunk(2, dim=_argument(func, "dim", args, kwargs))
        mode.record.unite(first, second)
        return _Computed(torch.maximum(first, second), [first, second])
    if name in REDUCTIONS and known[0] is args[0]:
        return _reduce(mode, func, name, args, kwargs, out)
    if name in ALONG:
        return _along(mode, func, name, args, kwargs)
    if is_pointwise(name):
        return _pointwise(mode, name, args, kwargs, out)
    return _unknown(mode, name, known, out)


def _move(mode: _IdMode, func: Any, args: Any, kwargs: Any) -> Any:
    def swap(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        if t in mode.ids:
            return mode.ids[t]
        return torch.full(t.shape, NO_ID) if t.is_floating_point() else t.cpu()

    overload = func
    if func.overloadpacket.__name__.endswith("_"):
        overload = getattr(getattr(torch.ops.aten, func.overloadpacket.__name__[:-1]), func._overloadname)
    return overload(*tree_map(swap, args), **tree_map(swap, kwargs))


def _pool(mode: _IdMode, name: str, x: Tensor, outs: list[Any]) -> list[Tensor]:
    """Channels stay; a channel of several ids becomes one, as pooling mixes them."""
    spatial = x.dim() - 2
    first = x.flatten(2).amax(dim=2)[(...,) + (None,) * spatial] if spatial else x
    _unite_with(mode, name, first, x)
    return [first.expand(t.shape) for t in outs if isinstance(t, Tensor)]


def _vector(mode: _IdMode, tensor: Any, dims: int) -> Tensor | None:
    if isinstance(tensor, Tensor) and tensor in mode.ids:
        return mode.ids[tensor].reshape(1, -1, *[1] * (dims - 2))
    return None


def _batch_norm(mode: _IdMode, args: Any) -> _Computed:
    x: Tensor = mode.ids[args[0]]
    operands = []
    for parameter in args[1:5]:
        vector = _vector(mode, parameter, x.dim())
        if vector is not None:
            mode.record.unite(vector, x)
            x = _fill(x, vector)  # a channel of zeros takes a value that depends on the parameters alone
            operands.append(vector)
    if x.dim() > 2:
        mode.record.unite(x.flatten(2).amax(dim=2, keepdim=True), x.flatten(2))
    return _Computed(x, operands)


def _group_norm(mode: _IdMode, args: Any) -> _Computed:
    x: Tensor = mode.ids[args[0]]
    channel = x[:1].flatten(2).amax(dim=2) if x.dim() > 2 else x[:1]
    zeros = channel == NO_ID  # channels of zeros, whose value will depend on the others of their block
    fresh = mode.record.new_ids(int(zeros.sum()))
    mode.record.positions += [("padding", i) for i in fresh.tolist()]
    x = _fill(x, channel.masked_scatter(zeros, fresh).reshape(1, -1, *[1] * (x.dim() - 2)))
    operands = [v for parameter in args[1:3] if (v := _vector(mode, parameter, x.dim())) is not None]
    for vector in operands:
        mode.record.unite(vector, x)
    blocks = x[:1].reshape(args[6], -1)
    mode.record.tie(blocks[:, :1], blocks)
    return _Computed(x, operands)


def _fill(ids: Tensor, others: Tensor) -> Tensor:
    """Other ids where there are none; as it is, and as small, where nothing is missing."""
    return torch.where(ids == NO_ID, others, ids) if bool((compact(ids) == NO_ID).any()) else ids


def _argument(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    for i, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            return args[i] if i < len(args) else kwargs.get(name, argument.default_value)
    return None


def _reduce(mode: _IdMode, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> Any:
    x: Tensor = mode.ids[args[0]]
    dim = _argument(func, "dim", args, kwargs)
    dims = list(range(x.dim())) if dim is None or dim == [] else [dim] if isinstance(dim, int) else list(dim)
    keep = bool(_argument(func, "keepdim", args, kwargs))
    dims = [d % x.dim() for d in dims]
    first = x.amax(dim=dims, keepdim=True)
    _unite_with(mode, name, first, x)
    if not keep:
        for d in sorted(dims, reverse=True):
            first = first.squeeze(d)
    return [first] * sum(isinstance(t, Tensor) for t in tree_leaves(out))


def _along(mode: _IdMode, func: Any, name: str, args: Any, kwargs: Any) -> list[Tensor]:
    x: Tensor = mode.ids[args[0]]
    first = x.amax(dim=_argument(func, "dim", args, kwargs), keepdim=True)
    _unite_with(mode, name, first, x)
    return [first.expand(x.shape)] * 2


def _unite_with(mode: _IdMode, name: str, first: Tensor, x: Tensor) -> None:
    """Unites ids with the one that stands for them; more than one in a place means that the operation mixes channels."""
    first, x = compact(first.expand(x.shape), x)
    mixed = (first != x) & (x != NO_ID)
    if mixed.any():
        mode.record.unite(first, x)
        mode.record.mixed.append((mode.where(), name, np.unique(x[x != NO_ID].numpy())))


def _pointwise(mode: _IdMode, name: str, args: Any, kwargs: Any, out: Any) -> _Computed:
    shape = tree_leaves(out)[0].shape
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    operands = [mode.ids[t].expand(shape) for t in tensors if t in mode.ids]
    result = torch.tensor(NO_ID).expand(shape)
    for operand in operands:
        a, b = compact(result, operand)
        _unite_pairwise(mode, name, a, b)
        result = torch.maximum(a, b).expand(shape)
    for t in tensors:
        if t not in mode.ids and t not in mode.noise and t.numel() > 1:
            _fixed_positions(mode, t, result)
    return _Computed(result, operands)


def _unite_pairwise(mode: _IdMode, name: str, a: Tensor, b: Tensor) -> None:
    """Unites what meets, and notes where one channel meets several (a single slope or map for many channels)."""
    meet = (a != NO_ID) & (b != NO_ID)
    if not meet.any():
        return
    a, b = a[meet], b[meet]
    mode.record.unite(a, b)
    pairs = torch.unique(a << 32 | b)
    if len(pairs) > min(len(torch.unique(a)), len(torch.unique(b))):
        mode.record.mixed.append((mode.where(), name, torch.unique(torch.cat([a, b])).numpy()))


def _fixed_positions(mode: _IdMode, constant: Tensor, ids: Tensor) -> None:
    """A constant that differs from channel to channel: those channels can't change places."""
    small = compact(ids)
    constant = constant.reshape(*[1] * (small.dim() - constant.dim()), *constant.shape)
    varying = [d for d in range(small.dim()) if small.shape[d] > 1 and constant.shape[d] > 1]
    if any(not torch.equal(constant, constant.narrow(d, 0, 1).expand_as(constant)) for d in varying):
        assert mode.node is not None
        label = f"constant in {mode.node.name} of {mode.mode}"
        present = np.unique(small.numpy())
        mode.record.positions += [(f"{label} {k}", int(i)) for k, i in enumerate(present[present != NO_ID])]


def _unknown(mode: _IdMode, name: str, known: list[Tensor], out: Any) -> list[Tensor]:
    one = mode.record.collapse([mode.ids[t] for t in known], mode.where(), name)
    mode.mixing.add(name)
    return [one.expand(t.shape) for t in tree_leaves(out) if isinstance(t, Tensor)]

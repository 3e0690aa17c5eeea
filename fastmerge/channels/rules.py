"""What each kind of ATen operation does to channel ids.

Movements apply to ids as they apply to numbers; pointwise operations unite what meets; pooling keeps channels; reductions and
normalisations unite or tie what they mix; an operation without a rule unites everything it reads, which is always exact,
because channels that are one are kept from one teacher as a whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastmerge.channels.record import NO_ID, compact

if TYPE_CHECKING:
    from fastmerge.channels.ids import _IdMode

_SAME = {
    *("clone", "contiguous", "_to_copy", "alias", "detach", "lift_fresh", "lift_fresh_copy", "to", "zero"),
    *("dropout", "native_dropout", "_fused_dropout"),
}
_RESHAPES = {"view", "_unsafe_view", "reshape", "_reshape_alias"}
_MOVEMENTS = {
    *("permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "repeat", "tile", "flip", "roll", "unfold"),
    *(
        "slice",
        "select",
        "narrow",
        "split",
        "split_with_sizes",
        "unbind",
        "cat",
        "stack",
        "index",
        "index_select",
        "gather",
    ),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle"),
}
_POOLS = (
    "max_pool",
    "avg_pool",
    "adaptive_",
    "_adaptive_",
    "upsample_",
    "_upsample_",
    "reflection_pad",
    "replication_pad",
)
_REDUCTIONS = {
    *("mean", "sum", "amax", "amin", "max", "min", "median", "prod", "var", "std", "var_mean", "std_mean"),
    *("linalg_vector_norm", "norm", "logsumexp", "nanmean", "nansum"),
}
# pointwise operations that PyTorch does not tag as such
_POINTWISE = {
    *("hardswish", "leaky_relu", "prelu", "_prelu_kernel", "rrelu", "rrelu_with_noise", "log_sigmoid_forward"),
    *("hardshrink", "softshrink", "celu", "selu", "where", "lerp"),
}
_ALONG = {"_softmax", "_log_softmax", "softmax", "log_softmax", "cumsum", "cumprod", "sort", "_safe_softmax"}
_LINEAR = {*_SAME, *_RESHAPES, *_MOVEMENTS, "mean", "sum", "add", "sub", "neg", "constant_pad_nd"}
_LINEAR_PREFIXES = ("avg_pool", "adaptive_avg_pool", "_adaptive_avg_pool", "upsample_", "_upsample_")


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
    if name in (
        "empty_like",
        "zeros_like",
        "ones_like",
        "rand_like",
        "full_like",
        "new_zeros",
        "new_empty",
        "new_ones",
        "new_full",
    ):
        return
    if name == "bernoulli" or (random and name in ("normal", "uniform", "random", "exponential")):
        mode.noise[out] = True
        return
    result = _result(mode, func, name, args, kwargs, out, known)
    if result is not None:
        _write(mode, name, result, out)
    if (
        name not in _LINEAR
        and not name.startswith(_LINEAR_PREFIXES)
        and not _scaling(name, known)
        and mode.node is not None
    ):
        mode.record.nonlinear_nodes.add((mode.mode, mode.node.name))


def _scaling(name: str, known: list[Tensor]) -> bool:
    return name in ("mul", "div") and len(known) == 1


def _write(mode: _IdMode, name: str, result: Any, out: Any) -> None:
    outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
    assert mode.node is not None
    for k, (tensor, ids) in enumerate(zip(outs, results, strict=False)):
        mode.ids[tensor] = ids
        present = np.unique(compact(ids).numpy())
        label = f"{mode.node.name} {name} {k} of {mode.mode}"
        mode.record.memberships.append((label, present[present != NO_ID]))


def _result(mode: _IdMode, func: Any, name: str, args: Any, kwargs: Any, out: Any, known: list[Tensor]) -> Any:
    ids = mode.ids
    if name in _SAME:
        return ids[known[0]]
    if name in _RESHAPES:
        return ids[args[0]].reshape(out.shape)
    if name in _MOVEMENTS:
        return _move(mode, func, args, kwargs)
    if name == "constant_pad_nd":
        return torch.constant_pad_nd(ids[args[0]], args[1], NO_ID)
    if name == "copy":
        return ids[args[1]].expand(out.shape) if args[1] in ids else None
    if name.startswith(_POOLS):
        return _pool(mode, ids[args[0]], tree_leaves(out))
    if "batch_norm" in name:
        return _batch_norm(mode, args)
    if name == "native_group_norm":
        return _group_norm(mode, args)
    if name == "native_layer_norm" or "rms_norm" in name:
        raise ValueError(
            f"layer '{mode.where()}' is a layer normalisation, which fastmerge can't merge yet: its statistics would mix the "
            "teachers' channels. Networks of convolutions, linear layers and Batch-, Group- or InstanceNorm can be merged"
        )
    if name == "glu":
        first, second = mode.ids[args[0]].chunk(2, dim=_argument(func, "dim", args, kwargs))
        mode.record.unite(first, second)
        return first
    if name in _REDUCTIONS and known[0] is args[0]:
        return _reduce(mode, func, name, args, kwargs, out)
    if name in _ALONG:
        return _along(mode, func, name, args, kwargs)
    if torch.Tag.pointwise in func.tags or name in _POINTWISE:
        return _pointwise(mode, args, kwargs, out)
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


def _pool(mode: _IdMode, x: Tensor, outs: list[Any]) -> list[Tensor]:
    """Channels stay; a channel of several ids becomes one, as pooling mixes them."""
    spatial = outs[0].dim() - 2
    small = compact(x)
    if small[0, 0].numel() > 1:
        mode.record.unite(small.flatten(2)[..., :1], small.flatten(2))
    per_channel = x.flatten(2)[..., 0] if spatial else x
    return [per_channel.view(*per_channel.shape, *[1] * spatial).expand(t.shape) for t in outs if isinstance(t, Tensor)]


def _vector(mode: _IdMode, tensor: Any, dims: int) -> Tensor | None:
    if isinstance(tensor, Tensor) and tensor in mode.ids:
        return mode.ids[tensor].reshape(1, -1, *[1] * (dims - 2))
    return None


def _batch_norm(mode: _IdMode, args: Any) -> Tensor:
    x: Tensor = mode.ids[args[0]]
    for parameter in args[1:5]:
        vector = _vector(mode, parameter, x.dim())
        if vector is not None:
            mode.record.unite(vector, x)
    if x.dim() > 2:
        mode.record.unite(x.flatten(2)[..., :1], x.flatten(2))
    return x


def _group_norm(mode: _IdMode, args: Any) -> Tensor:
    x: Tensor = mode.ids[args[0]]
    for parameter in args[1:3]:
        vector = _vector(mode, parameter, x.dim())
        if vector is not None:
            mode.record.unite(vector, x)
    blocks = x[:1].reshape(args[6], -1)
    mode.record.tie(blocks[:, :1], blocks)
    return x


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
    first = x
    for d in dims:
        first = first.narrow(d, 0, 1)
    _unite_along(mode, name, first, x)
    if not keep:
        for d in sorted(dims, reverse=True):
            first = first.squeeze(d)
    return [first] * sum(isinstance(t, Tensor) for t in tree_leaves(out))


def _along(mode: _IdMode, func: Any, name: str, args: Any, kwargs: Any) -> list[Tensor]:
    x: Tensor = mode.ids[args[0]]
    _unite_along(mode, name, x.narrow(_argument(func, "dim", args, kwargs), 0, 1), x)
    return [x, x]


def _unite_along(mode: _IdMode, name: str, first: Tensor, x: Tensor) -> None:
    first, x = compact(first.expand(x.shape), x)
    if not torch.equal(first, x):
        mode.record.unite(first, x)
        mode.record.mixed.append((mode.where(), name, np.unique(x.numpy())))


def _pointwise(mode: _IdMode, args: Any, kwargs: Any, out: Any) -> Tensor:
    shape = tree_leaves(out)[0].shape
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    result = torch.tensor(NO_ID).expand(shape)
    for t in tensors:
        if t in mode.ids:
            other = mode.ids[t].expand(shape)
            mode.record.unite(result, other)
            a, b = compact(result, other)
            result = torch.maximum(a, b).expand(shape)
    for t in tensors:
        if t not in mode.ids and t not in mode.noise and t.numel() > 1:
            _fixed_positions(mode, t, result)
    return result


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
    return [one.expand(t.shape) for t in tree_leaves(out) if isinstance(t, Tensor)]

"""What each kind of ATen operation does to channel ids.

Movements apply to ids as they apply to numbers; pointwise operations unite what meets; pooling keeps channels; reductions and
normalisations unite or tie what they mix; an operation without a rule unites everything it reads, which is always exact,
because channels that are one are kept from one teacher as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from fastmerge.channels.aten import (
    ALONG,
    EMBEDDINGS,
    KEEPING,
    LAYER_NORMS,
    LINEAR,
    LINEAR_PREFIXES,
    MOVEMENTS,
    NEW,
    POOLS,
    REDUCTIONS,
    RESHAPES,
    SAME,
    SCATTERS,
    bind,
    bound,
    is_pointwise,
    op_name,
    packet_name,
    reduced_dims,
)
from fastmerge.channels.record import NO_ID, Computed, IdRun, compact
from fastmerge.problems import Problem, UnmergeableError

_COMPOSITE = {*LAYER_NORMS, *EMBEDDINGS, "scaled_dot_product_attention", "matmul", "bmm"}


def apply_rule(run: IdRun, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Gives an operation's outputs their ids."""
    name = packet_name(func)
    tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
    known = [t for t in tensors if run.find(t) is not None]
    random = torch.Tag.nondeterministic_seeded in func.tags
    if not known:
        if random or (tensors and all(t in run.noise or t.numel() == 1 for t in tensors)):
            for t in tree_leaves(out):
                if isinstance(t, Tensor):
                    run.noise[t] = True
        return
    if name in NEW:
        if name in ("empty_like", "rand_like", "randn_like"):  # to be filled with noise
            run.noise[out] = True
        return
    if name == "bernoulli" or (random and name in ("normal", "uniform", "random", "exponential")):
        run.noise[out] = True
        return
    made = bool(args) and isinstance(args[0], Tensor) and run.is_made(args[0])
    result = _result(run, func, name, args, kwargs, out, known)
    if result is not None:
        _write(run, name, result, out)
        if made and func._schema.is_mutable and isinstance(out, Tensor) and out in run.ids:
            run.write(out, run.ids[out])
    if (
        name not in LINEAR
        and not name.startswith(LINEAR_PREFIXES)
        and not (name in ("mul", "div") and len(known) == 1)
        and run.node is not None
    ):
        run.record.nonlinear_nodes.add((run.mode, run.node.name))


def has_own_rule(node: fx.Node) -> bool:
    """Whether there is a rule for a whole operation that consists of others, which would mix what it keeps apart."""
    return op_name(node) in _COMPOSITE or (op_name(node) == "pad" and bind(node)["mode"] != "constant")


def _write(run: IdRun, name: str, result: Any, out: Any) -> None:
    """Stores the outputs' ids, fresh ones where the operation made new values.

    Args:
        run: under way.
        name: of the operation.
        result: per output its ids, or a pair of them and of the further operands' ids.
        out: the outputs.
    """
    outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    results = result if isinstance(result, (list, tuple)) else [result]
    assert run.node is not None
    for k, (tensor, ids) in enumerate(zip(outs, results, strict=False)):
        computed = ids if isinstance(ids, Computed) else Computed(ids, [])
        ids = computed.ids
        if name not in KEEPING:
            label = f"{run.node.name} {name} {k} of {run.mode}"
            ids = run.record.issue(label, ids, computed.operands, known=name not in run.mixing)
        run.ids[tensor] = ids


def _result(run: IdRun, func: Any, name: str, args: Any, kwargs: Any, out: Any, known: list[Tensor]) -> Any:
    ids = run.ids
    if name in SAME:
        return ids[known[0]]
    if name in RESHAPES:
        return ids[args[0]].reshape(out.shape)
    if name in MOVEMENTS and any(t in ids for t in tree_leaves(args[1:]) if isinstance(t, Tensor)):
        return _unknown(run, name, known, out)  # the indices are of what each teacher computed
    if name in MOVEMENTS:
        return _move(run, func, args, kwargs)
    if name == "constant_pad_nd":
        return torch.constant_pad_nd(ids[args[0]], args[1], NO_ID)
    if name == "copy":
        if args[1] not in ids:
            return None
        if args[0] in ids:  # a part of what teachers made: from there on either's channel
            run.record.unite(ids[args[0]], ids[args[1]].expand(out.shape))
            return ids[args[0]]
        return run.write(args[0], ids[args[1]].expand(out.shape))
    if name.startswith(POOLS) or name == "pad":
        return _pool(run, name, ids[args[0]], tree_leaves(out))
    if "batch_norm" in name:
        return _batch_norm(run, args)
    if name == "native_group_norm":
        return _group_norm(run, args)
    if name in LAYER_NORMS:
        return _layer_norm(run, func, args, kwargs)
    if name == "scaled_dot_product_attention":
        return _attention(run, func, args, kwargs, out)
    if name in ("matmul", "bmm"):
        return _matmul(run, args, out)
    if name in EMBEDDINGS and args[0] in ids and len(known) == 1:
        made = out if isinstance(out, Tensor) else out[0]
        return ids[args[0]][:1].expand(made.shape)  # a column per channel; the indices choose the row
    if (
        name in SCATTERS
        and not (args[2] in ids or kwargs)
        and _other_dims(args[0], args[1]) == _other_dims(args[3], args[1])
    ):
        return _scatter(run, name, args)
    if name in ("_local_scalar_dense", "item"):
        what = (
            f"module '{run.where()}' can't be traced: it turns a tensor into a Python number, which hides how channels "
            "depend on each other"
        )
        remedy = "Keep it a tensor, and the control flow independent of the data"
        code = "" if run.node is None else run.node.meta["code"]
        raise UnmergeableError(Problem(what, remedy, run.where(), code))
    if name == "glu":
        first, second = run.ids[args[0]].chunk(2, dim=bound(func, args, kwargs)["dim"])
        run.record.unite(first, second)
        return Computed(torch.maximum(first, second), [first, second])
    if name in REDUCTIONS and known[0] is args[0]:
        return _reduce(run, func, name, args, kwargs, out)
    if name in ALONG:
        return _along(run, func, name, args, kwargs)
    if is_pointwise(name):
        return _pointwise(run, name, args, kwargs, out)
    return _unknown(run, name, known, out)


def _other_dims(x: Tensor, dim: int) -> list[int]:
    return [size for d, size in enumerate(x.shape) if d != dim % x.dim()]


def _move(run: IdRun, func: Any, args: Any, kwargs: Any) -> Any:
    def swap(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        if t in run.ids:
            return run.ids[t]
        return torch.full(t.shape, NO_ID, device="cpu") if t.is_floating_point() else t.cpu()

    return _out_of_place(func)(*tree_map(swap, args), **tree_map(swap, kwargs))


def _out_of_place(func: Any) -> Any:
    """The overload that takes the same arguments and makes a new tensor; ``transpose_.default`` is ``transpose.int``."""
    name = func.overloadpacket.__name__
    if not name.endswith("_"):
        return func
    packet, types = getattr(torch.ops.aten, name[:-1]), [str(a.type) for a in func._schema.arguments]
    overloads = (getattr(packet, overload) for overload in packet.overloads())
    return next(o for o in overloads if [str(a.type) for a in o._schema.arguments] == types)


def _unknown(run: IdRun, name: str, known: list[Tensor], out: Any) -> list[Tensor]:
    one = run.record.collapse([run.ids[t] for t in known], run.where(), name)
    run.mixing.add(name)
    return [one.expand(t.shape) for t in tree_leaves(out) if isinstance(t, Tensor)]


# Pooling, reductions and what runs along a dimension, such as softmax and cumulative sums.


def _pool(run: IdRun, name: str, x: Tensor, outs: list[Any]) -> list[Tensor]:
    """Channels stay; a channel of several ids becomes one, as pooling mixes them."""
    spatial = x.dim() - 2
    first = x.flatten(2).amax(dim=2)[(...,) + (None,) * spatial] if spatial else x
    _unite_with(run, name, first, x)
    return [first.expand(t.shape) for t in outs if isinstance(t, Tensor)]


def _reduce(run: IdRun, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> Any:
    x: Tensor = run.ids[args[0]]
    arguments = bound(func, args, kwargs)
    dims, keep = reduced_dims(arguments.get("dim"), x.dim()), arguments.get("keepdim", False)
    first = x.amax(dim=dims, keepdim=True)
    _unite_with(run, name, first, x)
    if not keep:
        for d in sorted(dims, reverse=True):
            first = first.squeeze(d)
    return [first] * sum(isinstance(t, Tensor) for t in tree_leaves(out))


def _along(run: IdRun, func: Any, name: str, args: Any, kwargs: Any) -> list[Tensor]:
    x: Tensor = run.ids[args[0]]
    first = x.amax(dim=bound(func, args, kwargs)["dim"], keepdim=True)
    _unite_with(run, name, first, x)
    return [first.expand(x.shape)] * 2


def _scatter(run: IdRun, name: str, args: Any) -> Tensor:
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


# Element by element: what meets in one is one channel.


def _pointwise(run: IdRun, name: str, args: Any, kwargs: Any, out: Any) -> Computed:
    shape = tree_leaves(out)[0].shape
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    found = [(t, ids) for t in tensors if (ids := run.find(t)) is not None]
    hidden = [(t, ids) for t, ids in found if not run.record.is_constant(ids)] or found
    every = [ids.expand(shape) for _, ids in hidden]
    scalars = [ids for ids in every if run.record.is_scalar(ids)]
    operands = [ids for ids in every if not run.record.is_scalar(ids)]
    result = _united(run, name, operands, torch.tensor(NO_ID, device="cpu").expand(shape))
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
        where = torch.arange(math.prod(sizes), device="cpu").view(sizes).expand(small.shape)
        meeting = torch.stack([where, small]).flatten(1)[:, small.flatten() != NO_ID]
        entries, met = torch.unique(meeting, dim=1).numpy()
        starts = np.flatnonzero(np.diff(entries, prepend=-1))
        for start, own in zip(starts, np.split(met, starts[1:]), strict=True):
            run.record.patterns.append((f"{label} {entries[start]}", own))


# Normalisations: every channel keeps to itself, to its block, or to those that are kept with it.


def _batch_norm(run: IdRun, args: Any) -> Computed:
    x: Tensor = run.ids[args[0]]
    operands = []
    for parameter in args[1:5]:
        vector = _vector(run, parameter, x.dim())
        if vector is not None:
            run.record.unite(vector, x)
            x = _fill(x, vector)  # a channel of zeros takes a value that depends on the parameters alone
            operands.append(vector)
    if x.dim() > 2:
        run.record.unite(x.flatten(2).amax(dim=2, keepdim=True), x.flatten(2))
    return Computed(x, operands)


def _group_norm(run: IdRun, args: Any) -> Computed:
    x: Tensor = run.ids[args[0]]
    channel = x[:1].flatten(2).amax(dim=2) if x.dim() > 2 else x[:1]
    zeros = channel == NO_ID  # channels of zeros, whose value will depend on the others of their block
    fresh = run.record.new_ids(int(zeros.sum()))
    run.record.positions += [("padding", i) for i in fresh.tolist()]
    x = _fill(x, channel.masked_scatter(zeros, fresh).reshape(1, -1, *[1] * (x.dim() - 2)))
    operands = [v for parameter in args[1:3] if (v := _vector(run, parameter, x.dim())) is not None]
    for vector in operands:
        run.record.unite(vector, x)
    blocks = x[:1].reshape(args[6], -1)
    run.record.tie(blocks[:, :1], blocks)
    return Computed(x, operands)


def _layer_norm(run: IdRun, func: Any, args: Any, kwargs: Any) -> Computed:
    """Statistics over one dimension of channels, weighted by gates, leave them apart; others make all of them one channel.

    Where streams are tied, a teacher's channels have its own statistics, and are kept together.
    """
    x: Tensor = run.ids[args[0]]
    arguments = bound(func, args, kwargs)
    parameters = [arguments.get(name) for name in ("weight", "bias")]
    vectors = [run.ids[p] for p in parameters if isinstance(p, Tensor) and p in run.ids]
    if len(arguments["normalized_shape"]) > 1:
        one = run.record.collapse([x, *vectors], run.where(), "layer_norm")
        return Computed(one.expand(x.shape), [])
    for vector in vectors:
        run.record.unite(vector, x)
        x = _fill(x, vector)
    if run.tie_streams:
        assert run.node is not None
        x = _fill(x, compact(x).amax(-1, keepdim=True))  # zeros among them take the statistics, too
        rows = compact(x).flatten(0, -2).unique(dim=0)
        run.record.tie(rows[:, :1], rows)
        run.record.mixed.append((run.where(), op_name(run.node), np.unique(rows[rows != NO_ID].numpy())))
        return Computed(x, vectors)
    apart = not vectors and not bool(run.record.constant_ids(compact(x)).any())
    if apart and run.node is not None and bool((x != x[(slice(0, 1),) * (x.dim() - 1)]).any()):
        run.record.normalised_apart[run.mode, run.node.name] = x
        return Computed(x, [])
    # tokens may come from several places, such as a class token
    first = x.amax(dim=tuple(range(x.dim() - 1)), keepdim=True)
    run.record.unite(first, x)
    constant = run.record.constant_ids(x.flatten(0, -2)[0] if x.dim() > 1 else x)
    if bool(constant.any()) and not bool(constant.all()):
        raise ValueError(
            f"layer '{run.where()}' normalises channels of the network's input together with hidden ones, which "
            "fastmerge can't merge: the input is the same for all teachers. Normalise them separately"
        )
    channels = first.flatten()
    if len(channels.unique()) > 1:
        assert run.node is not None
        run.record.normalised[run.mode, run.node.name] = channels.numpy()
    return Computed(first.expand(x.shape), vectors)


def _vector(run: IdRun, tensor: Any, dims: int) -> Tensor | None:
    if isinstance(tensor, Tensor) and tensor in run.ids:
        return run.ids[tensor].reshape(1, -1, *[1] * (dims - 2))
    return None


def _fill(ids: Tensor, others: Tensor) -> Tensor:
    """Other ids where there are none; as it is, and as small, where nothing is missing."""
    return torch.where(ids == NO_ID, others, ids) if bool((compact(ids) == NO_ID).any()) else ids


# Attention: a head is one unit, with its rows of query, key and value and what reads it.


def _attention(run: IdRun, func: Any, args: Any, kwargs: Any, out: Tensor) -> Computed | list[Tensor]:
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


def _matmul(run: IdRun, args: Any, out: Tensor) -> Computed | list[Tensor]:
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

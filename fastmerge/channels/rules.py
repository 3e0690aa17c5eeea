"""What each kind of ATen operation does to channel ids.

Movements apply to ids as they apply to numbers; pointwise operations unite what meets; pooling keeps channels; reductions and
normalisations unite or tie what they mix; an operation without a rule unites everything it reads, which is always exact,
because channels that are one are kept from one teacher as a whole.
"""

from __future__ import annotations

from typing import Any

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
)
from fastmerge.channels.attention import attention, matmul
from fastmerge.channels.mixing import along, pool, reduce, scatter
from fastmerge.channels.normalising import batch_norm, group_norm, layer_norm
from fastmerge.channels.pointwise import pointwise
from fastmerge.channels.record import NO_ID, Computed, IdRun
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
        return pool(run, name, ids[args[0]], tree_leaves(out))
    if "batch_norm" in name:
        return batch_norm(run, args)
    if name == "native_group_norm":
        return group_norm(run, args)
    if name in LAYER_NORMS:
        return layer_norm(run, func, args, kwargs)
    if name == "scaled_dot_product_attention":
        return attention(run, func, args, kwargs, out)
    if name in ("matmul", "bmm"):
        return matmul(run, args, out)
    if name in EMBEDDINGS and args[0] in ids and len(known) == 1:
        made = out if isinstance(out, Tensor) else out[0]
        return ids[args[0]][:1].expand(made.shape)  # a column per channel; the indices choose the row
    if (
        name in SCATTERS
        and not (args[2] in ids or kwargs)
        and _other_dims(args[0], args[1]) == _other_dims(args[3], args[1])
    ):
        return scatter(run, name, args)
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
        return reduce(run, func, name, args, kwargs, out)
    if name in ALONG:
        return along(run, func, name, args, kwargs)
    if is_pointwise(name):
        return pointwise(run, name, args, kwargs, out)
    return _unknown(run, name, known, out)


def _other_dims(x: Tensor, dim: int) -> list[int]:
    return [size for d, size in enumerate(x.shape) if d != dim % x.dim()]


def _move(run: IdRun, func: Any, args: Any, kwargs: Any) -> Any:
    def swap(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        if t in run.ids:
            return run.ids[t]
        return torch.full(t.shape, NO_ID) if t.is_floating_point() else t.cpu()

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

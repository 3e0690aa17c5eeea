"""Normalisations over channels that a network's code writes out become the operations of that name.

RMSNorm as in Llama, LayerNorm as in ConvNeXt's channels-first code, ``F.normalize``: sums over channels would make all of them
one; of a normalisation it is known what it needs (``rules``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fastmerge.channels.aten import bind, correction_of, has_effects, op_name, writes_in_place

BY_WIDTH = "by_width"  # of a node: whether its result is multiplied by a function of the number of channels
_TINY = 1e-24  # instead of a least norm of 1e-12


@dataclass(frozen=True)
class _Norm:
    """``(x − mean) / √(mean of squares + eps) · factor`` along a dimension, or without the mean.

    Attributes:
        x: what is normalised.
        dim: along which.
        eps: see above.
        centred: whether the mean is taken off.
        factor: see above.
    """

    x: fx.Node
    dim: int
    eps: float
    centred: bool
    factor: float = 1.0


def recognise_norms(graph: fx.Graph) -> None:
    """Replaces normalisations that are written out, in place."""
    computed: set[fx.Node] = set()  # from the network's input: a weight that is normalised is another thing
    for node in list(graph.nodes):
        if node.op == "placeholder" or not computed.isdisjoint(node.all_input_nodes):
            computed.add(node)
        norm = _written_norm(node) if node in computed else None
        if norm is not None and not any(writes_in_place(user) for user in norm.x.users):
            computed.add(_replace(graph, node, norm))
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and not has_effects(node):
            graph.erase_node(node)


def _replace(graph: fx.Graph, node: fx.Node, norm: _Norm) -> fx.Node:
    aten, meta = torch.ops.aten, node.meta
    rank, shape = len(meta["shape"]), list(meta["shape"])
    is_last = norm.dim == rank - 1
    swap = {norm.dim: rank - 1, rank - 1: norm.dim}
    swapped = {
        **meta,
        "shape": tuple(shape[swap.get(d, d)] for d in range(rank)),
        "sample_dims": [swap.get(d, d) for d in meta["sample_dims"]],
    }

    def call(operation: Any, *args: Any, meta: dict[str, Any]) -> fx.Node:
        new = graph.call_function(operation, args)
        new.meta = dict(meta)
        return new

    with graph.inserting_before(node):
        x = norm.x if is_last else call(aten.transpose.int, norm.x, norm.dim, rank - 1, meta=swapped)
        size = [shape[norm.dim]]
        if norm.centred:
            y = call(aten.layer_norm.default, x, size, None, None, norm.eps, meta=swapped)
        else:
            y = call(aten.rms_norm.default, x, size, None, norm.eps, meta=swapped)
        y.meta[BY_WIDTH] = norm.factor != 1
        y = y if is_last else call(aten.transpose.int, y, norm.dim, rank - 1, meta=meta)
        y = y if norm.factor == 1 else call(aten.mul.Tensor, y, norm.factor, meta=meta)
    node.replace_all_uses_with(y)
    graph.erase_node(node)
    return y


def _written_norm(node: fx.Node) -> _Norm | None:
    """The normalisation that a product or quotient makes, if it does."""
    name = op_name(node)
    if name not in ("mul", "div") or len(node.args) != 2 or node.kwargs or writes_in_place(node):
        return None
    pairs = [node.args] if name == "div" else [node.args, node.args[::-1]]
    for x, scale in pairs:
        if isinstance(x, fx.Node) and isinstance(scale, fx.Node) and "shape" in x.meta:
            found = _by_square_root(x, scale, inverse=name == "mul") or (_by_norm(x, scale) if name == "div" else None)
            if found is not None and node.meta.get("shape") == x.meta["shape"]:
                return found
    return None


def _by_square_root(x: fx.Node, scale: fx.Node, inverse: bool) -> _Norm | None:
    """``x · rsqrt(s + eps)`` or ``x / sqrt(s + eps)`` where s is the mean of x²."""
    power = scale.args[1] if op_name(scale) == "pow" else None
    if op_name(scale) != ("rsqrt" if inverse else "sqrt") and power != (-0.5 if inverse else 0.5):
        return None
    total = scale.args[0]
    if not isinstance(total, fx.Node) or op_name(total) != "add" or len(total.args) != 2:
        return None
    mean, eps = total.args
    if not isinstance(mean, fx.Node) or not isinstance(eps, (int, float)):
        return None
    centred = _centred(x)
    source = x if centred is None else centred[0]
    if op_name(mean) == "var" or (not op_name(mean) and op_name(_first(mean)) == "var_mean" and mean.args[1] == 0):
        of = mean if op_name(mean) else _first(mean)
        if (
            centred is None
            or _one_dim(of) != centred[1]
            or correction_of(bind(of)) != 0
            or of.args[0] not in (x, source)
        ):
            return None
        return _Norm(source, centred[1], float(eps), True)
    dim = _one_dim(mean) if op_name(mean) == "mean" else None
    if dim is None or not _is_square(_first(mean), x):
        return None
    if centred is not None and centred[1] == dim:
        return _Norm(source, dim, float(eps), True)
    return _Norm(x, dim, float(eps), False)


def _by_norm(x: fx.Node, scale: fx.Node) -> _Norm | None:
    """``x / max(‖x‖, 1e-12)``, as ``F.normalize`` writes it."""
    norm = _first(scale) if op_name(scale).startswith("expand") else scale
    least = norm.args[1] if op_name(norm) == "clamp_min" and len(norm.args) == 2 else None
    norm = _first(norm) if least is not None else norm
    if op_name(norm) != "linalg_vector_norm" or norm.args[0] is not x or bind(norm)["ord"] != 2:
        return None
    dim = _one_dim(norm)
    if dim is None or not (least is None or (isinstance(least, float) and least <= 1e-6)):
        return None
    size = x.meta["shape"][dim]
    return _Norm(x, dim, _TINY / size, False, size**-0.5)


def _centred(x: fx.Node) -> tuple[fx.Node, int] | None:
    """Of ``y − mean of y``, y and the dimension."""
    if op_name(x) != "sub" or len(x.args) != 2:
        return None
    source, mean = x.args
    if not isinstance(source, fx.Node) or not isinstance(mean, fx.Node):
        return None
    of = mean
    if not op_name(mean) and mean.args[1] == 1:  # of variance and mean
        of = _first(mean)
    if op_name(of) not in ("mean", "var_mean") or of.args[0] is not source:
        return None
    dim = _one_dim(of)
    return None if dim is None else (source, dim)


def _is_square(node: fx.Node, x: fx.Node) -> bool:
    name = op_name(node)
    if name == "square" or (name == "pow" and node.args[1] == 2):
        return _same(node.args[0], x)
    return name == "mul" and len(node.args) == 2 and _same(node.args[0], x) and _same(node.args[1], x)


def _same(a: Any, b: fx.Node) -> bool:
    """Whether two nodes have one value: a node itself, or the same difference taken twice."""
    return a is b or (isinstance(a, fx.Node) and op_name(a) == op_name(b) == "sub" and a.args == b.args)


def _one_dim(node: fx.Node) -> int | None:
    """The one dimension that a reduction is along, which it keeps."""
    a, source = bind(node), _first(node)
    dims = [a["dim"]] if isinstance(a.get("dim"), int) else a.get("dim")
    if dims is None or len(dims) != 1 or not a.get("keepdim") or "shape" not in source.meta:
        return None
    rank = len(source.meta["shape"])
    dim = dims[0] % rank
    return dim if rank > 1 and dim not in source.meta["sample_dims"] else None


def _first(node: fx.Node) -> fx.Node:
    source = node.args[0]
    return source if isinstance(source, fx.Node) else node

"""What a network's code writes out becomes the layers and normalisations that have rules.

Normalisations over channels become the operations of that name: RMSNorm as in Llama, LayerNorm as in ConvNeXt's channels-first
code, ``F.normalize``. Sums over channels would make all of them one; of a normalisation it is known what it needs (``rules``).

Layers by rows of one parameter become the whole layer, of whose output they take their part: ``nn.MultiheadAttention`` computes
queries by the first third of its weight, keys and values by the rest, where they are not all of one input. A part of a weight
leaves no channels to choose; the whole is one layer, called several times.

A bias that is computed from parameters becomes a sum after the layer: Swin v2 and BEiT give their layer of queries, keys and
values a bias whose middle third is zero. As a sum it is followed by the rules for what is element by element.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fastmerge.channels.aten import LAYERS, bind, correction_of, has_effects, op_name, writes_in_place

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
    of = _first(mean) if _is_entry(mean, 0) else mean
    if op_name(of) in ("var", "var_mean"):
        if (
            centred is None
            or _one_dim(of) != centred[1]
            or correction_of(bind(of)) != 0
            or of.args[0] not in (x, source)
        ):
            return None
        return _Norm(source, centred[1], float(eps), True)
    dim = _one_dim(mean) if op_name(mean) == "mean" else None
    if dim is None:
        return None
    square = _first(mean)
    cast = _first(square)  # T5 casts what it squares alone, to float32: the product is of that dtype, too
    if op_name(cast) in ("to", "_to_copy") and cast.args[0] is x and _is_square(square, cast):
        return _Norm(cast, dim, float(eps), False)
    if not _is_square(square, x):
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
    of = _first(mean) if _is_entry(mean, 1) else mean  # of variance and mean
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
    """The first argument, or the node itself where that is none, such as an input or a parameter."""
    source = node.args[0] if node.args else None
    return source if isinstance(source, fx.Node) else node


def _is_entry(node: fx.Node, number: int) -> bool:
    """Whether a node picks the result of this number from an operation with several."""
    return node.target is operator.getitem and node.args[1:] == (number,)


@dataclass(frozen=True)
class _Rows:
    """Rows of a parameter: of node ``source``, which reads it, those from ``start`` to ``stop``."""

    source: fx.Node
    start: int
    stop: int


def complete_sliced_weights(graph: fx.Graph) -> None:
    """Gives layers the whole of a weight of which they use rows, in place, where nothing else uses it."""
    layers: dict[Any, list[tuple[fx.Node, dict[str, Any]]]] = {}
    for node in graph.nodes:
        if op_name(node) in LAYERS and "transpose" not in op_name(node):
            arguments = bind(node)
            rows = _rows(arguments["weight"])
            if rows is not None:
                layers.setdefault(rows.source.target, []).append((node, arguments))
    for of_weight in layers.values():
        if _are_one_layer(of_weight):
            for node, arguments in of_weight:
                _complete(graph, node, arguments)
    for node in reversed(list(graph.nodes)):  # the slices, or the parameters are used elsewhere, too
        if not node.users and _rows_are_read_by(node):
            graph.erase_node(node)


def _are_one_layer(calls: list[tuple[fx.Node, dict[str, Any]]]) -> bool:
    """Whether layers with rows of a parameter are rows of one layer, and one of them has not all."""
    nodes, kinds, found = {node for node, _ in calls}, set(), []
    for node, arguments in calls:
        weight, bias = _rows(arguments["weight"]), _rows(arguments["bias"])
        assert weight is not None
        if arguments.get("groups", 1) != 1 or (arguments["bias"] is not None and bias is None):
            return False
        if arguments["input"] in (arguments["weight"], arguments["bias"]):  # it reads the rows by themselves
            return False
        if bias is not None and (bias.start, bias.stop) != (weight.start, weight.stop):
            return False
        options = {key: value for key, value in arguments.items() if key not in ("input", "weight", "bias")}
        kinds.add((op_name(node), str(options), None if bias is None else bias.source.target))
        found += [weight] if bias is None else [weight, bias]
    is_whole = all(rows.stop - rows.start == rows.source.meta["shape"][0] for rows in found)
    return not is_whole and len(kinds) == 1 and all(_readers(rows.source) <= nodes for rows in found)


def _complete(graph: fx.Graph, node: fx.Node, arguments: dict[str, Any]) -> None:
    rows = _rows(arguments["weight"])
    assert rows is not None
    dim = 1 if LAYERS[op_name(node)][1] else len(node.meta["shape"]) - 1
    for name in ("weight", "bias"):
        own = _rows(arguments[name])
        if own is not None:
            node.replace_input_with(arguments[name], own.source)
    users, meta = list(node.users), dict(node.meta)
    with graph.inserting_before(node.next):
        cut = graph.call_function(torch.ops.aten.slice.Tensor, (node, dim, rows.start, rows.stop))
        part = graph.call_function(torch.ops.aten.clone.default, (cut,))  # dense, as the code counts on
    cut.meta, part.meta = meta, dict(meta)
    node.meta["shape"] = tuple(rows.source.meta["shape"][0] if d == dim else n for d, n in enumerate(meta["shape"]))
    for user in users:
        user.replace_input_with(node, part)


def _rows(node: Any) -> _Rows | None:
    """The rows of a parameter that a node is, if it is some."""
    if not isinstance(node, fx.Node):
        return None
    shape = node.meta.get("shape")
    if node.op == "get_attr":
        return _Rows(node, 0, shape[0]) if shape else None
    source, part = node, None
    if node.target is operator.getitem:
        source, part = node.args  # type: ignore[assignment]
    if not _rows_are_read_by(source):
        return None
    arguments = bind(source)
    inner = _rows(arguments["self"])
    if inner is None or arguments["dim"] != 0 or not isinstance(shape, tuple):
        return None
    length, name = inner.stop - inner.start, op_name(source)
    try:
        if name == "slice":
            if arguments["step"] != 1:
                return None
            start = slice(arguments["start"], arguments["end"]).indices(length)[0]
        elif name == "narrow":
            start = arguments["start"] % length
        elif name == "split_with_sizes":
            start = sum(arguments["split_sizes"][:part])
        else:
            size = arguments["split_size"] if name == "split" else -(-length // arguments["chunks"])
            start = size * part
    except TypeError:  # a number that the code computes
        return None
    return _Rows(inner.source, inner.start + start, inner.start + start + shape[0])


def _rows_are_read_by(node: fx.Node) -> bool:
    """Whether a node may be what takes rows of a tensor, or one of several that it took."""
    return node.target is operator.getitem or op_name(node) in ("slice", "narrow", "split", "split_with_sizes", "chunk")


def _readers(source: fx.Node) -> set[fx.Node]:
    """The nodes that read a parameter, or rows of it."""
    found: set[fx.Node] = set()
    same: Iterable[fx.Node] = [n for n in source.graph.nodes if n.op == "get_attr" and n.target == source.target]
    waiting = [*same]
    while waiting:
        for user in waiting.pop().users:
            if _rows_are_read_by(user):
                waiting.append(user)
            else:
                found.add(user)
    return found


def part_computed_biases(graph: fx.Graph) -> None:
    """Takes computed biases out of convolutions and linear layers, in place."""
    from_input: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.op == "placeholder" or not from_input.isdisjoint(node.all_input_nodes):
            from_input.add(node)
        bias = bind(node).get("bias") if op_name(node) in LAYERS else None
        if not isinstance(bias, fx.Node) or bias.op == "get_attr" or bias in from_input:
            continue
        _, spatial_dims = LAYERS[op_name(node)]
        node.replace_input_with(bias, None)
        users = list(node.users)
        with graph.inserting_before(node.next):
            if spatial_dims:
                meta = {**bias.meta, "shape": (*bias.meta["shape"], *[1] * spatial_dims)}
                bias = graph.call_function(torch.ops.aten.view.default, (bias, [-1, *[1] * spatial_dims]))
                bias.meta = meta
            added = graph.call_function(torch.ops.aten.add.Tensor, (node, bias))
            added.meta = dict(node.meta)
        for user in users:
            user.replace_input_with(node, added)

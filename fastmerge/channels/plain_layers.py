"""Layers whose weight or bias the code puts together become plain layers, and what it does besides.

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

from fastmerge.channels.aten import LAYERS, bind, op_name


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

"""Computed weights in a lowered graph: the teachers' operations once, on the rows and columns of all teachers."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fastmerge.channels.aten import bind, correction_of, is_pointwise, op_name, reduced_dims
from fastmerge.channels.computed_weights import KEPT, REDUCTIONS, Axes, RowProgram
from fastmerge.wide.computed_weights import joined_weight, spread, weighted_norm, weighted_reduction


def compute_weight(
    graph: fx.Graph,
    program: RowProgram,
    tensors: Mapping[fx.Node, fx.Node],
    lengths: Sequence[int],
    columns: fx.Node | None,
) -> fx.Node:
    """Adds to a graph what computes a layer's weight.

    Args:
        graph: the big student's.
        program: how a teacher computes it.
        tensors: per tensor that it reads, that of all teachers.
        lengths: of the dimensions of all teachers' parameter in one.
        columns: what :func:`~fastmerge.wide.computed_weights.column_weights` gave; None where rows are a teacher's own.
    """
    return _Rows(graph, program, dict(tensors), lengths, columns).run()


class _Rows:
    def __init__(
        self,
        graph: fx.Graph,
        program: RowProgram,
        values: dict[fx.Node, fx.Node],
        lengths: Sequence[int],
        columns: fx.Node | None,
    ) -> None:
        self.graph, self.program, self.values = graph, program, values
        self.lengths, self.columns = lengths, columns

    def run(self) -> fx.Node:
        for node in self.program.axes:
            if node not in self.values:
                self.values[node] = self._operation(node, op_name(node))
        weight = self.values[self.program.weight]
        if self.columns is None:
            return weight
        shares = self.graph.call_function(operator.getitem, (self.columns, 1))
        return self.graph.call_function(joined_weight, (weight, shares))

    def _operation(self, node: fx.Node, name: str) -> fx.Node:
        if name in ("batch_norm", "layer_norm"):
            return self._norm(bind(node), name)
        if name in REDUCTIONS:
            return self._reduction(node, name)
        if not name or name in KEPT or is_pointwise(name):
            return self._same(node)
        return self.graph.call_function(torch.reshape, (self.values[node.all_input_nodes[0]], self._sizes(node)))

    def _sizes(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of all teachers' value of a node; 1 where a teacher's merely repeats."""
        return tuple(math.prod(self.lengths[axis] for axis in axes) for axes in self.program.axes[node])

    def _weights(self, source: fx.Node, dims: Sequence[int]) -> fx.Node | None:
        """What each element of a value counts in a reduction; None where all count alike."""
        axes: Axes = self.program.axes[source]
        if self.columns is None or not any(1 in axes[d] for d in dims):
            return None
        present = {axis for own in axes for axis in own}
        lengths = tuple(n if axis in present else 1 for axis, n in enumerate(self.lengths))
        weights = self.graph.call_function(operator.getitem, (self.columns, 0))
        return self.graph.call_function(spread, (weights, lengths, self._sizes(source)))

    def _reduction(self, node: fx.Node, name: str) -> fx.Node:
        arguments, source = bind(node), node.all_input_nodes[0]
        dims = sorted(reduced_dims(arguments.get("dim"), len(self.program.axes[source])))
        weights = self._weights(source, dims)
        if weights is None:
            return self._same(node)
        keeps = bool(arguments.get("keepdim", False))
        args = (name, self.values[source], weights, dims, keeps, correction_of(arguments))
        return self.graph.call_function(weighted_reduction, args)

    def _norm(self, a: Mapping[str, Any], name: str) -> fx.Node:
        """Statistics of a row: of all dimensions but the rows' of a batch normalisation, or of the last ones."""
        source = a["input"]
        rank = len(self.program.axes[source])
        is_batch = name == "batch_norm"
        dims = [d for d in range(rank) if d != 1] if is_batch else [*range(rank - len(a["normalized_shape"]), rank)]
        weights = self._weights(source, dims)
        if weights is None:
            x = self.values[source]
            weights = self.graph.call_function(torch.ones_like, (x,))
        scale, shift = (self.values.get(a[key]) for key in ("weight", "bias"))
        return self.graph.call_function(weighted_norm, (self.values[source], weights, dims, scale, shift, a["eps"]))

    def _same(self, node: fx.Node) -> fx.Node:
        arguments = fx.map_arg((node.args, dict(node.kwargs)), self.values.__getitem__)
        return self.graph.create_node(node.op, node.target, *arguments)

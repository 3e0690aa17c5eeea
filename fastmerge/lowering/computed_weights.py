"""Computed weights in a lowered graph: the teachers' operations once, on the rows and columns of all teachers.

Statistics of a row are weighted by the gates. With open gates they are those over its own teacher's columns, and columns of
other teachers count nothing; with the gates of as many columns as one teacher has at 1 and the others at 0, they are the
student's, over the columns that are kept. Gates of a batch count by their mean, so that there is one weight for all samples.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fastmerge.channels.aten import bind, correction_of, is_pointwise, op_name, reduced_dims
from fastmerge.channels.layer_calls import KEPT, REDUCTIONS, Axes, RowProgram
from fastmerge.wide.layer_norm import coupling_of
from fastmerge.wide.streams import GateStreams


def column_weights(
    gates: Tensor | None, rows: Sequence[int], size: int, like: Tensor, *, gate: GateStreams
) -> tuple[Tensor, Tensor]:
    """How much each column counts in the statistics of each row, and in the layer: two tensors (rows, columns).

    A column with gate g counts g in rows of its own teacher and c·g in others' rows, ``c = clamp((1 − ḡ) / (1 − 1/T), 0, 1)``,
    where ḡ is the mean gate of all T·n columns. What other teachers' columns contribute to the layer is scaled by c, too.

    Args:
        gates: (N or 1, all streams' columns), or None for open gates.
        rows: per teacher how many.
        size: T·n, the columns of all teachers before any was dropped, which count as closed.
        like: a tensor of the dtype and on the device of the result.
        gate: the module that knows which gate belongs to which column.
    """
    count, sizes = len(rows), gate.sizes
    g = like.new_ones(sum(sizes)) if gates is None else gates.mean(0).to(like.dtype)
    coupling = coupling_of(g.sum(), size, size / count)
    own, shares = [], []
    for t in range(count):
        share = torch.cat(
            [torch.ones_like(part) * (1 if s == t else coupling) for s, part in enumerate(g.split(sizes))]
        )
        shares.append(share.expand(rows[t], -1))
        own.append((share * g).expand(rows[t], -1))
    return torch.cat(own), torch.cat(shares)


def _spread(weights: Tensor, lengths: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Weights of columns as a tensor that lies like a value.

    Args:
        weights: (rows, columns).
        lengths: of the axes of the parameter, 1 for those that the value does not have.
        shape: of the value.
    """
    return weights.view(*weights.shape, *[1] * (len(lengths) - 2)).expand(tuple(lengths)).reshape(tuple(shape))


def _weighted_reduction(
    name: str, x: Tensor, weights: Tensor, dims: Sequence[int], keepdim: bool, correction: float = 0
) -> Tensor | tuple[Tensor, Tensor]:
    """A reduction of ATen's in which each element counts by a weight.

    Args:
        name: "mean", "sum", "var", "std", "var_mean", "std_mean", or that of a norm.
        x: what to reduce.
        weights: of its shape.
        dims: along which.
        keepdim: whether they stay, of length 1.
        correction: of a variance.
    """
    dims = list(dims)
    if name == "sum":
        return (weights * x).sum(dims, keepdim)
    if name in ("linalg_vector_norm", "norm"):
        return (weights * x.square()).sum(dims, keepdim).sqrt()
    total = weights.sum(dims, keepdim=True)
    mean = (weights * x).sum(dims, keepdim=True) / total
    whole = mean if keepdim else mean.squeeze(dims)
    if name == "mean":
        return whole
    var = (weights * (x - mean).square()).sum(dims, keepdim=True) / (total - correction)
    var = var if keepdim else var.squeeze(dims)
    var = var.sqrt() if name.startswith("std") else var
    return (var, whole) if name.endswith("mean") else var


def _weighted_norm(
    x: Tensor, weights: Tensor, dims: Sequence[int], scale: Tensor | None, shift: Tensor | None, eps: float
) -> Tensor:
    """``(x − mean) / √(var + eps) · scale + shift`` over some dimensions, each element counting by a weight.

    Args:
        x: what to normalise.
        weights: of its shape.
        dims: of the statistics.
        scale, shift: of dimension 1, or None.
        eps: see above.
    """
    var, mean = _weighted_reduction("var_mean", x, weights, dims, keepdim=True)
    y = (x - mean) * (var + eps).rsqrt()
    shape = [-1 if d == 1 else 1 for d in range(x.dim())]
    y = y if scale is None else y * scale.view(shape)
    return y if shift is None else y + shift.view(shape)


def _joined_weight(weight: Tensor, shares: Tensor) -> Tensor:
    """A computed weight, columns of other teachers scaled by how much they count."""
    return weight * shares.view(*shares.shape, *[1] * (weight.dim() - 2))


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
        columns: what :func:`column_weights` gave; None where rows are a teacher's own.
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
        return self.graph.call_function(_joined_weight, (weight, shares))

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
        return self.graph.call_function(_spread, (weights, lengths, self._sizes(source)))

    def _reduction(self, node: fx.Node, name: str) -> fx.Node:
        arguments, source = bind(node), node.all_input_nodes[0]
        dims = sorted(reduced_dims(arguments.get("dim"), len(self.program.axes[source])))
        weights = self._weights(source, dims)
        if weights is None:
            return self._same(node)
        keeps = bool(arguments.get("keepdim", False))
        args = (name, self.values[source], weights, dims, keeps, correction_of(arguments))
        return self.graph.call_function(_weighted_reduction, args)

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
        return self.graph.call_function(_weighted_norm, (self.values[source], weights, dims, scale, shift, a["eps"]))

    def _same(self, node: fx.Node) -> fx.Node:
        arguments = fx.map_arg((node.args, dict(node.kwargs)), self.values.__getitem__)
        return self.graph.create_node(node.op, node.target, *arguments)

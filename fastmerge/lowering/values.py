"""What each value of a teacher's graph becomes in the big student's: shared, T streams, or the streams joined in one tensor.

An operation may run once on the joined tensor, instead of once per stream, where it treats each channel alone: there is a list
of what is known to do so.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from fastmerge.channels.aten import (
    NORMS,
    RESHAPES,
    SAME,
    SPATIAL,
    SPATIAL_DROPOUTS,
    bind,
    is_pointwise,
    is_size,
    may_alias,
    op_name,
    writes_in_place,
)
from fastmerge.wide.streams import concatenate_joined, mean_of_streams, split_streams


@dataclass(frozen=True)
class Placement:
    """Where the channels lie in a joined tensor.

    Attributes:
        dim: the dimension, from 0.
        channels: of one teacher.
        rank: number of dimensions.
    """

    dim: int
    channels: int
    rank: int


@dataclass
class Memory:
    """What joined values that may share memory have in common.

    Attributes:
        split: whether one of them was taken apart.
    """

    split: bool = False


@dataclass
class JoinedValue:
    """The streams of a value in one tensor, teacher by teacher.

    Attributes:
        node: the tensor.
        place: where its channels lie.
        memory: shared with values that may be views of it.
        streams: its streams, once it was taken apart.
    """

    node: fx.Node
    place: Placement
    memory: Memory = field(default_factory=Memory)
    streams: list[fx.Node] | None = None


Value = fx.Node | list[fx.Node] | JoinedValue


class Values:
    """The values of one graph, and the operations that take them apart.

    Args:
        graph: the big student's.
        num_teachers: T.

    Attributes:
        current: by node of the teacher's graph what it became, gated as soon as a layer read it.
        ungated: likewise without gates, where there are any.
        split: streams that may share memory with a joined tensor.
    """

    def __init__(self, graph: fx.Graph, num_teachers: int) -> None:
        self.graph, self.num_teachers = graph, num_teachers
        self.current: dict[fx.Node, Value] = {}
        self.ungated: dict[fx.Node, Value] = {}
        self.split: set[fx.Node] = set()

    def of(self, node: fx.Node, ungated: bool = False) -> Value:
        """The value of a node of the teacher's graph."""
        return self.ungated.get(node, self.current[node]) if ungated else self.current[node]

    def part(self, values: fx.Node, index: int) -> fx.Node:
        """One of several results of a call."""
        return self.graph.call_function(operator.getitem, (values, index))

    def parts(self, values: fx.Node) -> list[fx.Node]:
        """The T results of a call."""
        return [self.part(values, t) for t in range(self.num_teachers)]

    def take_apart(self, value: JoinedValue) -> list[fx.Node]:
        """The streams of a joined value, without a copy."""
        if value.streams is None:
            args = (value.node, self.num_teachers, value.place.dim)
            value.streams = self.parts(self.graph.call_function(split_streams, args))
            value.memory.split = True
            self.split.update(value.streams)
        return value.streams

    def pick(self, arguments: Any, teacher: int, ungated: bool = False) -> Any:
        """The arguments of an operation of the teacher's graph, with one teacher's streams for its nodes."""

        def one(node: fx.Node) -> fx.Node:
            value = self.of(node, ungated)
            if isinstance(value, JoinedValue):
                value = self.take_apart(value)
            return value[teacher] if isinstance(value, list) else value

        return fx.map_arg(arguments, one)

    def returned(self, node: fx.Node) -> fx.Node:
        """What the network returns for a node: the teachers' mean where they differ."""
        value = self.of(node, ungated=True)
        if isinstance(value, JoinedValue):
            value = self.take_apart(value)
        return self.graph.call_function(mean_of_streams, tuple(value)) if isinstance(value, list) else value


def nodes_of(value: Value) -> list[fx.Node]:
    """The nodes that a value consists of: T streams, or one joined or shared tensor."""
    return [value.node] if isinstance(value, JoinedValue) else value if isinstance(value, list) else [value]


Shape = tuple[int, ...]
_SPATIAL_DIMS = {f"{name}{d}d": d for name in SPATIAL for d in (1, 2, 3)}
_REDUCTIONS = {"mean", "sum", "amax", "amin"}
_RESHAPED = {*RESHAPES, "flatten", "unflatten"}


@dataclass(frozen=True)
class JoinedCall:
    """An operation to run on joined tensors.

    Attributes:
        placement: of the result.
        may_alias: whether the result may share memory with what it was computed from.
        call: what to emit instead of the operation itself: a function and its further arguments; None: the operation.
    """

    placement: Placement
    may_alias: bool = False
    call: tuple[Callable[..., Any], tuple[Any, ...]] | None = None


def joined_call(
    node: fx.Node, operands: Mapping[fx.Node, Placement], shape: Shape | None, num_teachers: int
) -> JoinedCall | None:
    """How an operation runs on joined tensors; None if it must run per stream.

    Args:
        node: of a teacher's graph; not a layer.
        operands: those of its operands that are joined.
        shape: of one teacher's result, if it is a tensor.
        num_teachers: T.
    """
    tensors = [source for source in node.all_input_nodes if not is_size(source)]
    if shape is None or not operands or any(source not in operands for source in tensors):
        return None
    name, placements = op_name(node), list(operands.values())
    first = placements[0]
    result = replace(first, rank=len(shape))
    if is_pointwise(name) or name in SAME:
        fits = set(placements) == {first} and len(shape) == first.rank
        return JoinedCall(result, may_alias(node)) if fits and name != "type_as" else None
    if name in _SPATIAL_DIMS or name in SPATIAL_DROPOUTS:
        spatial = _SPATIAL_DIMS.get(name, first.rank - 2)
        fits = len(placements) == 1 and first.dim == 1 and first.rank == spatial + 2 == len(shape)
        return JoinedCall(result) if fits else None
    if name.startswith(("upsample_", "_upsample_")):
        return JoinedCall(result) if len(placements) == 1 and first.dim == 1 and first.rank > 2 else None
    if name in ("pad", "constant_pad_nd"):
        return JoinedCall(result) if first.dim < first.rank - len(bind(node)["pad"]) // 2 else None
    if name == "flatten":
        return _flatten(node, first, shape)
    if name in RESHAPES:
        return _flattening_view(node, first, shape)
    if name in _REDUCTIONS:
        return _reduction(node, first, shape)
    if name in ("cat", "concat", "concatenate"):
        return _concatenation(node, placements, shape, num_teachers)
    return None


def is_norm(node: fx.Node) -> bool:
    """Whether an operation is a batch, group or instance normalisation."""
    return op_name(node) in NORMS


def changes_reshaped(graph: fx.Graph, is_layer: Callable[[fx.Node], bool]) -> bool:
    """Whether an operation in place may reach a tensor through its reshaped view: the layout decides whether that is one."""
    reshaped: set[fx.Node] = set()  # what may be such a view, or is computed from one
    for node in graph.nodes:
        reads = not reshaped.isdisjoint(node.all_input_nodes)
        if reads and writes_in_place(node):
            return True
        if op_name(node) in _RESHAPED or (reads and not is_layer(node)):
            reshaped.add(node)
    return False


def _flatten(node: fx.Node, place: Placement, shape: Shape) -> JoinedCall | None:
    """All dimensions from the channels' on become one, or some after it."""
    arguments = bind(node)
    start, end = arguments["start_dim"] % place.rank, arguments["end_dim"] % place.rank
    if start < place.dim <= end or end < place.dim:
        return None
    return JoinedCall(Placement(place.dim, shape[place.dim], len(shape)), may_alias=True)


def _flattening_view(node: fx.Node, place: Placement, shape: Shape) -> JoinedCall | None:
    """``x.view(x.size(0), -1)`` and the like, which is ``x.flatten(1)``."""
    sizes = node.args[1] if len(node.args) > 1 else None
    if not isinstance(sizes, (tuple, list)) or len(sizes) != 2 or len(shape) != 2 or place.dim != 1:
        return None
    if not isinstance(sizes[0], fx.Node) or op_name(sizes[0]) != "sym_size" or sizes[1] != -1:
        return None
    return JoinedCall(Placement(1, shape[1], 2), may_alias=True, call=(torch.flatten, (1,)))


def is_flattening(node: fx.Node) -> bool:
    """Whether an operation is ``x.flatten(1)``, written as a view that may have the number of channels in it."""
    sizes = node.args[1] if op_name(node) in RESHAPES and len(node.args) > 1 else None
    before = node.args[0].meta.get("shape") if node.args and isinstance(node.args[0], fx.Node) else None
    if not isinstance(sizes, (tuple, list)) or len(sizes) != 2 or before is None or len(before) < 2:
        return False
    shape = (before[0], math.prod(before[1:]))
    is_batch = sizes[0] == -1 or (isinstance(sizes[0], fx.Node) and op_name(sizes[0]) == "sym_size")
    return is_batch and sizes[1] in (-1, shape[1]) and node.meta.get("shape") == shape


def _reduction(node: fx.Node, place: Placement, shape: Shape) -> JoinedCall | None:
    dims = bind(node).get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    if not isinstance(dims, (tuple, list)) or not dims:
        return None
    reduced = {d % place.rank for d in dims}
    if place.dim in reduced:
        return None
    gone = 0 if len(shape) == place.rank else sum(d < place.dim for d in reduced)
    return JoinedCall(Placement(place.dim - gone, place.channels, len(shape)))


def _concatenation(node: fx.Node, placements: list[Placement], shape: Shape, num_teachers: int) -> JoinedCall | None:
    dim, first = bind(node)["dim"], placements[0]
    if any((p.dim, p.rank) != (first.dim, first.rank) for p in placements):
        return None
    if dim % first.rank != first.dim:
        return JoinedCall(first) if set(placements) == {first} else None
    call = (concatenate_joined, (num_teachers, first.dim))
    return JoinedCall(Placement(first.dim, shape[first.dim], first.rank), call=call)

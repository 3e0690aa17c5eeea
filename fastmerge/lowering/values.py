"""What each value of a teacher's graph becomes in the big student's: shared, T streams, or the streams joined in one tensor."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fastmerge.lowering.channelwise import Placement
from fastmerge.wide.streams import mean_of_streams, split_streams


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

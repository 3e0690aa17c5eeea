"""From a teacher's graph to the big student's: every operation once per stream, or once on the streams joined.

The streams run in lockstep, operation by operation, so that a linked layer can read all of them, while whatever lies between
layers (views, chunks, shuffles, pooling) is just what each teacher does with its own channels. A *joined* graph keeps the
streams in one tensor from layer to layer, through operations known to treat each channel alone; any other operation takes
the tensor apart, without a copy, and the next layer puts the streams together again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from fastmerge.channels.layer_calls import LayerCall
from fastmerge.lowering.channelwise import JoinedCall, Placement, is_norm, joined_call
from fastmerge.lowering.fusion import NormUse, fuse
from fastmerge.lowering.in_place import writes_in_place
from fastmerge.lowering.patterns import Lowered
from fastmerge.lowering.values import JoinedValue, Memory, Value, Values, nodes_of
from fastmerge.wide.analysis import Analysis
from fastmerge.wide.grouped import GroupedLayer
from fastmerge.wide.network import attach_gate, has
from fastmerge.wide.norms import WideBatchNorm
from fastmerge.wide.population import Population


class _ChangedInPlace(Exception):  # noqa: N818
    """A joined tensor and its streams would go different ways: the graph must keep streams throughout."""


def lower(
    analysis: Analysis, network: nn.Module, mode: str, population: Population, each: bool, joined: bool = False
) -> tuple[fx.Graph, list[NormUse]]:
    """Makes the graph of one mode's forward, ``forward(network, gates, *inputs)``.

    Args:
        analysis: of the first teacher.
        network: the wide modules; gate modules are attached to it.
        mode: "train" or "eval".
        population: the channels that are left.
        each: run every teacher to its own output and take the mean there, instead of averaging in the last layers.
        joined: keep values joined where the operations allow it.

    Returns:
        The graph, and what became of each call of a normalisation.
    """
    try:
        return _Lowering(analysis, network, mode, population, each, joined).run()
    except _ChangedInPlace:
        return _Lowering(analysis, network, mode, population, each, joined=False).run()


def stays_joined(analysis: Analysis, network: nn.Module, mode: str, population: Population) -> bool:
    """Whether the joined graph of a mode keeps any value joined: not where one that was taken apart is changed in place."""
    try:
        _Lowering(analysis, network, mode, population, each=False, joined=True).run()
    except _ChangedInPlace:
        return False
    return True


class _Lowering:
    """One pass through a teacher's graph, node by node; see :func:`lower` for its arguments.

    Layers become calls of wide layers, normalisations and grouped convolutions calls of wide ones where there are such, all
    else operations on the joined tensor or on each stream. What a layer reads is gated first.
    """

    def __init__(
        self, analysis: Analysis, network: nn.Module, mode: str, population: Population, each: bool, joined: bool
    ) -> None:
        self.analysis, self.network, self.mode, self.each, self.joined = analysis, network, mode, each, joined
        self.root = analysis.traced.root
        self.population, self.num_teachers = population, population.num_teachers
        self.streams = analysis.streams(mode, each)
        self.graph = fx.Graph()
        self.wirings = {weight: wiring for weight, (_, wiring) in analysis.wirings.items()}
        self.gates = self.graph.placeholder("gates")
        self.values = Values(self.graph, self.num_teachers)
        self.gate_calls: dict[fx.Node, fx.Node] = {}

    def run(self) -> tuple[fx.Graph, list[NormUse]]:
        for node in self.analysis.traced.graphs[self.mode].nodes:
            if node.op == "output":
                self.graph.output(fx.map_arg(node.args[0], self.values.returned))
            elif node.op == "placeholder":
                self.values.current[node] = self.graph.create_node(
                    "placeholder", node.target, node.args, name=node.name
                )
            elif (call := self.analysis.dense_call(self.mode, node)) is not None:
                self.values.current[node] = self._layer(node, call)
            elif not self._is_layer_parameter(node):
                self.values.current[node] = self._operation(node)
        return self.graph, self._fuse()

    def _fuse(self) -> list[NormUse]:
        nodes = self.analysis.traced.graphs[self.mode].nodes
        values = {node: nodes_of(self.values.of(node, ungated=True)) for node in nodes if node in self.values.current}
        shapes = {node: self.analysis.shapes[self.mode, node.name] for node in values if self._has_shape(node)}
        lowered = Lowered(self.graph, values, self.gate_calls, shapes, self.root, self.network)
        return fuse(
            lowered, (node for node in nodes if node not in self.analysis.calls[self.mode] and is_norm(node, self.root))
        )

    def _has_shape(self, node: fx.Node) -> bool:
        return (self.mode, node.name) in self.analysis.shapes

    def _is_layer_parameter(self, node: fx.Node) -> bool:
        """A dense layer's own weight or bias, passed to a functional call: the wide layer holds it."""
        return node.op == "get_attr" and not has(self.network, str(node.target))

    def _layer(self, node: fx.Node, call: LayerCall) -> Value:
        values = self._read(node, call)
        kwargs: dict[str, Any] = {}
        if call.output_size is not None:
            kwargs["output_size"] = self.values.pick(call.output_size, 0)
        path = self.analysis.paths[call.weight]
        if self.each and self.analysis.averages(call):
            module = self.graph.get_attr(path)
            return self.values.parts(self.graph.call_method("each", (module, values), kwargs))
        shape = self.analysis.shapes.get((self.mode, node.name))
        join = self.joined and node in self.streams and shape is not None
        out = self.graph.call_module(path, (values,), {**kwargs, "join": True} if join else kwargs)
        if not join:
            return self.values.parts(out) if node in self.streams else self.values.part(out, 0)
        assert shape is not None
        dim = call.geometry.channel_dim % len(shape)
        return JoinedValue(self.values.part(out, 0), Placement(dim, shape[dim], len(shape)))

    def _read(self, node: fx.Node, call: LayerCall) -> tuple[fx.Node, ...]:
        """What a layer reads: streams are gated once, for this layer and all later users (but for those that undo it)."""
        source = call.input
        value = self.values.of(source)
        if isinstance(value, fx.Node):
            if not self.wirings[call.weight].reads_streams:
                return (value,)
            # a layer used twice, once on a shared tensor, or one that makes each teacher's output from the input
            return tuple(nodes_of(self._gated(node, call, [value] * self.num_teachers)))
        if isinstance(value, JoinedValue) and value.place.dim != call.geometry.channel_dim % value.place.rank:
            value = self.values.take_apart(value)
        if source not in self.values.ungated:
            gated = self._gated(node, call, value)
            if gated is not value:
                (self.gate_calls[source],) = {part.args[0] for part in nodes_of(gated)}  # type: ignore[assignment]
                self.values.ungated[source] = self.values.current[source]
                self.values.current[source] = value = gated
        return tuple(nodes_of(value))

    def _gated(self, node: fx.Node, call: LayerCall, value: list[fx.Node] | JoinedValue) -> list[fx.Node] | JoinedValue:
        units = self.analysis.groups.reads[(self.mode, node.name)]
        if not units.has_groups:
            return value
        sample_dim = self.analysis.groups.sample_dims.get((self.mode, node.name))
        if sample_dim is None:
            raise ValueError(
                f"layer '{call.name}' reads a tensor without a dimension that grows with the batch; gates are drawn per sample"
            )
        columns = self.population.gate_columns(units)
        path = attach_gate(self.network, call.name, columns, call.geometry.channel_dim, sample_dim)
        out = self.graph.call_module(path, (self.gates, *nodes_of(value)))
        if isinstance(value, JoinedValue):
            return JoinedValue(self.values.part(out, 0), value.place, value.memory)
        gated = self.values.parts(out)
        self.values.split.update(gated if self.values.split.intersection(value) else ())
        return gated

    def _operation(self, node: fx.Node) -> Value:
        if node not in self.streams:
            return self._copy(node, node.target, 0)
        target = str(node.target)
        own = self.analysis.is_stateful(node)
        if own and node.op == "get_attr":
            return [self.graph.get_attr(f"{target}.teacher{t}") for t in range(self.num_teachers)]
        module = self.network.get_submodule(target) if node.op == "call_module" else None
        if isinstance(module, (WideBatchNorm, GroupedLayer)):
            return self._wide(node, module)
        call = None if own else self._joined_call(node)
        if call is not None:
            return self._once(node, call)
        streams = [self._copy(node, f"{target}.{t}" if own else node.target, t) for t in range(self.num_teachers)]
        if any(source in self.values.split for stream in streams for source in stream.all_input_nodes):
            if writes_in_place(node, self.root):
                raise _ChangedInPlace
            self.values.split.update(streams)
        return streams

    def _wide(self, node: fx.Node, module: WideBatchNorm | GroupedLayer) -> Value:
        """A normalisation or grouped convolution of all teachers, which reads values without their gates."""
        call = self.analysis.calls[self.mode].get(node)
        source = next(iter(node.args or node.kwargs.values())) if call is None else call.input
        assert isinstance(source, fx.Node)
        value, shape = self.values.of(source, ungated=True), self.analysis.shapes[self.mode, node.name]
        size = None if call is None else call.output_size
        kwargs = {} if size is None else {"output_size": self.values.pick(size, 0)}
        if isinstance(value, JoinedValue) and value.place.dim == 1:
            out = self.graph.call_module(str(node.target), (value.node,), kwargs)
            return JoinedValue(self.values.part(out, 0), Placement(1, shape[1], len(shape)))
        streams = [self.values.pick(source, t, ungated=True) for t in range(self.num_teachers)]
        return self.values.parts(self.graph.call_module(str(node.target), tuple(streams), kwargs))

    def _joined_call(self, node: fx.Node) -> JoinedCall | None:
        values = {source: self.values.of(source, self._undoes_gates(node)) for source in node.all_input_nodes}
        operands = {source: value.place for source, value in values.items() if isinstance(value, JoinedValue)}
        shape = self.analysis.shapes.get((self.mode, node.name))
        return joined_call(node, self.root, operands, shape, self.num_teachers)

    def _once(self, node: fx.Node, call: JoinedCall) -> JoinedValue:
        """Runs an operation on joined tensors."""
        undoes = self._undoes_gates(node)
        operands = [v for s in node.all_input_nodes if isinstance(v := self.values.of(s, undoes), JoinedValue)]
        memory = Memory()
        if writes_in_place(node, self.root):
            changed = self.values.of(node.all_input_nodes[0], undoes)
            assert isinstance(changed, JoinedValue)
            if changed.memory.split:
                raise _ChangedInPlace
            memory = changed.memory
        elif call.may_alias:
            memory = operands[0].memory

        def joined(source: fx.Node) -> fx.Node:
            value = self.values.of(source, undoes)
            assert isinstance(value, JoinedValue)
            return value.node

        if call.call is not None:
            function, further = call.call
            result = self.graph.call_function(function, (fx.map_arg(node.args[0], joined), *further))
        else:
            args, kwargs = fx.map_arg(node.args, joined), fx.map_arg(node.kwargs, joined)
            result = self.graph.create_node(node.op, node.target, args, kwargs)
        return JoinedValue(result, call.placement, memory)

    def _copy(self, node: fx.Node, target: Any, teacher: int) -> fx.Node:
        undoes = self._undoes_gates(node)
        args = self.values.pick(node.args, teacher, undoes)
        kwargs = self.values.pick(node.kwargs, teacher, undoes)
        if node.op == "call_method" and target == "view" and not any(isinstance(a, torch.dtype) for a in node.args):
            target = "reshape"  # a stream may lie among the others
        return self.graph.create_node(node.op, target, args, kwargs, name=None)

    def _undoes_gates(self, node: fx.Node) -> bool:
        """Normalisations and grouped convolutions keep a channel's scale apart, so a following BatchNorm undoes it."""
        return node in self.analysis.calls[self.mode] or is_norm(node, self.root)

"""From a teacher's graph to the big student's: every operation once per stream, or once on the streams joined.

The streams run in lockstep, operation by operation, so that a linked layer can read all of them, while whatever lies between
layers (views, chunks, shuffles, pooling) is just what each teacher does with its own channels. A *joined* graph keeps the
streams in one tensor from layer to layer, through operations known to treat each channel alone; any other operation takes
the tensor apart, without a copy, and the next layer puts the streams together again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastmerge.channels.aten import LAYER_NORMS, bind, is_size, op_name, writes_in_place
from fastmerge.channels.groups import AxisUnits
from fastmerge.channels.layer_calls import LayerCall, untransposed
from fastmerge.channels.traced_network import module_path
from fastmerge.lowering.computed_weights import column_weights, compute_weight
from fastmerge.lowering.fusion import Lowered, NormUse, fuse
from fastmerge.lowering.values import JoinedValue, Memory, Placement, Value, Values, is_norm, joined_call, nodes_of
from fastmerge.wide.analysis import Analysis
from fastmerge.wide.layer_norm import gated_layer_norm, gated_scalars, tied_linear
from fastmerge.wide.network import attach_gate
from fastmerge.wide.population import Population
from fastmerge.wide.streams import StreamTensors


def _size(x: Tensor, dim: int) -> int:
    return x.shape[dim]


# what is called by a shorter way than the operation itself, in code that runs at every step
_FUNCTIONS: dict[Any, Any] = {
    torch.ops.aten.sym_size.int: _size,
    torch.ops.aten.relu.default: torch.relu,
    torch.ops.aten.relu_.default: torch.relu_,
    torch.ops.aten.add.Tensor: torch.add,
    torch.ops.aten.mul.Tensor: torch.mul,
    torch.ops.aten.cat.default: torch.cat,
    torch.ops.aten.flatten.using_ints: torch.flatten,
    torch.ops.aten.reshape.default: torch.reshape,
    torch.ops.aten.mean.dim: torch.mean,
}


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
        self.population, self.num_teachers = population, population.num_teachers
        self.streams = analysis.streams(mode, each)
        self.graph = fx.Graph()
        self.wirings = {weight: wiring for weight, (_, wiring) in analysis.wirings.items()}
        self.gates = self.graph.placeholder("gates")
        self.values = Values(self.graph, self.num_teachers)
        self.gate_calls: dict[fx.Node, fx.Node] = {}
        self._device_node: fx.Node | None = None

    def run(self) -> tuple[fx.Graph, list[NormUse]]:
        for node in self.analysis.traced.graphs[self.mode].nodes:
            if node in self.analysis.weight_nodes[self.mode]:
                continue
            if node.op == "output":
                self.graph.output(fx.map_arg(node.args[0], self.values.returned))
            elif node.op == "placeholder":
                self.values.current[node] = self.graph.create_node(
                    "placeholder", node.target, node.args, name=node.name
                )
            elif (call := self.analysis.dense_call(self.mode, node)) is not None:
                self.values.current[node] = self._layer(node, call)
            elif (call := self.analysis.tied_call(self.mode, node)) is not None:
                self.values.current[node] = self._tied_layer(node, call)
            elif node.op == "get_attr":
                if str(node.target) not in self.analysis.held:
                    self.values.current[node] = self._tensor(node)
            elif self.analysis.is_wide(self.mode, node):
                self.values.current[node] = self._wide(node)
            else:
                self.values.current[node] = self._operation(node)
        return self.graph, self._fuse()

    def _fuse(self) -> list[NormUse]:
        nodes = self.analysis.traced.graphs[self.mode].nodes
        values = {node: nodes_of(self.values.of(node, ungated=True)) for node in nodes if node in self.values.current}
        known = self.analysis.shapes
        shapes = {node: known[self.mode, node.name] for node in values if (self.mode, node.name) in known}
        norms = {node: call.path for node, call in self.analysis.norms[self.mode].items()}
        lowered = Lowered(self.graph, values, self.gate_calls, shapes, norms, self.network)
        return fuse(lowered, (node for node in nodes if is_norm(node) and node in values))

    def _layer(self, node: fx.Node, call: LayerCall) -> Value:
        values = tuple(nodes_of(self._gated_value(node, call)))
        path = self.analysis.paths[call.weight]
        if self.each and self.analysis.averages(call):
            module = self.graph.get_attr(path)
            return self.values.parts(self.graph.call_method("each", (module, values)))
        shape = self.analysis.shapes.get((self.mode, node.name))
        join = self.joined and node in self.streams and shape is not None
        kwargs = {**({"join": True} if join else {}), **self._computed(node, call)}
        out = self.graph.call_module(path, (values,), kwargs)
        if not join:
            return self.values.parts(out) if node in self.streams else self.values.part(out, 0)
        assert shape is not None
        dim = call.geometry.channel_dim % len(shape)
        return JoinedValue(self.values.part(out, 0), Placement(dim, shape[dim], len(shape)))

    def _tied_layer(self, node: fx.Node, call: LayerCall) -> Value:
        """The last layer, whose weight is each teacher's embedding's."""
        value = self._gated_value(node, call)
        streams = self.values.take_apart(value) if isinstance(value, JoinedValue) else nodes_of(value)
        teachers = range(self.num_teachers)
        weights = [self.values.pick(untransposed(call.operand), t) for t in teachers]
        bias = bind(node).get("bias")
        if self.each:
            biases = [None if bias is None else self.values.pick(bias, t) for t in teachers]
            return [
                self.graph.call_function(F.linear, operands) for operands in zip(streams, weights, biases, strict=True)
            ]
        units = self.analysis.groups.reads[self.mode, node.name]
        gate = self.graph.get_attr(self._gate(node, call.name, units, -1))
        args = (self.gates, tuple(streams), tuple(weights), self.num_teachers * len(units.group))
        out = self.graph.call_function(tied_linear, args, {"gate": gate})
        return out if bias is None else self.graph.call_function(torch.add, (out, self.values.pick(bias, 0)))

    def _gated_value(self, node: fx.Node, call: LayerCall) -> Value:
        """What a layer reads: streams are gated once, for this layer and all later users (but for those that undo it)."""
        source = call.input
        value = self.values.of(source)
        if isinstance(value, fx.Node):
            if not call.is_tied and not self.wirings[call.weight].reads_streams:
                return value
            # a layer used twice, once on a shared tensor, or one that makes each teacher's output from the input
            return self._gated(node, call, [value] * self.num_teachers)
        if isinstance(value, JoinedValue) and value.place.dim != call.geometry.channel_dim % value.place.rank:
            value = self.values.take_apart(value)
        if source not in self.values.ungated:
            gated = self._gated(node, call, value)
            if gated is not value:
                (self.gate_calls[source],) = {part.args[0] for part in nodes_of(gated)}  # type: ignore[assignment]
                self.values.ungated[source] = self.values.current[source]
                self.values.current[source] = value = gated
        return value

    def _gated(self, node: fx.Node, call: LayerCall, value: list[fx.Node] | JoinedValue) -> list[fx.Node] | JoinedValue:
        units = self.analysis.groups.reads[(self.mode, node.name)]
        if self.population.is_open(units):
            return value
        path = self._gate(node, call.name, units, call.geometry.channel_dim)
        out = self.graph.call_module(path, (self.gates, *nodes_of(value)))
        if isinstance(value, JoinedValue):
            return JoinedValue(self.values.part(out, 0), value.place, value.memory)
        gated = self.values.parts(out)
        self.values.split.update(gated if self.values.split.intersection(value) else ())
        return gated

    def _gate(self, node: fx.Node, name: str, units: AxisUnits, channel_dim: int) -> str:
        """The path of the module that gates what a layer or layer normalisation reads."""
        sample_dim = self.analysis.groups.sample_dims.get((self.mode, node.name))
        fast = (self.mode, node.name) in self.analysis.groups.fast_samples
        return attach_gate(self.network, name, self.population.gate_columns(units), channel_dim, sample_dim, fast)

    def _tensor(self, node: fx.Node) -> Value:
        """A parameter, buffer or constant that no wide module holds."""
        target = str(node.target)
        averaged = target in self.analysis.averaged
        if averaged and self.each:
            return [self.graph.call_module(target, (t,)) for t in range(self.num_teachers)]
        if not self.analysis.is_stateful(node):
            return self.graph.get_attr(f"{target}.mean" if averaged else target)
        own = [self.graph.get_attr(f"{target}.{StreamTensors.attribute(t)}") for t in range(self.num_teachers)]
        if not self.analysis.groups.acts_on_several(target):
            return own
        _, units = self.analysis.groups.tensors[target]
        gate = self.graph.get_attr(self._gate(node, target, units, -1))
        args = (self.gates, tuple(own), self.num_teachers * len(units.group), self.population.kept(units))
        return self.values.parts(self.graph.call_function(gated_scalars, args, {"gate": gate}))

    def _layer_norm(self, node: fx.Node, source: fx.Node) -> Value:
        """A layer normalisation whose statistics weigh the channels of all streams by their gates."""
        arguments, units = bind(node), self.analysis.groups.reads[self.mode, node.name]
        gate = self._gate(node, module_path(node), units, -1)
        x, weights, biases = (
            None
            if operand is None
            else tuple(self.values.pick(operand, t, ungated=True) for t in range(self.num_teachers))
            for operand in (source, arguments.get("weight"), arguments.get("bias"))
        )
        size = self.num_teachers * len(units.group)
        module, centred = self.graph.get_attr(gate), op_name(node) == "layer_norm"
        args = (self.gates, x, weights, biases, size, self.population.kept(units), arguments["eps"], centred)
        return self.values.parts(self.graph.call_function(gated_layer_norm, args, {"gate": module}))

    def _operation(self, node: fx.Node) -> Value:
        if node not in self.streams:
            return self._copy(node, 0)
        source = node.args[0] if node.args else None
        units = self.analysis.groups.reads.get((self.mode, node.name))
        normalises = op_name(node) in LAYER_NORMS and source in self.streams
        if normalises and units is not None and units.numbers:
            assert isinstance(source, fx.Node)
            return self._layer_norm(node, source)
        joined = self._once(node)
        if joined is not None:
            return joined
        streams = [self._copy(node, t) for t in range(self.num_teachers)]
        if any(source in self.values.split for stream in streams for source in stream.all_input_nodes):
            if writes_in_place(node):
                raise _ChangedInPlace
            self.values.split.update(streams)
        return streams

    def _wide(self, node: fx.Node) -> Value:
        """A BatchNorm or grouped convolution of all teachers, which reads values without their gates."""
        call, norm = self.analysis.calls[self.mode].get(node), self.analysis.norms[self.mode].get(node)
        source, path = (norm.input, norm.path) if norm is not None else (call.input, call.name)  # type: ignore[union-attr]
        value, shape = self.values.of(source, ungated=True), self.analysis.shapes[self.mode, node.name]
        kwargs = {} if call is None else self._computed(node, call)
        if isinstance(value, JoinedValue) and value.place.dim == 1:
            out = self.graph.call_module(path, (value.node,), kwargs)
            return JoinedValue(self.values.part(out, 0), Placement(1, shape[1], len(shape)))
        streams = [self.values.pick(source, t, ungated=True) for t in range(self.num_teachers)]
        return self.values.parts(self.graph.call_module(path, tuple(streams), kwargs))

    def _computed(self, node: fx.Node, call: LayerCall) -> dict[str, Any]:
        """The weight of a layer that computes it row by row, as an argument of its call."""
        if call.rows is None:
            return {}
        path, groups = self.analysis.paths.get(call.weight, call.name), self.analysis.groups
        parameter = self.graph.get_attr(f"{path}.weight")
        tensors = {call.rows.parameter: parameter}
        for source in call.rows.axes:
            if source.op == "get_attr" and source not in tensors:
                value = nodes_of(self._tensor(source))
                if len(value) > 1:  # a value for each row
                    value = [self.graph.call_function(torch.cat, (value, call.rows.axes[source].index((0,))))]
                tensors[source] = value[0]
        rows = self.population.is_left(groups.outputs[call.weight]).sum(1).tolist()
        shape = self.analysis.shapes[self.mode, call.rows.weight.name]
        columns, width = None, shape[1]
        if call.groups == 1 and self.wirings[call.weight].reads_streams:
            units = groups.reads[self.mode, node.name]
            width = int(self.population.is_left(units).sum())
            gate = self.graph.get_attr(self._gate(node, call.name, units, call.geometry.channel_dim))
            args = (self.gates, rows, self.num_teachers * shape[1], parameter)
            columns = self.graph.call_function(column_weights, args, {"gate": gate})
        lengths = (sum(rows), width, *shape[2:])
        return {"weight": (compute_weight(self.graph, call.rows, tensors, lengths, columns),)}

    def _once(self, node: fx.Node) -> JoinedValue | None:
        """Runs an operation on joined tensors; None if it must run per stream."""
        undoes = self._undoes_gates(node)
        values = {source: self.values.of(source, undoes) for source in node.all_input_nodes if not is_size(source)}
        operands = {source: value for source, value in values.items() if isinstance(value, JoinedValue)}
        places = {source: value.place for source, value in operands.items()}
        call = joined_call(node, places, self.analysis.shapes.get((self.mode, node.name)), self.num_teachers)
        if call is None:
            return None
        memory = Memory()
        if writes_in_place(node):
            memory = operands[node.all_input_nodes[0]].memory
            if memory.split:
                raise _ChangedInPlace
        elif call.may_alias:
            memory = next(iter(operands.values())).memory

        def joined(source: fx.Node) -> fx.Node:
            value = self.values.of(source, undoes)
            return value.node if isinstance(value, JoinedValue) else value  # type: ignore[return-value]  # a size

        if call.call is not None:
            function, further = call.call
            result = self.graph.call_function(function, (fx.map_arg(node.args[0], joined), *further))
        else:
            result = self._emit(node, node.target, fx.map_arg(node.args, joined), fx.map_arg(node.kwargs, joined))
        return JoinedValue(result, call.placement, memory)

    def _copy(self, node: fx.Node, teacher: int) -> fx.Node:
        undoes = self._undoes_gates(node)
        if is_size(node):  # of a dimension that all streams have alike, and a joined tensor too
            args, kwargs = (fx.map_arg(a, lambda n: nodes_of(self.values.of(n))[0]) for a in (node.args, node.kwargs))
            return self._emit(node, node.target, args, kwargs)
        args = self.values.pick(node.args, teacher, undoes)
        kwargs = self.values.pick(node.kwargs, teacher, undoes)
        target = node.target
        if target is torch.ops.aten.view.default:
            target = torch.ops.aten.reshape.default  # a stream may lie among the others
        return self._emit(node, target, args, kwargs)

    def _emit(self, node: fx.Node, target: Any, args: Any, kwargs: Any) -> fx.Node:
        """A node of the lowered graph, on the device of the network's input instead of the example's."""

        def on_device(value: Any) -> Any:
            if isinstance(value, torch.device):
                return self._device()
            if isinstance(value, (tuple, list)):
                return type(value)(on_device(v) for v in value)
            return value

        args = tuple(on_device(value) for value in args)
        kwargs = {key: on_device(value) for key, value in kwargs.items() if key != "layout"}
        return self.graph.create_node(node.op, _FUNCTIONS.get(target, target), args, kwargs)

    def _device(self) -> fx.Node:
        if self._device_node is None:
            inputs = [n for n in self.graph.nodes if n.op == "placeholder" and n is not self.gates]
            like = next(n for n, x in zip(inputs, self.analysis.traced.inputs, strict=True) if isinstance(x, Tensor))
            self._device_node = self.graph.call_function(getattr, (like, "device"))
        return self._device_node

    def _undoes_gates(self, node: fx.Node) -> bool:
        """Normalisations and grouped convolutions keep a channel's scale apart, so a following BatchNorm undoes it."""
        return node in self.analysis.calls[self.mode] or is_norm(node)

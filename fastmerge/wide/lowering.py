"""From a teacher's graph to the big student's program: every operation once per stream, or once on the streams joined.

The streams run in lockstep, operation by operation, so that a linked layer can read all of them, while whatever lies between
layers (views, chunks, shuffles, pooling) is just what each teacher does with its own channels. A *joined* program keeps the
streams in one tensor from layer to layer, through operations known to treat each channel alone; any other operation takes
the tensor apart, without a copy, and the next layer puts the streams together again.
"""

from __future__ import annotations

import linecache
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastmerge.channels.layer_calls import LayerCall
from fastmerge.wide.channelwise import JoinedCall, Placement, joined_call
from fastmerge.wide.fusion import NormUse, fuse
from fastmerge.wide.grouped import GroupedLayer
from fastmerge.wide.in_place import writes_in_place
from fastmerge.wide.network import Analysis, attach, has
from fastmerge.wide.norms import WideBatchNorm
from fastmerge.wide.patterns import Lowered
from fastmerge.wide.population import Population
from fastmerge.wide.streams import GateStreams, mean_of_streams, split_streams

_NORM_MODULES = (nn.modules.batchnorm._NormBase, nn.GroupNorm)
_NORM_FUNCTIONS = (F.batch_norm, F.group_norm, F.instance_norm, torch.batch_norm, torch.group_norm, torch.instance_norm)


@dataclass
class _Memory:
    """What joined values that may share memory have in common.

    Attributes:
        split: whether one of them was taken apart.
    """

    split: bool = False


@dataclass
class _Joined:
    """A joined value.

    Attributes:
        node: the tensor.
        place: where its channels lie.
        memory: shared with values that may be views of it.
        streams: its streams, once it was taken apart.
    """

    node: fx.Node
    place: Placement
    memory: _Memory = field(default_factory=_Memory)
    streams: list[fx.Node] | None = None


class _ChangedInPlace(Exception):  # noqa: N818
    """A joined tensor and its streams would go different ways: the program must keep streams throughout."""


_Value = fx.Node | list[fx.Node] | _Joined


@dataclass(frozen=True)
class Program:
    """One mode's forward of the big student.

    Attributes:
        forward: ``forward(network, gates, *inputs)``.
        norms: what became of each call of a normalisation.
    """

    forward: Callable[..., Any]
    norms: tuple[NormUse, ...]


def lower(
    analysis: Analysis, network: nn.Module, mode: str, population: Population, each: bool, joined: bool = False
) -> Program:
    """Compiles one mode's graph.

    Args:
        analysis: of the first teacher.
        network: the wide modules; gate modules are attached to it.
        mode: "train" or "eval".
        population: the channels that are left.
        each: run every teacher to its own output and take the mean there, instead of averaging in the last layers.
        joined: keep values joined where the operations allow it.
    """
    try:
        graph, norms = _Lowering(analysis, network, mode, population, each, joined).run()
    except _ChangedInPlace:
        graph, norms = _Lowering(analysis, network, mode, population, each, joined=False).run()
    code = graph.python_code("self")
    filename = f"<fastmerge {mode} forward of {type(analysis.traced.root).__name__} {id(graph)}>"
    namespace = dict(code.globals)
    exec(compile(code.src, filename, "exec"), namespace)
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(keepends=True), filename)
    return Program(namespace["forward"], tuple(norms))


def stays_joined(analysis: Analysis, network: nn.Module, mode: str, population: Population) -> bool:
    """Whether the joined program of a mode keeps any value joined: not where one that was taken apart is changed in place."""
    try:
        _Lowering(analysis, network, mode, population, each=False, joined=True).run()
    except _ChangedInPlace:
        return False
    return True


class _Lowering:
    def __init__(
        self, analysis: Analysis, network: nn.Module, mode: str, population: Population, each: bool, joined: bool
    ) -> None:
        self.analysis, self.network, self.mode, self.each, self.joined = analysis, network, mode, each, joined
        self.root = analysis.traced.root
        self.population, self.num_teachers = population, population.num_teachers
        self.streams = analysis.streams(mode, each)
        self.graph = fx.Graph()
        self.wirings = {weight: wiring for weight, (_, wiring) in analysis.wirings().items()}
        self.gates = self.graph.placeholder("gates")
        self.values: dict[fx.Node, _Value] = {}
        self.ungated: dict[fx.Node, _Value] = {}
        self.gate_calls: dict[fx.Node, fx.Node] = {}
        self.split: set[fx.Node] = set()  # streams that may share memory with a joined tensor

    def run(self) -> tuple[fx.Graph, list[NormUse]]:
        for node in self.analysis.traced.graphs[self.mode].nodes:
            if node.op == "output":
                self.graph.output(fx.map_arg(node.args[0], self._output))
            elif node.op == "placeholder":
                self.values[node] = self.graph.create_node("placeholder", node.target, node.args, name=node.name)
            elif (call := self.analysis.dense_call(self.mode, node)) is not None:
                self.values[node] = self._layer(node, call)
            elif not self._is_layer_parameter(node):
                self.values[node] = self._operation(node)
        return self.graph, self._fuse()

    def _fuse(self) -> list[NormUse]:
        nodes = self.analysis.traced.graphs[self.mode].nodes
        values = {node: self._nodes(self._operand(node, ungated=True)) for node in nodes if node in self.values}
        shapes = {node: self.analysis.shapes[self.mode, node.name] for node in values if self._has_shape(node)}
        lowered = Lowered(self.graph, values, self.gate_calls, shapes, self.root, self.network)
        return fuse(
            lowered, (node for node in nodes if node not in self.analysis.calls[self.mode] and self._is_norm(node))
        )

    def _has_shape(self, node: fx.Node) -> bool:
        return (self.mode, node.name) in self.analysis.shapes

    def _is_layer_parameter(self, node: fx.Node) -> bool:
        """A dense layer's own weight or bias, passed to a functional call: the wide layer holds it."""
        return node.op == "get_attr" and not has(self.network, str(node.target))

    def _layer(self, node: fx.Node, call: LayerCall) -> _Value:
        values = self._read(node, call)
        kwargs: dict[str, Any] = {}
        if call.output_size is not None:
            kwargs["output_size"] = self._pick(call.output_size, 0)
        path = self.analysis.paths[call.weight]
        if self.each and self.analysis.averages(call):
            module = self.graph.get_attr(path)
            return self._parts(self.graph.call_method("each", (module, values), kwargs))
        shape = self.analysis.shapes.get((self.mode, node.name))
        join = self.joined and node in self.streams and shape is not None
        out = self.graph.call_module(path, (values,), {**kwargs, "join": True} if join else kwargs)
        if not join:
            return self._parts(out) if node in self.streams else self._part(out, 0)
        assert shape is not None
        dim = call.geometry.channel_dim % len(shape)
        return _Joined(self._part(out, 0), Placement(dim, shape[dim], len(shape)))

    def _part(self, values: fx.Node, index: int) -> fx.Node:
        return self.graph.call_function(operator.getitem, (values, index))

    def _parts(self, values: fx.Node) -> list[fx.Node]:
        return [self._part(values, t) for t in range(self.num_teachers)]

    def _read(self, node: fx.Node, call: LayerCall) -> tuple[fx.Node, ...]:
        """What a layer reads: streams are gated once, for this layer and all later users (but for those that undo it)."""
        source = call.input
        value = self.values[source]
        if isinstance(value, fx.Node):
            if not self.wirings[call.weight].reads_streams:
                return (value,)
            # a layer used twice, once on a shared tensor
            return tuple(self._nodes(self._gated(node, call, [value] * self.num_teachers)))
        if isinstance(value, _Joined) and value.place.dim != call.geometry.channel_dim % value.place.rank:
            value = self._split(value)
        if source not in self.ungated:
            gated = self._gated(node, call, value)
            if gated is not value:
                (self.gate_calls[source],) = {part.args[0] for part in self._nodes(gated)}  # type: ignore[assignment]
                self.ungated[source] = self.values[source]
                self.values[source] = value = gated
        return tuple(self._nodes(value))

    @staticmethod
    def _nodes(value: _Value) -> list[fx.Node]:
        return [value.node] if isinstance(value, _Joined) else value if isinstance(value, list) else [value]

    def _gated(self, node: fx.Node, call: LayerCall, value: list[fx.Node] | _Joined) -> list[fx.Node] | _Joined:
        units = self.analysis.groups.reads[(self.mode, node.name)]
        if not units.has_groups:
            return value
        sample_dim = self.analysis.groups.sample_dims.get((self.mode, node.name))
        if sample_dim is None:
            raise ValueError(
                f"layer '{call.name}' reads a tensor without a dimension that grows with the batch; gates are drawn per sample"
            )
        path = self._gate_module(call, self.population.gate_columns(units), sample_dim)
        out = self.graph.call_module(path, (self.gates, *self._nodes(value)))
        if isinstance(value, _Joined):
            return _Joined(self._part(out, 0), value.place, value.memory)
        gated = self._parts(out)
        self.split.update(gated if self.split.intersection(value) else ())
        return gated

    def _gate_module(self, call: LayerCall, columns: list[Tensor], sample_dim: int) -> str:
        """The path of the module that gates what a layer reads; a layer used twice may read different channels."""
        path = f"gates_before.{call.name.replace('.', '_')}"
        while has(self.network, path):
            gate = self.network.get_submodule(path)
            assert isinstance(gate, GateStreams)
            if gate.sample_dim == sample_dim and torch.equal(gate.index.cpu(), torch.cat(columns)):
                return path
            path += "_"
        device = next(self.network.parameters()).device  # lowered anew, it need not be the CPU
        columns = [column.to(device) for column in columns]
        attach(self.network, path, GateStreams(columns, call.geometry.channel_dim, sample_dim))
        return path

    def _operation(self, node: fx.Node) -> _Value:
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
        if any(source in self.split for stream in streams for source in stream.all_input_nodes):
            if writes_in_place(node, self.root):
                raise _ChangedInPlace
            self.split.update(streams)
        return streams

    def _operand(self, node: fx.Node, ungated: bool) -> _Value:
        return self.ungated.get(node, self.values[node]) if ungated else self.values[node]

    def _wide(self, node: fx.Node, module: WideBatchNorm | GroupedLayer) -> _Value:
        """A normalisation or grouped convolution of all teachers, which reads values without their gates."""
        call = self.analysis.calls[self.mode].get(node)
        source = next(iter(node.args or node.kwargs.values())) if call is None else call.input
        assert isinstance(source, fx.Node)
        value, shape = self._operand(source, ungated=True), self.analysis.shapes[self.mode, node.name]
        size = None if call is None else call.output_size
        kwargs = {} if size is None else {"output_size": self._pick(size, 0)}
        if isinstance(value, _Joined) and value.place.dim == 1:
            out = self.graph.call_module(str(node.target), (value.node,), kwargs)
            return _Joined(self._part(out, 0), Placement(1, shape[1], len(shape)))
        streams = [self._pick(source, t, ungated=True) for t in range(self.num_teachers)]
        return self._parts(self.graph.call_module(str(node.target), tuple(streams), kwargs))

    def _joined_call(self, node: fx.Node) -> JoinedCall | None:
        values = {source: self._operand(source, self._undoes_gates(node)) for source in node.all_input_nodes}
        operands = {source: value.place for source, value in values.items() if isinstance(value, _Joined)}
        shape = self.analysis.shapes.get((self.mode, node.name))
        return joined_call(node, self.root, operands, shape, self.num_teachers)

    def _once(self, node: fx.Node, call: JoinedCall) -> _Joined:
        """Runs an operation on joined tensors."""
        undoes = self._undoes_gates(node)
        operands = [v for s in node.all_input_nodes if isinstance(v := self._operand(s, undoes), _Joined)]
        memory = _Memory()
        if writes_in_place(node, self.root):
            changed = self._operand(node.all_input_nodes[0], undoes)
            assert isinstance(changed, _Joined)
            if changed.memory.split:
                raise _ChangedInPlace
            memory = changed.memory
        elif call.may_alias:
            memory = operands[0].memory

        def joined(source: fx.Node) -> fx.Node:
            value = self._operand(source, undoes)
            assert isinstance(value, _Joined)
            return value.node

        if call.call is not None:
            function, further = call.call
            result = self.graph.call_function(function, (fx.map_arg(node.args[0], joined), *further))
        else:
            args, kwargs = fx.map_arg(node.args, joined), fx.map_arg(node.kwargs, joined)
            result = self.graph.create_node(node.op, node.target, args, kwargs)
        return _Joined(result, call.placement, memory)

    def _copy(self, node: fx.Node, target: Any, teacher: int) -> fx.Node:
        undoes = self._undoes_gates(node)
        args = self._pick(node.args, teacher, undoes)
        kwargs = self._pick(node.kwargs, teacher, undoes)
        if node.op == "call_method" and target == "view" and not any(isinstance(a, torch.dtype) for a in node.args):
            target = "reshape"  # a stream may lie among the others
        return self.graph.create_node(node.op, target, args, kwargs, name=None)

    def _undoes_gates(self, node: fx.Node) -> bool:
        """Normalisations and grouped convolutions keep a channel's scale apart, so a following BatchNorm undoes it."""
        return node in self.analysis.calls[self.mode] or self._is_norm(node)

    def _is_norm(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self.root.get_submodule(str(node.target)), _NORM_MODULES)
        return node.op == "call_function" and node.target in _NORM_FUNCTIONS

    def _pick(self, arguments: Any, teacher: int, ungated: bool = False) -> Any:
        def one(node: fx.Node) -> fx.Node:
            value = self._operand(node, ungated)
            if isinstance(value, _Joined):
                value = self._split(value)
            return value[teacher] if isinstance(value, list) else value

        return fx.map_arg(arguments, one)

    def _split(self, value: _Joined) -> list[fx.Node]:
        if value.streams is None:
            args = (value.node, self.num_teachers, value.place.dim)
            value.streams = self._parts(self.graph.call_function(split_streams, args))
            value.memory.split = True
            self.split.update(value.streams)
        return value.streams

    def _output(self, node: fx.Node) -> fx.Node:
        value = self._operand(node, ungated=True)
        if isinstance(value, _Joined):
            value = self._split(value)
        return self.graph.call_function(mean_of_streams, tuple(value)) if isinstance(value, list) else value

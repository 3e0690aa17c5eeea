"""From a teacher's graph to the big student's program: every operation once per stream, layers across the streams.

The streams run in lockstep, operation by operation, so that a linked layer can read all of them, while whatever lies between
layers (views, chunks, shuffles, pooling) is just what each teacher does with its own channels.
"""

from __future__ import annotations

import linecache
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastmerge.channels.groups import AxisUnits, ChannelGroups
from fastmerge.channels.layer_calls import LayerCall
from fastmerge.wide.layers import GateStreams
from fastmerge.wide.network import Analysis, attach, has

_NORM_MODULES = (nn.modules.batchnorm._NormBase, nn.GroupNorm)
_NORM_FUNCTIONS = (F.batch_norm, F.group_norm, F.instance_norm, torch.batch_norm, torch.group_norm, torch.instance_norm)
_Value = fx.Node | list[fx.Node]


def gate_columns(groups: ChannelGroups, units: AxisUnits, num_teachers: int) -> Tensor:
    """Which column of the gate matrix multiplies each channel of each stream.

    The matrix holds the groups one after another, T·n columns each, teacher by teacher, then a column of ones.

    Returns:
        int64 (T, channels).
    """
    sizes = torch.tensor([g.size for g in groups])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), (sizes * num_teachers).cumsum(0)])
    group, place = torch.from_numpy(units.group), torch.from_numpy(units.place)
    teacher = torch.arange(num_teachers)[:, None]
    columns = starts[group.clamp(min=0)] + teacher * sizes[group.clamp(min=0)] + place
    return torch.where(group >= 0, columns, starts[-1])


def lower(analysis: Analysis, network: nn.Module, mode: str, num_teachers: int, each: bool) -> Callable[..., Any]:
    """Compiles one mode's graph into a function ``forward(network, gates, *inputs)``.

    Args:
        analysis: of the first teacher.
        network: the wide modules; gate modules are attached to it.
        mode: "train" or "eval".
        num_teachers: T.
        each: run every teacher to its own output and take the mean there, instead of averaging in the last layers.
    """
    graph = _Lowering(analysis, network, mode, num_teachers, each).run()
    code = graph.python_code("self")
    filename = f"<fastmerge {mode} forward of {type(analysis.traced.root).__name__} {id(graph)}>"
    namespace = dict(code.globals)
    exec(compile(code.src, filename, "exec"), namespace)
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(keepends=True), filename)
    forward: Callable[..., Any] = namespace["forward"]
    return forward


def mean_of_streams(*values: Any) -> Any:
    """The teachers' mean of a tensor; anything else (a size, a flag) is the same for all."""
    if not isinstance(values[0], Tensor):
        return values[0]
    return sum(values[1:], values[0]) / len(values)


class _Lowering:
    def __init__(self, analysis: Analysis, network: nn.Module, mode: str, num_teachers: int, each: bool) -> None:
        self.analysis, self.network, self.mode, self.each = analysis, network, mode, each
        self.num_teachers = num_teachers
        self.streams = analysis.streams(mode, each)
        self.graph = fx.Graph()
        self.wirings = {weight: wiring for weight, (_, wiring) in analysis.wirings().items()}
        self.gates = self.graph.placeholder("gates")
        self.values: dict[fx.Node, _Value] = {}
        self.ungated: dict[fx.Node, _Value] = {}

    def run(self) -> fx.Graph:
        for node in self.analysis.traced.graphs[self.mode].nodes:
            if node.op == "output":
                self.graph.output(fx.map_arg(node.args[0], self._output))
            elif node.op == "placeholder":
                self.values[node] = self.graph.create_node("placeholder", node.target, node.args, name=node.name)
            elif (call := self.analysis.dense_call(self.mode, node)) is not None:
                self.values[node] = self._layer(node, call)
            elif not self._is_layer_parameter(node):
                self.values[node] = self._operation(node)
        return self.graph

    def _is_layer_parameter(self, node: fx.Node) -> bool:
        """A dense layer's own weight or bias, passed to a functional call: the wide layer holds it."""
        return node.op == "get_attr" and not has(self.network, str(node.target))

    def _layer(self, node: fx.Node, call: LayerCall) -> _Value:
        streams = self._read(node, call)
        kwargs = {}
        if call.output_size is not None:
            kwargs["output_size"] = self._pick(call.output_size, 0)
        path = self.analysis.paths[call.weight]
        if self.each and self.analysis.averages(call):
            module = self.graph.get_attr(path)
            out = self.graph.call_method("each", (module, streams), kwargs)
        else:
            out = self.graph.call_module(path, (streams,), kwargs)
        parts = [
            self.graph.call_function(operator.getitem, (out, t))
            for t in range(self.num_teachers if node in self.streams else 1)
        ]
        return parts if node in self.streams else parts[0]

    def _read(self, node: fx.Node, call: LayerCall) -> tuple[fx.Node, ...]:
        """What a layer reads: streams are gated once, for this layer and all later users (but for those that undo it)."""
        source = call.input
        value = self.values[source]
        if not isinstance(value, list):
            if not self.wirings[call.weight].reads_streams:
                return (value,)
            return self._gated(node, call, [value] * self.num_teachers)  # a layer used twice, once on a shared tensor
        if source not in self.ungated:
            gated = self._gated(node, call, value)
            if gated != tuple(value):
                self.ungated[source] = value
                self.values[source] = list(gated)
            return gated
        return tuple(value)

    def _gated(self, node: fx.Node, call: LayerCall, streams: list[fx.Node]) -> tuple[fx.Node, ...]:
        units = self.analysis.groups.reads[(self.mode, node.name)]
        if not units.has_groups:
            return tuple(streams)
        sample_dim = self.analysis.groups.sample_dims.get((self.mode, node.name))
        if sample_dim is None:
            raise ValueError(
                f"layer '{call.name}' reads a tensor without a dimension that grows with the batch; gates are drawn per sample"
            )
        path = self._gate_module(call, gate_columns(self.analysis.groups, units, self.num_teachers), sample_dim)
        out = self.graph.call_module(path, (self.gates, *streams))
        return tuple(self.graph.call_function(operator.getitem, (out, t)) for t in range(self.num_teachers))

    def _gate_module(self, call: LayerCall, columns: Tensor, sample_dim: int) -> str:
        """The path of the module that gates what a layer reads; a layer used twice may read different channels."""
        path = f"gates_before.{call.name.replace('.', '_')}"
        while has(self.network, path):
            gate = self.network.get_submodule(path)
            assert isinstance(gate, GateStreams)
            if gate.sample_dim == sample_dim and torch.equal(gate.index.cpu(), columns):
                return path
            path += "_"
        attach(self.network, path, GateStreams(columns, call.geometry.channel_dim, sample_dim))
        return path

    def _operation(self, node: fx.Node) -> _Value:
        if node not in self.streams:
            return self._copy(node, node.target, 0)
        own = self.analysis.is_stateful(node)
        target = str(node.target)
        if own and node.op == "get_attr":
            return [self.graph.get_attr(f"{target}.teacher{t}") for t in range(self.num_teachers)]
        return [self._copy(node, f"{target}.{t}" if own else node.target, t) for t in range(self.num_teachers)]

    def _copy(self, node: fx.Node, target: Any, teacher: int) -> fx.Node:
        undoes = self._undoes_gates(node)
        args = self._pick(node.args, teacher, undoes)
        kwargs = self._pick(node.kwargs, teacher, undoes)
        return self.graph.create_node(node.op, target, args, kwargs, name=None)

    def _undoes_gates(self, node: fx.Node) -> bool:
        """Normalisations and grouped convolutions keep a channel's scale apart, so a following BatchNorm undoes it."""
        if node in self.analysis.calls[self.mode]:
            return True
        if node.op == "call_module":
            return isinstance(self.analysis.traced.root.get_submodule(str(node.target)), _NORM_MODULES)
        return node.op == "call_function" and node.target in _NORM_FUNCTIONS

    def _pick(self, arguments: Any, teacher: int, ungated: bool = False) -> Any:
        def one(node: fx.Node) -> fx.Node:
            value = self.ungated.get(node, self.values[node]) if ungated else self.values[node]
            return value[teacher] if isinstance(value, list) else value

        return fx.map_arg(arguments, one)

    def _output(self, node: fx.Node) -> fx.Node:
        value = self.ungated.get(node, self.values[node])
        return self.graph.call_function(mean_of_streams, tuple(value)) if isinstance(value, list) else value

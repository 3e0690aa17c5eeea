"""The modules of the big student, under the teachers' own paths, and where each teacher's tensor went."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastmerge.channels.tracing import tensor_at
from fastmerge.wide.analysis import Analysis
from fastmerge.wide.grouped import GroupedLayer
from fastmerge.wide.layers import WideLayer
from fastmerge.wide.norms import NORMS, WideBatchNorm
from fastmerge.wide.streams import GateStreams, StreamTensors


@dataclass
class Layout:
    """Where the teachers' tensors lie in the wide network.

    Attributes:
        layers: per weight name of a dense layer, its path.
        biases: per bias name of a dense layer, its weight's name.
        side_by_side: per name of a tensor of a normalisation or grouped convolution, the qualified name of the one that holds
            the teachers' along its first dimension.
        per_teacher: per name of any other tensor, its T qualified names.
    """

    layers: dict[str, str] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    side_by_side: dict[str, str] = field(default_factory=dict)
    per_teacher: dict[str, list[str]] = field(default_factory=dict)


def build_network(analysis: Analysis, teachers: Sequence[nn.Module]) -> tuple[nn.Module, Layout]:
    """Builds the big student's modules from the teachers'.

    Args:
        analysis: of the first teacher.
        teachers: T networks of one architecture.

    Returns:
        A tree of modules with the teachers' paths, and where everything is.
    """
    network, layout = nn.Module(), Layout()
    parameters = [dict(t.named_parameters()) for t in teachers]
    for weight, (call, wiring) in analysis.wirings.items():
        biases = None if call.bias is None else [p[call.bias].detach() for p in parameters]
        wide = WideLayer(
            call.geometry,
            wiring,
            [p[weight].detach() for p in parameters],
            biases,
            keep_each_bias=analysis.each and not wiring.writes_streams,
        )
        attach(network, call.name, wide)
        layout.layers[weight] = call.name
        if call.bias is not None:
            layout.biases[call.bias] = weight
    for mode, graph in analysis.traced.graphs.items():
        for node in graph.nodes:
            _attach_node(network, layout, analysis, teachers, mode, node)
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    return network, layout


def _attach_node(
    network: nn.Module, layout: Layout, analysis: Analysis, teachers: Sequence[nn.Module], mode: str, node: fx.Node
) -> None:
    """Attaches what one node refers to, unless it is there."""
    target = str(node.target)
    if node.op == "call_module" and analysis.dense_call(mode, node) is None and not has(network, target):
        module = analysis.traced.root.get_submodule(target)
        if not analysis.is_stateful(node):
            attach(network, target, copy.deepcopy(module))
            return
        own = [*module.named_parameters(), *module.named_buffers()]
        names = {name: analysis.names.get(id(tensor), f"{target}.{name}") for name, tensor in own}
        wide = _side_by_side(analysis, mode, node, [t.get_submodule(target) for t in teachers])
        if wide is not None:
            attach(network, target, wide)
            layout.side_by_side.update({full: f"{target}.{name}" for name, full in names.items()})
            return
        copies = nn.ModuleList(copy.deepcopy(t.get_submodule(target)) for t in teachers)
        attach(network, target, copies)
        for name, full in names.items():
            layout.per_teacher.setdefault(full, [f"{target}.{t}.{name}" for t in range(len(teachers))])
    elif node.op == "get_attr" and not has(network, target):
        name = analysis.tensor_name(target)
        if name in analysis.stateful:
            tensors = StreamTensors([tensor_at(t, name) for t in teachers])
            attach(network, target, tensors)
            places = [f"{target}.{tensors.attribute(t)}" for t in range(len(teachers))]
            layout.per_teacher.setdefault(name, places)
        elif name not in layout.layers and name not in layout.biases:
            attach(network, target, copy.deepcopy(tensor_at(analysis.traced.root, target)))


def _side_by_side(
    analysis: Analysis, mode: str, node: fx.Node, modules: Sequence[nn.Module]
) -> WideBatchNorm | GroupedLayer | None:
    """The teachers' BatchNorms or grouped convolutions as one module, unless the network's code also reaches into them."""
    tensors = {f"{node.target}.{name}" for name, _ in [*modules[0].named_parameters(), *modules[0].named_buffers()]}
    names = {analysis.names.get(id(parameter)) for parameter in modules[0].parameters()}
    if not tensors.isdisjoint(analysis.reached) or not analysis.tied.isdisjoint(names):
        return None
    if type(modules[0]) in NORMS:
        return WideBatchNorm(modules)
    call = analysis.calls[mode].get(node)
    if call is None:
        return None
    weights = [module.get_parameter("weight").detach() for module in modules]
    biases = None if call.bias is None else [module.get_parameter("bias").detach() for module in modules]
    return GroupedLayer(call.geometry, call.groups, weights, biases)


def attach(network: nn.Module, path: str, value: Any) -> None:
    """Puts a module or constant tensor at a dotted path, making containers on the way."""
    *containers, last = path.split(".")
    for name in containers:
        if name not in network._modules:
            network.add_module(name, nn.Module())
        network = network.get_submodule(name)
    if isinstance(value, nn.Module):
        container = network._modules.get(last)
        network.add_module(last, value)
        if container is not None:  # what was put below a container that turns out to be a module
            for name, child in container.named_children():
                value.add_module(name, child)
    elif isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        network.register_buffer(last, value, persistent=False)
    else:
        setattr(network, last, value)


def attach_gate(network: nn.Module, layer: str, columns: Sequence[Tensor], channel_dim: int, sample_dim: int) -> str:
    """Puts the module that gates what a layer reads below ``gates_before``; a layer used twice may read different channels.

    Args:
        network: the wide modules.
        layer: the layer's path.
        columns: per teacher, of the gate matrix; see :class:`~fastmerge.wide.streams.GateStreams`.
        channel_dim: likewise.
        sample_dim: likewise.

    Returns:
        The module's path, of one that was there before if it gates the same channels.
    """
    path = f"gates_before.{layer.replace('.', '_')}"
    while has(network, path):
        gate = network.get_submodule(path)
        assert isinstance(gate, GateStreams)
        if gate.sample_dim == sample_dim and torch.equal(gate.index.cpu(), torch.cat(list(columns))):
            return path
        path += "_"
    device = next(network.parameters()).device  # lowered anew, it need not be the CPU
    attach(network, path, GateStreams([column.to(device) for column in columns], channel_dim, sample_dim))
    return path


def has(network: nn.Module, path: str) -> bool:
    """Whether something other than a bare container lies at a dotted path."""
    value: Any = network
    for name in path.split("."):
        if not hasattr(value, name):
            return False
        value = getattr(value, name)
    return type(value) is not nn.Module

"""The modules of the big student, under the teachers' own paths, and where each teacher's tensor went."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, fx, nn

from fastmerge.channels.groups import OUTPUT, ChannelGroups
from fastmerge.channels.layer_calls import LayerCall, layer_call, parameter_names
from fastmerge.channels.tracing import TracedNetwork
from fastmerge.wide.grouped import GroupedLayer
from fastmerge.wide.layers import WideLayer, Wiring
from fastmerge.wide.norms import NORMS, WideBatchNorm
from fastmerge.wide.shapes import Shapes
from fastmerge.wide.streams import StreamTensors


@dataclass
class Analysis:
    """What is known of a traced network before anything is built; its identities are taken out of its graphs.

    Attributes:
        traced: the first teacher's graphs.
        groups: its channel groups.
        shapes: of its values.
        calls: per mode, the layer call of each node that is one (dense and grouped).
        names: the one name of each parameter by ``id``.
    """

    traced: TracedNetwork
    groups: ChannelGroups
    shapes: Shapes
    names: dict[int, str] = field(init=False)
    calls: dict[str, dict[fx.Node, LayerCall]] = field(init=False)

    def __post_init__(self) -> None:
        self.names = parameter_names(self.traced.root)
        for graph in self.traced.graphs.values():
            _remove_identities(graph, self.traced.root)
        self.calls = {
            mode: {n: c for n in graph.nodes if (c := layer_call(n, self.traced.root, self.names)) is not None}
            for mode, graph in self.traced.graphs.items()
        }

    @property
    def stateful(self) -> Collection[str]:
        """Names of tensors that each stream has its own of: all that are used, but for dense layers'."""
        return self.groups.tensors.keys()

    @cached_property
    def reached(self) -> set[str]:
        """Names of the tensors that the code reads itself, rather than a module of ``torch.nn``."""
        targets = {str(n.target) for graph in self.traced.graphs.values() for n in graph.nodes if n.op == "get_attr"}
        return targets | {self.tensor_name(target) for target in targets}

    @cached_property
    def tied(self) -> set[str]:
        """Names of parameters that are known by another name, too."""
        every = self.traced.root.named_parameters(remove_duplicate=False)
        return {self.names[id(parameter)] for name, parameter in every if self.names[id(parameter)] != name}

    def dense_call(self, mode: str, node: fx.Node) -> LayerCall | None:
        """The dense layer a node calls, if any."""
        call = self.calls[mode].get(node)
        return call if call is not None and call.groups == 1 else None

    def averages(self, call: LayerCall) -> bool:
        """Whether a layer makes the network's output, which is the teachers' mean."""
        return bool((self.groups.outputs[call.weight].group == OUTPUT).any())

    def tensor_name(self, target: str) -> str:
        """The one name of the parameter or buffer behind a graph's ``get_attr`` target."""
        owner, _, attribute = target.rpartition(".")
        return self.names.get(id(getattr(self.traced.root.get_submodule(owner), attribute)), target)

    def is_stateful(self, node: fx.Node) -> bool:
        """Whether a node brings in values of its own for each teacher, other than a dense layer's."""
        if node.op == "get_attr":
            return self.tensor_name(str(node.target)) in self.stateful
        if node.op == "call_module":
            module = self.traced.root.get_submodule(str(node.target))
            tensors = [*module.named_parameters(), *module.named_buffers()]
            names = {self.names.get(id(tensor), f"{node.target}.{name}") for name, tensor in tensors}
            return not names.isdisjoint(self.stateful)
        return False

    def streams(self, mode: str, each: bool = False) -> set[fx.Node]:
        """The nodes whose value is T streams rather than one shared tensor.

        Args:
            mode: "train" or "eval".
            each: whether output layers give each teacher's own output instead of the mean.
        """
        found: set[fx.Node] = set()
        for node in self.traced.graphs[mode].nodes:
            call = self.dense_call(mode, node)
            if call is not None:
                is_stream = each or not self.averages(call)
            else:
                is_stream = self.is_stateful(node) or any(source in found for source in node.all_input_nodes)
            if is_stream and node.op not in ("placeholder", "output"):
                found.add(node)
        return found

    @cached_property
    def paths(self) -> dict[str, str]:
        """Per weight name the path of its wide layer: layers that share a weight are one."""
        return {weight: call.name for weight, (call, _) in self.wirings().items()}

    def wirings(self) -> dict[str, tuple[LayerCall, Wiring]]:
        """Per dense layer (by weight name) its first call and what it connects."""
        wirings: dict[str, tuple[LayerCall, Wiring]] = {}
        for mode in self.traced.graphs:
            streams = self.streams(mode)
            for node in self.traced.graphs[mode].nodes:
                call = self.dense_call(mode, node)
                if call is not None:
                    first, before = wirings.get(call.weight, (call, Wiring(False, False)))
                    reads = before.reads_streams or call.input in streams
                    wirings[call.weight] = (first, Wiring(reads, not self.averages(call)))
        return wirings

    def needs_each(self, nonlinear: set[tuple[str, str]]) -> bool:
        """Whether the mean of the teachers' outputs differs from what follows from the mean of their last layers."""
        for mode, graph in self.traced.graphs.items():
            tail: set[fx.Node] = set()
            for node in graph.nodes:
                call = self.dense_call(mode, node)
                if (call is not None and self.averages(call)) or any(source in tail for source in node.all_input_nodes):
                    tail.add(node)
                    if call is None and (mode, node.name) in nonlinear:
                        return True
        return False


def _remove_identities(graph: fx.Graph, root: nn.Module) -> None:
    """Lets whoever reads the output of an ``nn.Identity`` read its input, so that both are one value to be gated."""
    for node in graph.nodes:
        if (
            node.op == "call_module"
            and type(root.get_submodule(str(node.target))) is nn.Identity
            and len(node.args) == 1
        ):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


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


def build_network(analysis: Analysis, teachers: Sequence[nn.Module], keep_each_bias: bool) -> tuple[nn.Module, Layout]:
    """Builds the big student's modules from the teachers'.

    Args:
        analysis: of the first teacher.
        teachers: T networks of one architecture.
        keep_each_bias: see :class:`~fastmerge.wide.layers.WideLayer`.

    Returns:
        A tree of modules with the teachers' paths, and where everything is.
    """
    network, layout = nn.Module(), Layout()
    parameters = [dict(t.named_parameters()) for t in teachers]
    for weight, (call, wiring) in analysis.wirings().items():
        biases = None if call.bias is None else [p[call.bias].detach() for p in parameters]
        wide = WideLayer(
            call.geometry,
            wiring,
            [p[weight].detach() for p in parameters],
            biases,
            keep_each_bias and not wiring.writes_streams,
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
            tensors = StreamTensors([_get(t, name) for t in teachers])
            attach(network, target, tensors)
            places = [f"{target}.{tensors.attribute(t)}" for t in range(len(teachers))]
            layout.per_teacher.setdefault(name, places)
        elif name not in layout.layers and name not in layout.biases:
            attach(network, target, copy.deepcopy(_get(analysis.traced.root, target)))


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


def has(network: nn.Module, path: str) -> bool:
    """Whether something other than a bare container lies at a dotted path."""
    value: Any = network
    for name in path.split("."):
        if not hasattr(value, name):
            return False
        value = getattr(value, name)
    return type(value) is not nn.Module


def _get(root: nn.Module, name: str) -> Any:
    owner, _, attribute = name.rpartition(".")
    return getattr(root.get_submodule(owner), attribute)

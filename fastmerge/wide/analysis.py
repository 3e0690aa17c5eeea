"""What is known of a teacher's graphs before the big student is built: its layers, what differs from teacher to teacher."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property

from torch import fx, nn

from fastmerge.channels.groups import OUTPUT, ChannelGroups
from fastmerge.channels.layer_calls import LayerCall, layer_call, parameter_names
from fastmerge.channels.shapes import Shapes
from fastmerge.channels.tracing import TracedNetwork, tensor_at
from fastmerge.wide.layers import Wiring


@dataclass
class Analysis:
    """What is known of a traced network before anything is built; its identities are taken out of its graphs.

    Attributes:
        traced: the first teacher's graphs.
        groups: its channel groups.
        shapes: of its values.
        each: whether output layers must be able to give each teacher's own output, :meth:`needs_each`.
        calls: per mode, the layer call of each node that is one (dense and grouped).
        names: the one name of each parameter by ``id``.
    """

    traced: TracedNetwork
    groups: ChannelGroups
    shapes: Shapes
    each: bool = False
    names: dict[int, str] = field(init=False)
    calls: dict[str, dict[fx.Node, LayerCall]] = field(init=False)
    _streams: dict[tuple[str, bool], frozenset[fx.Node]] = field(init=False, default_factory=dict)

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
        return self.names.get(id(tensor_at(self.traced.root, target)), target)

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

    def streams(self, mode: str, each: bool = False) -> frozenset[fx.Node]:
        """The nodes whose value is T streams rather than one shared tensor.

        Args:
            mode: "train" or "eval".
            each: whether output layers give each teacher's own output instead of the mean.
        """
        if (mode, each) not in self._streams:
            self._streams[mode, each] = frozenset(self._find_streams(mode, each))
        return self._streams[mode, each]

    def _find_streams(self, mode: str, each: bool) -> set[fx.Node]:
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
        return {weight: call.name for weight, (call, _) in self.wirings.items()}

    @cached_property
    def wirings(self) -> dict[str, tuple[LayerCall, Wiring]]:
        """Per dense layer (by weight name) its first call and what it connects."""
        wirings: dict[str, tuple[LayerCall, Wiring]] = {}
        for mode in self.traced.graphs:
            streams = self.streams(mode)
            for node in self.traced.graphs[mode].nodes:
                call = self.dense_call(mode, node)
                if call is not None:
                    first, before = wirings.get(call.weight, (call, Wiring(False, False)))
                    averages = self.averages(call)
                    reads = before.reads_streams or call.input in streams or (self.each and averages)
                    wirings[call.weight] = (first, Wiring(reads, not averages))
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

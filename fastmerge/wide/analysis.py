"""What is known of a teacher's graphs before the big student is built: its layers, what differs from teacher to teacher."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, fx
from torch.nn.modules.batchnorm import _NormBase

from fastmerge.channels.aten import NEW, bind, is_size, may_alias, op_name, writes_in_place
from fastmerge.channels.groups import OUTPUT, ChannelGroups
from fastmerge.channels.layer_calls import LayerCall, layer_calls, weight_nodes
from fastmerge.channels.traced_network import TracedNetwork
from fastmerge.wide.layers import Wiring

BATCH_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class NormCall:
    """One call of a BatchNorm whose tensors nobody else reads, so that all teachers' can run as one.

    Attributes:
        path: the wide module's.
        tensors: names of its weight, bias, running mean and running variance, where it has them, and of its counter.
        eps: as in ``nn.BatchNorm2d``.
        momentum: likewise; None: cumulative.
        input: the node it reads.
    """

    path: str
    tensors: dict[str, str]
    eps: float
    momentum: float | None
    input: fx.Node


@dataclass
class Analysis:
    """What is known of a traced network before anything is built.

    Attributes:
        traced: the first teacher's graphs.
        groups: its channel groups.
        each: whether output layers must be able to give each teacher's own output, :meth:`needs_each`.
        shapes: of its values, by (mode, node name).
        calls: per mode, the layer call of each node that is one (dense and grouped).
        weight_nodes: per mode, the operations that compute the weights of layers.
        norms: per mode, the BatchNorm call of each node that all teachers' can run as one.
    """

    traced: TracedNetwork
    groups: ChannelGroups
    each: bool = False
    shapes: dict[tuple[str, str], tuple[int, ...]] = field(init=False)
    calls: dict[str, dict[fx.Node, LayerCall]] = field(init=False)
    weight_nodes: dict[str, set[fx.Node]] = field(init=False)
    norms: dict[str, dict[fx.Node, NormCall]] = field(init=False)
    _streams: dict[tuple[str, bool], frozenset[fx.Node]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        root = self.traced.root
        self.shapes = self.traced.shapes
        self.calls = {mode: layer_calls(graph, root) for mode, graph in self.traced.graphs.items()}
        self.norms = self._find_norms()
        self.weight_nodes = {mode: weight_nodes(self._layers(mode)) for mode in self.calls}

    @cached_property
    def averaged(self) -> set[str]:
        """Names of tensors that act on the network's output after the last layer, which is the teachers' mean by then."""
        return {name for name, (_, units) in self.groups.tensors.items() if bool((units.group == OUTPUT).any())}

    @cached_property
    def readers(self) -> dict[str, list[tuple[str, fx.Node]]]:
        """Per tensor name the (mode, node) pairs that read it."""
        found: dict[str, list[tuple[str, fx.Node]]] = {}
        for mode, graph in self.traced.graphs.items():
            for node in graph.nodes:
                if node.op == "get_attr":
                    found.setdefault(str(node.target), []).extend((mode, user) for user in node.users)
        return found

    @cached_property
    def tied(self) -> set[str]:
        """Names of parameters that are known by another name, too."""
        root = self.traced.root
        uses = Counter(id(parameter) for _, parameter in root.named_parameters(remove_duplicate=False))
        return {name for name, parameter in root.named_parameters() if uses[id(parameter)] > 1}

    @cached_property
    def held(self) -> set[str]:
        """Names of the tensors that wide layers and norms hold, rather than the graph reading them."""
        tensors = {name for mode in self.calls for call in self._layers(mode) for name in call.tensors}
        return tensors | {
            name for norms in self.norms.values() for norm in norms.values() for name in norm.tensors.values()
        }

    def _layers(self, mode: str) -> list[LayerCall]:
        """The calls of layers that become one of all teachers'."""
        return [call for n, call in self.calls[mode].items() if call.groups == 1 or self.is_wide(mode, n)]

    def dense_call(self, mode: str, node: fx.Node) -> LayerCall | None:
        """The dense layer a node calls, if any, whose weight is its own."""
        call = self.calls[mode].get(node)
        return call if call is not None and call.groups == 1 and not call.is_tied else None

    def tied_call(self, mode: str, node: fx.Node) -> LayerCall | None:
        """The last layer that a node calls, if any, whose weight is an embedding's, too."""
        call = self.calls[mode].get(node)
        return call if call is not None and call.is_tied else None

    def is_wide(self, mode: str, node: fx.Node) -> bool:
        """Whether a node is a BatchNorm or grouped convolution that all teachers' run as one."""
        call = self.calls[mode].get(node)
        if call is None:
            return node in self.norms[mode]
        return call.groups > 1 and self.tied.isdisjoint(call.tensors)

    def averages(self, call: LayerCall) -> bool:
        """Whether a layer makes the network's output, which is the teachers' mean."""
        return bool((self.groups.outputs[call.weight].group == OUTPUT).any())

    def is_stateful(self, node: fx.Node, each: bool = False) -> bool:
        """Whether a node is a tensor that each stream has its own of.

        Args:
            node: of a graph.
            each: whether output layers give each teacher's own output instead of the mean.
        """
        name = str(node.target) if node.op == "get_attr" else ""
        return name in self.groups.tensors and (each or name not in self.averaged)

    def streams(self, mode: str, each: bool = False) -> frozenset[fx.Node]:
        """The nodes whose value is T streams rather than one shared tensor.

        Args:
            mode: "train" or "eval".
            each: whether output layers give each teacher's own output instead of the mean.
        """
        if (mode, each) not in self._streams:
            self._streams[mode, each] = frozenset(self._find_streams(mode, each, set()))
        return self._streams[mode, each]

    def _find_streams(self, mode: str, each: bool, written: set[fx.Node]) -> set[fx.Node]:
        """The streams, given tensors that the code makes and then writes streams to."""
        found: set[fx.Node] = set()
        for node in self.traced.graphs[mode].nodes:
            if node.op in ("placeholder", "output") or is_size(node):
                continue
            call = self.dense_call(mode, node) or self.tied_call(mode, node)
            if call is not None:
                is_stream = each or not self.averages(call)
            else:
                own = node in written or self.is_stateful(node, each) or self.is_wide(mode, node)
                is_stream = own or any(source in found for source in node.all_input_nodes)
            if is_stream:
                found.add(node)
                made = _made_by(node) if writes_in_place(node) else None
                if made is not None and made not in found:
                    return self._find_streams(mode, each, written | {made})
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
                    wirings[call.weight] = (first, Wiring(reads, not averages, call.rows is not None))
        return wirings

    def needs_each(self, nonlinear: set[tuple[str, str]]) -> bool:
        """Whether the mean of the teachers' outputs differs from what follows from the mean of their last layers."""
        for mode, graph in self.traced.graphs.items():
            tail: set[fx.Node] = set()
            for node in graph.nodes:
                call = self.dense_call(mode, node) or self.tied_call(mode, node)
                follows = any(source in tail for source in node.all_input_nodes)
                if follows and call is not None:
                    return True
                if (call is not None and self.averages(call)) or follows:
                    tail.add(node)
                    if call is None and (mode, node.name) in nonlinear:
                        return True
        return False

    def _find_norms(self) -> dict[str, dict[fx.Node, NormCall]]:
        """The BatchNorm calls by which all calls in both modes go to modules that hold their tensors alone."""
        found = {mode: {n: c for n in g.nodes if (c := self._norm(mode, n))} for mode, g in self.traced.graphs.items()}
        calls = [(mode, node, call) for mode, norms in found.items() for node, call in norms.items()]
        nodes = {(mode, node) for mode, node, _ in calls}
        kinds: dict[str, set[Any]] = {}
        for _, _, call in calls:
            kinds.setdefault(call.path, set()).add((*call.tensors.items(), call.eps, call.momentum))
        for mode, node, call in calls:
            readers = {reader for name in call.tensors.values() for reader in self.readers.get(name, [])}
            if len(kinds[call.path]) > 1 or not readers <= nodes or not self.tied.isdisjoint(call.tensors.values()):
                if call.momentum is None:
                    raise ValueError(
                        f"layer '{call.path}' averages its statistics over all batches (momentum=None) and shares them or its "
                        "weight with another, which fastmerge can't merge; give it a momentum in every teacher"
                    )
                del found[mode][node]
        return found

    def _norm(self, mode: str, node: fx.Node) -> NormCall | None:
        if op_name(node) != "batch_norm":
            return None
        a = bind(node)
        tensors = {key: a[key] for key in BATCH_NORM_TENSORS[:4] if a[key] is not None}
        tracks = "running_mean" in tensors
        own = all(isinstance(t, fx.Node) and t.op == "get_attr" and self.is_stateful(t) for t in tensors.values())
        if not tensors or not own or a["training"] != (mode == "train" or not tracks):
            return None
        names = {key: str(tensor.target) for key, tensor in tensors.items()}
        first = next(iter(names.values()))
        owner = first.rpartition(".")[0]
        module = self.traced.root.get_submodule(owner)
        momentum = module.momentum if isinstance(module, _NormBase) else a["momentum"]
        counter = getattr(module, "num_batches_tracked", None)
        if isinstance(counter, Tensor):
            names["num_batches_tracked"] = f"{owner}.num_batches_tracked"
        every = {f"{owner}.{name}" for name, _ in [*module.named_parameters(), *module.named_buffers()]}
        return NormCall(
            owner if owner and every == set(names.values()) else first, names, a["eps"], momentum, a["input"]
        )


def _made_by(node: fx.Node) -> fx.Node | None:
    """The node that made the tensor which an operation in place changes, where the code made it from nothing."""
    target: Any = node.args[0]
    while (
        isinstance(target, fx.Node)
        and op_name(target) not in NEW
        and (may_alias(target) or writes_in_place(target))
        and any(not is_size(source) for source in target.all_input_nodes)
    ):
        target = target.args[0]
    if not isinstance(target, fx.Node) or target.op != "call_function":
        return None
    from_nothing = op_name(target) in NEW or all(is_size(source) for source in target.all_input_nodes)
    return target if from_nothing else None

"""The big student's forward passes as code: one for each mode and way to run it, compiled from lowered graphs."""

from __future__ import annotations

import linecache
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from fastmerge.gates import hand_out_gates
from fastmerge.lowering.fusion import NormUse
from fastmerge.lowering.graph import lower
from fastmerge.lowering.values import changes_reshaped
from fastmerge.wide.analysis import Analysis
from fastmerge.wide.layers import GroupedLayer, WideLayer
from fastmerge.wide.population import Population
from fastmerge.wide.streams import GateStreams
from fastmerge.wide.weights import hand_out_weights


@dataclass(frozen=True)
class Program:
    """One forward of the big student.

    Attributes:
        forward: ``forward(network, gates, *inputs)``.
        norms: what became of each call of a normalisation.
    """

    forward: Callable[..., Any]
    norms: tuple[NormUse, ...]


class Programs:
    """The forwards of a big student, by (mode, each, joined).

    The mode is "train" or "eval"; *each* runs every teacher to its own output and takes the mean there, where that is another
    one than the last layers' mean; *joined* keeps the streams in one tensor, as linked networks do.

    Args:
        analysis: of the first teacher.
        network: the wide modules; gate modules are attached to it.
        population: the channels that are left.
        linked: whether the network is, so that it needs none of the forwards of separate streams.

    Attributes:
        has_ungated_channels: whether layers read gated channels beside others that have no gate.
    """

    def __init__(self, analysis: Analysis, network: nn.Module, population: Population, linked: bool) -> None:
        self._programs: dict[tuple[str, bool, bool], Program] = {}
        for mode, each, joined in product(analysis.traced.graphs, {False, analysis.each}, {linked, True}):
            graph, norms = lowered(analysis, network, mode, population, each, joined)
            what = f"{mode} forward of {type(analysis.traced.root).__name__}"
            self._programs[mode, each, joined] = Program(function_of(graph, what), tuple(norms))
        self._traced = analysis.traced
        self._may_change_layout = not any(
            changes_reshaped(graph, partial(lambda m, n: n in analysis.calls[m], mode))
            for mode, graph in analysis.traced.graphs.items()
        )
        readers = [module for module in network.modules() if isinstance(module, GateStreams)]
        self.has_ungated_channels = any(bool((reader.index == population.total).any()) for reader in readers)

    def __getitem__(self, key: tuple[str, bool, bool]) -> Program:
        return self._programs[key]

    def run(
        self,
        key: tuple[str, bool, bool],
        network: nn.Module,
        gates: Tensor | None,
        inputs: Sequence[Any],
    ) -> Any:
        """Runs one on flat inputs, channels-last where that is faster; returns what the network does."""
        forward, joined = self._programs[key].forward, key[2]
        if joined or not self._may_change_layout or not prefers_channels_last(inputs):
            outputs = forward(network, gates, *inputs)
        else:
            outputs = to_contiguous(forward(network, gates, *to_channels_last(inputs)))
        return self._traced.structured(outputs, key[0])


def _hand_out_gates(graph: fx.Graph, network: nn.Module) -> None:
    """Lets the matrix of gates be cut once, where the forward begins, rather than by each that multiplies by some columns."""
    (matrix,) = (node for node in graph.nodes if node.op == "placeholder" and node.target == "gates")
    uses = []
    for user in matrix.users:
        gate = user.kwargs["gate"].target if "gate" in user.kwargs else user.target
        module = network.get_submodule(str(gate))
        assert isinstance(module, GateStreams)
        uses.append((user, str(gate), module))
    uses.sort(key=lambda use: use[2].start is None)
    runs = tuple((module.start, sum(module.sizes)) for _, _, module in uses if module.start is not None)
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        indices = tuple(graph.get_attr(f"{path}.index") for _, path, module in uses if module.start is None)
        columns = graph.call_function(hand_out_gates, (matrix, runs, indices))
        parts = [graph.call_function(operator.getitem, (columns, number)) for number in range(len(uses))]
    for (user, _, _), part in zip(uses, parts, strict=True):
        user.replace_input_with(matrix, part)


def _hand_out_weights(graph: fx.Graph, network: nn.Module, num_streams: int) -> None:
    """Lets all weights be cast and cut where the forward begins, rather than by each layer."""
    layers = [
        (node, layer)
        for node in graph.nodes
        if node.op == "call_module"
        and isinstance(layer := network.get_submodule(str(node.target)), (WideLayer, GroupedLayer))
    ]
    parts: dict[str, int] = {}
    for node, layer in layers:
        cut = isinstance(layer, GroupedLayer) or (layer.wiring.has_off_diagonal and not layer.linked)
        for name in ("weight", "bias"):
            if getattr(layer, name) is not None and name not in node.kwargs:
                parts[f"{node.target}.{name}"] = num_streams if cut else 1
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        tensors = tuple(graph.get_attr(path) for path in parts)
        handed = graph.call_function(hand_out_weights, (tensors, tuple(parts.values())))
        weights = {path: graph.call_function(operator.getitem, (handed, k)) for k, path in enumerate(parts)}
    for node, _ in layers:
        own = {name: weights[path] for name in ("weight", "bias") if (path := f"{node.target}.{name}") in weights}
        node.kwargs = {**own, **node.kwargs}


def lowered(
    analysis: Analysis, network: nn.Module, mode: str, population: Population, each: bool, joined: bool
) -> tuple[fx.Graph, list[NormUse]]:
    """The graph of one forward, over the network and ``(gates, *inputs)``, and what became of each normalisation."""
    graph, norms = lower(analysis, network, mode, population, each, joined)
    _hand_out_gates(graph, network)
    _hand_out_weights(graph, network, 1 if joined else population.num_teachers)
    return graph, norms


def function_of(graph: fx.Graph, what: str) -> Callable[..., Any]:
    """A graph as a function of the root and its inputs, whose code tracebacks show under what it is.

    It takes modules on the way to what it reads from ``_modules``: as attributes, nn.Module looks for them in Python.
    """
    targets = {node: str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")}
    places: dict[str, str] = {}
    for number, (node, target) in enumerate(targets.items()):
        *way, last = target.split(".")
        owner = "self" + "".join(f"._modules[{name!r}]" for name in way)
        places[f"self._{number}_"] = (
            f"getattr({owner}, {last!r})" if node.op == "get_attr" else f"{owner}._modules[{last!r}]"
        )
        node.target = f"_{number}_"
    code = graph.python_code("self")
    for node, target in targets.items():
        node.target = target
    source = re.sub(r"\bself\._\d+_", lambda found: places[found[0]], code.src)
    filename = f"<fastmerge {what} {id(graph)}>"
    namespace = dict(code.globals)
    exec(compile(source, filename, "exec"), namespace)
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    return namespace["forward"]


_CHANNELS_LAST_DTYPES = (torch.float32, torch.bfloat16)


def prefers_channels_last(inputs: Iterable[Any]) -> bool:
    """Whether a network with these inputs should run channels-last although they are not."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    return (
        not torch.compiler.is_compiling()
        and any(x.dim() == 4 for x in tensors)
        and all(x.device.type == "cpu" and x.dtype in _CHANNELS_LAST_DTYPES for x in tensors)
        # batched by torch.func.vmap they have no memory format
        and not any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors)
        and not any(x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) for x in tensors)
    )


def to_channels_last(inputs: Iterable[Any]) -> tuple[Any, ...]:
    """The inputs, four-dimensional ones channels-last."""
    return tuple(
        x.contiguous(memory_format=torch.channels_last) if isinstance(x, Tensor) and x.dim() == 4 else x for x in inputs
    )


def to_contiguous(outputs: Any) -> Any:
    """The outputs as a network of contiguous inputs gives them."""
    return tree_map_only(Tensor, lambda y: y.contiguous() if y.dim() == 4 else y, outputs)

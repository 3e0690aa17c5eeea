"""A traced network: the graphs of ATen operations that its forward is, how to call them, and what they predict."""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fastmerge.channels.aten import is_size

CONSTANT = "constant_tensors"
MODES = ("train", "eval")


@dataclass
class TracedNetwork:
    """The graphs of one network, for inputs of one structure and shape but for the batch size.

    Nodes have in their ``meta``: "shape", of a tensor for the example inputs; "sample_dims", its dimensions that grow with the
    batch; "path", of the module that the operation is called in; "code", file:line of the user's code, where known.

    Attributes:
        root: a copy of the network that the graphs' targets refer to; running it leaves the original alone. Tensors that the
            code makes itself are buffers of its child ``constant_tensors``.
        graphs: ``{"train": graph, "eval": graph}``, or one of them; from flat inputs to a tuple of flat outputs.
        in_spec: structure of ``(args, kwargs)``.
        out_specs: structure of the output, per mode.
        name: of the network's class.
        signature: of its forward, without annotations, which pickle may not take.
        inputs: the example inputs, flat; of a tensor its shape, dtype and device alone, on the meta device.
        constants: tensors that the code makes itself, by name below ``constant_tensors``.
        is_open: per mode whether the graph is that of every batch size; some code fixes it, such as ``len(x)`` of a batch, or
            does something else with some, such as ``if len(x) > 4``.
        takes_one: per mode whether it is then that of one sample, too.
        is_one_graph: whether the eval graph is the training graph, but for what normalisations and dropouts are told.
        questions: file:line of the user's code that asks whether it is being compiled or exported, each once.
    """

    root: nn.Module
    graphs: dict[str, fx.Graph]
    in_spec: Any
    out_specs: dict[str, Any]
    name: str
    signature: inspect.Signature
    inputs: list[Any] = field(default_factory=list)
    constants: dict[str, Tensor] = field(default_factory=dict)
    is_open: dict[str, bool] = field(default_factory=dict)
    takes_one: dict[str, bool] = field(default_factory=dict)
    is_one_graph: bool = False
    questions: list[str] = field(default_factory=list)

    def is_for(self, inputs: Sequence[Any], mode: str) -> bool:
        """Whether a mode's graph is that for flat inputs: all are like the example inputs but for an open batch size."""
        count, example = (samples_in(given) for given in (inputs, self.inputs))
        fits = (count != 1 or self.takes_one[mode]) if self.is_open[mode] else count == example
        return fits and all(_is_like(x, y, count, example) for x, y in zip(inputs, self.inputs, strict=True))

    def outputs(self, mode: str) -> list[Any]:
        """What one mode's graph returns: nodes, and values that are no result of an operation."""
        return list(next(node for node in self.graphs[mode].nodes if node.op == "output").args[0])

    def structured(self, outputs: Sequence[Any], mode: str) -> Any:
        """Flat outputs in the structure that the network returns them in."""
        spec = self.out_specs[mode]
        return outputs[0] if spec.is_leaf() else pytree.tree_unflatten(outputs, spec)

    def output_shapes(self, mode: str) -> list[tuple[int, ...] | None]:
        """The shape of each flat output, None of what is no tensor."""
        return [getattr(node, "meta", {}).get("shape") for node in self.outputs(mode)]

    @property
    def shapes(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """Per (mode, node name) the shape of a value that is a tensor."""
        return {(m, n.name): n.meta["shape"] for m, g in self.graphs.items() for n in g.nodes if "shape" in n.meta}

    def flat(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The arguments of a call in the order of the graphs' placeholders.

        Raises:
            TypeError: if they are not structured like the example inputs, naming the arguments.
        """
        numbered_args, numbered_kwargs = numbered(self.in_spec)
        if kwargs.keys() == numbered_kwargs.keys():  # in whatever order
            kwargs = {name: kwargs[name] for name in numbered_kwargs}
        leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
        if spec == self.in_spec:
            return leaves
        given = self.signature.bind(*args, **kwargs).arguments
        places = self.signature.bind(*numbered_args, **numbered_kwargs).arguments
        problems = [f"'{name}' is missing" for name in places if name not in given]
        problems += [f"'{name}' was not among them" for name in given if name not in places]
        found: dict[int, Any] = {}
        for name in [name for name in places if name in given]:
            if pytree.tree_structure(given[name]) != pytree.tree_structure(places[name]):
                example = pytree.tree_map(self.inputs.__getitem__, places[name])
                problems.append(f"'{name}' is {_kind(given[name])}, and was {_kind(example)}")
            found.update(zip(pytree.tree_leaves(places[name]), pytree.tree_leaves(given[name]), strict=False))
        if problems:
            raise TypeError(
                f"{self.name} needs arguments of the structure that it was traced with: {', '.join(problems)}. "
                "To run it on such inputs, build the big student with example_inputs of their structure"
            )
        return [found[place] for place in range(len(found))]

    def with_root(self, root: nn.Module) -> TracedNetwork:
        """The same graphs over another network of the architecture."""
        with torch.inference_mode(False):
            for name, tensor in self.constants.items():
                add_constant(root, name, tensor.clone())
        return dataclasses.replace(self, root=root)

    def __getstate__(self) -> dict[str, Any]:
        graphs = {mode: _plain(graph) for mode, graph in self.graphs.items()}
        outputs = {mode: numbered(spec) for mode, spec in self.out_specs.items()}
        return {**self.__dict__, "graphs": graphs, "in_spec": numbered(self.in_spec), "out_specs": outputs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.graphs = {mode: _graph(nodes) for mode, nodes in state["graphs"].items()}
        self.in_spec = pytree.tree_structure(state["in_spec"])
        self.out_specs = {mode: pytree.tree_structure(tree) for mode, tree in state["out_specs"].items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedNetwork:
        return self  # nobody changes it


def samples_in(inputs: Sequence[Any]) -> int:
    """The batch size of flat inputs: the length of the first tensor that has one."""
    return next((x.shape[0] for x in inputs if isinstance(x, Tensor) and x.dim()), 0)


def _is_like(x: Any, example: Any, count: int, of_example: int) -> bool:
    if not isinstance(x, Tensor) or not isinstance(example, Tensor):
        return type(x) is type(example) and bool(x == example)
    if x.dim() != example.dim() or (
        x.dtype != example.dtype and not (x.is_floating_point() and example.is_floating_point())
    ):
        return False
    if not x.dim():
        return True
    return (
        x.shape[0] == (count if example.shape[0] == of_example else example.shape[0])
        and x.shape[1:] == example.shape[1:]
    )


def add_constant(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts a tensor that the code makes below a network."""
    if not hasattr(root, CONSTANT):
        root.add_module(CONSTANT, nn.Module())
    getattr(root, CONSTANT).register_buffer(name, tensor, persistent=False)


def numbered(spec: Any) -> Any:
    """A structure with numbers for leaves, which pickle can take where it can take the structure's own classes."""
    return pytree.tree_unflatten(list(range(spec.num_leaves)), spec)


@dataclass(frozen=True)
class _Reference:
    """A node in a plain description of a graph."""

    name: str


def _plain(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """A graph as what pickle can take."""

    def target(node: fx.Node) -> Any:
        return f"torch.ops.{node.target}" if isinstance(node.target, torch._ops.OpOverload) else node.target

    def plain(value: Any) -> Any:
        return fx.map_arg(value, lambda node: _Reference(node.name))  # type: ignore[arg-type, return-value]

    return [(n.op, n.name, target(n), plain(n.args), plain(n.kwargs), n.meta) for n in graph.nodes]


def _graph(nodes: Sequence[tuple[Any, ...]]) -> fx.Graph:
    graph = fx.Graph()
    known: dict[str, fx.Node] = {}

    def nodes_in(value: Any) -> Any:
        return fx.node.map_aggregate(value, lambda leaf: known[leaf.name] if isinstance(leaf, _Reference) else leaf)

    for op, name, target, args, kwargs, meta in nodes:
        if isinstance(target, str) and target.startswith("torch.ops."):
            target = operator.attrgetter(target.removeprefix("torch."))(torch)
        node = graph.create_node(op, target, nodes_in(args), nodes_in(kwargs), name)
        node.meta = meta
        known[name] = node
    return graph


def _kind(value: Any) -> str:
    """What an argument is, in words: its containers, not what is in them."""
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of {', '.join(map(repr, value)) or 'nothing'}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return "None" if value is None else f"a {type(value).__name__}"


def tensor_at(root: nn.Module, path: str) -> Tensor:
    """The parameter or buffer at a dotted path."""
    *way, attribute = path.split(".")
    for name in way:
        root = root._modules[name]  # type: ignore[assignment]
    tensor = getattr(root, attribute)
    assert isinstance(tensor, Tensor), path
    return tensor


def module_path(node: fx.Node) -> str:
    """Where in the network a node comes from, for messages: the module's path, or the node's own name at the top."""
    return str(node.meta.get("path") or node.name)


Name = str | int | tuple[str | int, ...]


def predictions(traced: TracedNetwork, names: Sequence[Name] | None = None) -> dict[str, frozenset[int]]:
    """The outputs that are predictions: per mode their positions among the flat outputs.

    Args:
        traced: the network.
        names: which they are: a key of a dict, an attribute of a dataclass, a position in a tuple, or a tuple of such names
            that leads to a nested one. None: those that no parameter follows, so that feature maps on the way are left out.

    Raises:
        ValueError: if a name fits no output.
    """
    found = {mode: frozenset(_of_mode(traced, mode, names)) for mode in traced.graphs}
    if names is not None:
        every = {path for mode in traced.graphs for path in _paths(traced.out_specs[mode])}
        for name in names:
            wanted = name if isinstance(name, tuple) else (name,)
            if not any(path[: len(wanted)] == wanted for path in every):
                known = ", ".join(repr(path[0] if len(path) == 1 else path) for path in sorted(every, key=str) if path)
                raise ValueError(
                    f"outputs names {wanted}, which the network does not return; it returns {known or 'one tensor'}"
                )
    return found


def _of_mode(traced: TracedNetwork, mode: str, names: Sequence[Name] | None) -> set[int]:
    nodes = {
        k: node for k, node in enumerate(traced.outputs(mode)) if isinstance(node, fx.Node) and "shape" in node.meta
    }
    if names is None:
        followed = _followed(traced, mode)
        last = {k for k, node in nodes.items() if node not in followed}
        return last or set(nodes)
    paths = _paths(traced.out_specs[mode])
    wanted = [name if isinstance(name, tuple) else (name,) for name in names]
    named = {k for k in nodes if any(paths[k][: len(name)] == name for name in wanted)}
    return named or _of_mode(traced, mode, None)  # a mode that returns something else, such as one tensor


def _followed(traced: TracedNetwork, mode: str) -> set[fx.Node]:
    """The values that reach another operation on a parameter."""
    graph = traced.graphs[mode]
    parameters = {name for name, _ in traced.root.named_parameters(remove_duplicate=False)}
    followed: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function":
            continue
        own = any(s.op == "get_attr" and str(s.target) in parameters for s in node.all_input_nodes)
        if own or node in followed:
            followed.update(s for s in node.all_input_nodes if s.op != "get_attr" and not is_size(s))
    return followed


def _paths(spec: Any) -> list[tuple[str | int, ...]]:
    """Where each output lies in what the network returns."""
    return [tuple(_name(key) for key in path) for path, _ in pytree.tree_flatten_with_path(numbered(spec))[0]]


def _name(key: Any) -> str | int:
    if isinstance(key, pytree.SequenceKey):
        return key.idx
    return str(key.name) if isinstance(key, pytree.GetAttrKey) else key.key

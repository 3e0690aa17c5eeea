"""Convolutions and linear layers in a traced graph: ATen operations whose weight is a parameter, or computed from one."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from fastmerge.channels.aten import LAYERS, PRODUCTS, bind, op_name
from fastmerge.channels.computed_weights import RowProgram, WeightNorm, row_program, sources_of, weight_norm


@dataclass(frozen=True)
class Geometry:
    """What a convolution or linear layer does with its weight, apart from the weight.

    Attributes:
        kind: "linear", "matmul" (a linear layer whose weight is (in, out)), "conv" or "conv_transpose".
        spatial_dims: 1, 2 or 3; 0 for linear.
        options: stride, padding, dilation and, where transposed, output_padding.
    """

    kind: str
    spatial_dims: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def out_dim(self) -> int:
        """The weight's dimension of output channels."""
        return 1 if self.kind in ("conv_transpose", "matmul") else 0

    @property
    def in_dim(self) -> int:
        """The weight's dimension of input channels."""
        return 1 - self.out_dim

    @property
    def channel_dim(self) -> int:
        """The activation's dimension of channels."""
        return 1 if self.spatial_dims else -1


@dataclass(frozen=True)
class LayerCall:
    """One call of a convolution or linear layer.

    Attributes:
        name: the layer's path in the network, for people.
        weight: name of its weight parameter, or of the one that its weight is computed from.
        bias: name of its bias parameter, or None.
        geometry: how the weight is applied.
        groups: 1 if every output channel reads every input channel.
        input: the node it reads.
        operand: the node of the weight.
        is_tied: whether its weight is that of an embedding, too.
        norm: of a weight that is computed by weight normalisation, the rest of it.
        rows: of a weight that is computed row by row, how.
    """

    name: str
    weight: str
    bias: str | None
    geometry: Geometry
    groups: int
    input: fx.Node
    operand: fx.Node
    is_tied: bool = False
    norm: WeightNorm | None = None
    rows: RowProgram | None = None

    @property
    def is_plain(self) -> bool:
        """Whether its weight is a parameter that nothing else uses."""
        return self.norm is None and self.rows is None and not self.is_tied

    @property
    def tensors(self) -> list[str]:
        """Names of the tensors that are the layer's own: weight, bias and magnitude."""
        if self.is_tied:
            return []
        own = (self.weight, self.bias, None if self.norm is None else self.norm.magnitude)
        return [name for name in own if name is not None]


def layer_calls(graph: fx.Graph, root: nn.Module) -> dict[fx.Node, LayerCall]:
    """The layer that each node of a traced graph calls, of those that call one."""
    names = {name for name, _ in root.named_parameters()}
    embedded = {_parameter_of(node.args[0], names) for node in graph.nodes if op_name(node) == "embedding"}
    calls = {node: call for node in graph.nodes if (call := _layer_call(node, root, names)) is not None}
    for node, call in calls.items():
        if call.weight in embedded and call.geometry.kind == "linear" and call.is_plain:
            calls[node] = replace(call, is_tied=True)
    return calls


def weight_nodes(calls: Iterable[LayerCall]) -> set[fx.Node]:
    """The operations that compute the weights of layers, and nothing else."""
    return {node for call in calls for node in sources_of(call.operand) or [] if node.op == "call_function"}


def _layer_call(node: fx.Node, root: nn.Module, names: Collection[str]) -> LayerCall | None:
    """The layer that a node calls, or None if it is something else.

    Args:
        node: a node of a traced graph.
        root: the network the graph's targets refer to.
        names: of its parameters.
    """
    operands = _operands(node)
    if operands is None:
        return None
    source, operand, given, geometry, groups = operands
    bias = _parameter_of(given, names)
    if bias is None and given is not None:
        return None
    norm = rows = None
    weight = _parameter_of(untransposed(operand), names)
    if weight is not None and len(untransposed(operand).meta["shape"]) != geometry.spatial_dims + 2:
        return None
    if weight is None:
        normed = weight_norm(operand, names)
        if normed is not None:
            weight, norm = normed
        elif geometry.out_dim == 0 and (rows := row_program(operand, root)) is not None:
            weight = _parameter_of(rows.parameter, names)
    elif operand.op != "get_attr":
        geometry = replace(geometry, kind="matmul" if geometry.kind == "linear" else "linear")
    if weight is None:
        return None
    call = LayerCall("", weight, bias, geometry, groups, source, operand, norm=norm, rows=rows)
    return replace(call, name=_path(root, call.tensors))


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, Any, Geometry, int] | None:
    """What a layer reads, its weight, its bias, how the weight is applied, and of how many groups; None for no layer."""
    name, given = op_name(node), None
    if name in LAYERS:
        arguments = bind(node)
        source, groups = arguments.pop("input"), arguments.pop("groups", 1)
        weight, given = arguments.pop("weight"), arguments.pop("bias")
        kind, spatial_dims = LAYERS[name]
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
        geometry = Geometry(kind, spatial_dims, options)
    elif name in PRODUCTS:
        source, weight = node.args[-2:]
        groups, geometry = 1, Geometry("matmul", 0)
        if name == "addmm":
            given = node.args[0]
        if node.kwargs or len(node.args) > PRODUCTS[name]:
            return None
    else:
        return None
    if not isinstance(source, fx.Node) or not isinstance(weight, fx.Node):
        return None
    if name in PRODUCTS and (source.op == "get_attr" or len(source.meta.get("shape", ())) < 2):
        return None
    return source, weight, given, geometry, groups


def untransposed(weight: fx.Node) -> fx.Node:
    """The matrix of which a node is the transpose; any other node itself."""
    name, dims = op_name(weight), [a for a in weight.args[1:] if not isinstance(a, fx.Node)]
    swaps = name in ("t", "numpy_T", "matrix_H", "mT") or dims in ([0, 1], [1, 0], [-1, -2], [-2, -1], [[1, 0]])
    if swaps and name in ("t", "numpy_T", "matrix_H", "mT", "transpose", "permute", "swapaxes"):
        source = weight.args[0]
        if isinstance(source, fx.Node) and len(source.meta.get("shape", ())) == 2:
            return source
    return weight


def _parameter_of(argument: Any, names: Collection[str]) -> str | None:
    is_parameter = isinstance(argument, fx.Node) and argument.op == "get_attr" and argument.target in names
    return str(argument.target) if is_parameter else None


def _path(root: nn.Module, tensors: Collection[str]) -> str:
    """A layer's path: of the module that holds its weight, what belongs to it and no other tensor, or else the weight's name.

    Args:
        root: the network.
        tensors: names of its weight, and of its bias and magnitude if it has them.
    """
    weight = next(iter(tensors))
    owner, _, attribute = (
        weight.partition(".parametrizations.") if ".parametrizations." in weight else weight.rpartition(".")
    )
    own = {f"{owner}.{name}" for name, _ in root.get_submodule(owner).named_parameters()}
    return owner if owner and attribute.partition(".")[0] == "weight" and own == {*tensors} else weight

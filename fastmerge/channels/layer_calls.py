"""Convolutions and linear layers in a traced graph: ATen operations whose weight is a parameter, or computed from one.

Weights are computed row by row, as weight standardisation does, or by weight normalisation. The teachers' own operations
compute the big student's weight too, of all teachers' rows at once and over other columns. So for each of them it must be
known where rows and columns lie.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx, nn

from fastmerge.channels.aten import (
    LAYERS,
    PRODUCTS,
    RESHAPES,
    bind,
    is_pointwise,
    is_size,
    op_name,
    reduced_dims,
    writes_in_place,
)
from fastmerge.channels.traced_network import tensor_at

REDUCTIONS = {"mean", "sum", "var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm"}
KEPT = {"clone", "contiguous", "to", "_to_copy", "type_as", "detach"}
_MOVED = {*RESHAPES, "expand", "expand_as", "unsqueeze", "squeeze", "flatten", "unflatten"}

Axes = tuple[tuple[int, ...], ...]  # per dimension of a value, which axes of the parameter lie along it


@dataclass(frozen=True)
class WeightNorm:
    """A weight ``g · v / ‖v‖``, each slice along a dimension with a norm of its own.

    Attributes:
        magnitude: name of the parameter g.
        dim: along which; -1: one norm for the whole weight.
    """

    magnitude: str
    dim: int


@dataclass(frozen=True)
class RowProgram:
    """Operations each of which computes a row (output channel) from that row alone.

    Attributes:
        axes: per operation, in their order, and per tensor that they read, where the parameter's dimensions lie.
        rows: names of further tensors with a value for each row, such as a gain.
        parameter: the node of the parameter.
        weight: the node of the weight.
    """

    axes: Mapping[fx.Node, Axes]
    rows: Mapping[fx.Node, str]
    parameter: fx.Node
    weight: fx.Node


def sources_of(weight: fx.Node) -> list[fx.Node] | None:
    """What a weight is computed from, in the order of the graph, itself last; None if the network's input is among it."""
    found, waiting = {weight}, [weight]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source.op not in ("get_attr", "call_function"):
                return None
            if source not in found:
                found.add(source)
                waiting.append(source)
    return [node for node in weight.graph.nodes if node in found]


def _weight_norm(weight: fx.Node, names: Collection[str]) -> tuple[str, WeightNorm] | None:
    """The parameter v of a weight ``g · v / ‖v‖``, and the rest of it; None if it is none."""
    if op_name(weight) != "_weight_norm":
        return None
    a = bind(weight)
    if any(node.op != "get_attr" or node.target not in names for node in (a["v"], a["g"])):
        return None
    return str(a["v"].target), WeightNorm(str(a["g"].target), a["dim"])


def _row_program(weight: fx.Node, root: nn.Module) -> RowProgram | None:
    """How a weight is computed row by row; None if it is computed in another way, or by operations that are not known."""
    nodes = sources_of(weight)
    shape = weight.meta.get("shape")
    if nodes is None or weight.op == "get_attr" or shape is None or len(shape) < 2:
        return None
    tensors = {node: tensor_at(root, str(node.target)) for node in nodes if node.op == "get_attr"}
    alike = [node for node, tensor in tensors.items() if tuple(tensor.shape) == shape]
    if len(alike) != 1:
        return None
    reader = _Reader(shape)
    try:
        for node in nodes:
            if node in tensors:
                reader.axes[node] = reader.tensor(tensors[node], node is alike[0])
                reader.shapes[node] = tuple(tensors[node].shape)
            elif not is_size(node):
                reader.shapes[node] = reader.shape_of(node)
                reader.axes[node] = reader.operation(node)
    except _NotByRows:
        return None
    if reader.axes[weight] != reader.axes[alike[0]]:
        return None
    rows = {node: str(node.target) for node in tensors if node is not alike[0] and tensors[node].numel() > 1}
    return RowProgram(reader.axes, rows, alike[0], weight)


class _NotByRows(Exception):  # noqa: N818
    """An operation mixes rows, or is not known."""


class _Reader:
    """Follows where the dimensions of a parameter go.

    Args:
        parameter: its shape.
    """

    def __init__(self, parameter: tuple[int, ...]) -> None:
        self.parameter = parameter
        self.axes: dict[fx.Node, Axes] = {}
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def tensor(self, tensor: Tensor, is_parameter: bool) -> Axes:
        shape = tuple(tensor.shape)
        if is_parameter:
            return tuple((d,) if size > 1 else () for d, size in enumerate(shape))
        if tensor.numel() == 1 and not isinstance(tensor, nn.Parameter):
            return ((),) * len(shape)
        if tensor.numel() == self.parameter[0] == max(shape):
            return tuple((0,) if size > 1 else () for size in shape)
        raise _NotByRows

    def shape_of(self, node: fx.Node) -> tuple[int, ...]:
        if "shape" in node.meta:
            return tuple(node.meta["shape"])
        if op_name(node) in ("var_mean", "std_mean"):  # two results of one shape
            return tuple(next(user.meta["shape"] for user in node.users))
        raise _NotByRows

    def operation(self, node: fx.Node) -> Axes:
        name, shape = op_name(node), self.shapes[node]
        operands = [source for source in node.all_input_nodes if source in self.axes]
        source = operands[0] if operands else node
        if writes_in_place(node) or source is node:
            raise _NotByRows
        if not name or name in KEPT:
            return self.axes[source]
        if name.startswith("expand"):
            missing = len(shape) - len(self.axes[source])
            return ((),) * missing + self.axes[source]
        if name in _MOVED:
            return self._reshaped(source, shape)
        if name == "batch_norm":
            return self._batch_norm(bind(node))
        if name == "layer_norm":
            return self._layer_norm(bind(node))
        if name in REDUCTIONS:
            return self._reduction(bind(node), source)
        if is_pointwise(name):
            return self._pointwise(operands, shape)
        raise _NotByRows

    def _reshaped(self, source: fx.Node, shape: tuple[int, ...]) -> Axes:
        """The same axes in the same order, cut into dimensions in another way."""
        self._check_full(source, range(len(self.shapes[source])))
        waiting = [axis for axes in self.axes[source] for axis in axes]
        found: list[tuple[int, ...]] = []
        for size in shape:
            axes: list[int] = []
            while math.prod(self.parameter[axis] for axis in axes) < size and waiting:
                axes.append(waiting.pop(0))
            if math.prod(self.parameter[axis] for axis in axes) != size:
                raise _NotByRows
            found.append(tuple(axes))
        return tuple(found)

    def _check_full(self, source: fx.Node, dims: Iterable[int]) -> None:
        """A dimension along which a value merely repeats has none of the axes."""
        if any(self.shapes[source][d] > 1 and not self.axes[source][d] for d in dims):
            raise _NotByRows

    def _pointwise(self, operands: list[fx.Node], shape: tuple[int, ...]) -> Axes:
        found: list[tuple[int, ...]] = [()] * len(shape)
        for operand in operands:
            axes = self.axes[operand]
            for d, own in enumerate(axes, start=len(shape) - len(axes)):
                if own and found[d] and own != found[d]:
                    raise _NotByRows
                found[d] = own or found[d]
        return tuple(found)

    def _reduction(self, arguments: Mapping[str, Any], source: fx.Node) -> Axes:
        axes = self.axes[source]
        dims = reduced_dims(arguments.get("dim"), len(axes))
        if arguments.get("ord", arguments.get("p", 2)) != 2 or arguments.get("dtype") is not None:
            raise _NotByRows
        self._check_reduced(source, dims)
        if arguments.get("keepdim", False):
            return tuple(() if d in dims else own for d, own in enumerate(axes))
        return tuple(own for d, own in enumerate(axes) if d not in dims)

    def _check_reduced(self, source: fx.Node, dims: Collection[int]) -> None:
        self._check_full(source, dims)
        if any(0 in self.axes[source][d] for d in dims):
            raise _NotByRows

    def _batch_norm(self, a: Mapping[str, Any]) -> Axes:
        axes = self.axes[a["input"]]
        self._check_reduced(a["input"], [d for d in range(len(axes)) if d != 1])
        parameters = [self.axes[a[key]] for key in ("weight", "bias") if a[key] is not None]
        if (
            a["running_mean"] is not None
            or not a["training"]
            or any(own != ((0,),) for own in (axes[1:2], *parameters))
        ):
            raise _NotByRows
        return axes

    def _layer_norm(self, a: Mapping[str, Any]) -> Axes:
        axes = self.axes[a["input"]]
        self._check_reduced(a["input"], range(len(axes) - len(a["normalized_shape"]), len(axes)))
        if a["weight"] is not None or a["bias"] is not None:
            raise _NotByRows
        return axes


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
        normed = _weight_norm(operand, names)
        if normed is not None:
            weight, norm = normed
        elif geometry.out_dim == 0 and (rows := _row_program(operand, root)) is not None:
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

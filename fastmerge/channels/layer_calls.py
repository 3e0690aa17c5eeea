"""Convolutions and linear layers in a traced graph: ATen operations whose weight is a parameter of the network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from fastmerge.channels.aten import LAYERS, bind, op_name
from fastmerge.channels.tracing import tensor_at


@dataclass(frozen=True)
class Geometry:
    """What a convolution or linear layer does with its weight, apart from the weight.

    Attributes:
        kind: "linear", "conv" or "conv_transpose".
        spatial_dims: 1, 2 or 3; 0 for linear.
        options: stride, padding, dilation and, where transposed, output_padding.
    """

    kind: str
    spatial_dims: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def out_dim(self) -> int:
        """The weight's dimension of output channels."""
        return 1 if self.kind == "conv_transpose" else 0

    @property
    def in_dim(self) -> int:
        """The weight's dimension of input channels."""
        return 1 - self.out_dim

    @property
    def channel_dim(self) -> int:
        """The activation's dimension of channels."""
        return -1 if self.kind == "linear" else 1


@dataclass(frozen=True)
class LayerCall:
    """One call of a convolution or linear layer.

    Attributes:
        name: the layer's path in the network, for people.
        weight: name of its weight parameter.
        bias: name of its bias parameter, or None.
        geometry: how the weight is applied.
        groups: 1 if every output channel reads every input channel.
        input: the node it reads.
    """

    name: str
    weight: str
    bias: str | None
    geometry: Geometry
    groups: int
    input: fx.Node


def layer_call(node: fx.Node, root: nn.Module, parameter_names: dict[int, str]) -> LayerCall | None:
    """The layer that a node calls, or None if it is something else.

    Args:
        node: a node of a traced graph.
        root: the network the graph's targets refer to.
        parameter_names: the one name of each parameter by ``id``; a tied parameter's second name maps to the first.
    """
    name = op_name(node)
    if name not in LAYERS:
        return None
    arguments = bind(node)
    source, groups = arguments.pop("input"), arguments.pop("groups", 1)
    weight, bias = (_parameter_of(arguments.pop(key), root, parameter_names) for key in ("weight", "bias"))
    computed_bias = bias is None and bind(node)["bias"] is not None
    if not isinstance(source, fx.Node) or weight is None or computed_bias:
        return None
    kind, spatial_dims = LAYERS[name]
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    return LayerCall(_path(root, weight, bias), weight, bias, Geometry(kind, spatial_dims, options), groups, source)


def _parameter_of(argument: Any, root: nn.Module, parameter_names: dict[int, str]) -> str | None:
    if isinstance(argument, fx.Node) and argument.op == "get_attr":
        return parameter_names.get(id(tensor_at(root, str(argument.target))))
    return None


def _path(root: nn.Module, weight: str, bias: str | None) -> str:
    """A layer's path: of the module that holds its weight and bias and no other tensor, or else the weight's name."""
    owner, _, attribute = weight.rpartition(".")
    own = {f"{owner}.{name}" for name, _ in root.get_submodule(owner).named_parameters()}
    return owner if owner and attribute == "weight" and own == {weight, bias} - {None} else weight


def parameter_names(root: nn.Module) -> dict[int, str]:
    """The one name of each parameter by ``id``."""
    return {id(parameter): name for name, parameter in root.named_parameters()}

"""Convolutions and linear layers in a traced graph, as modules or as functional calls on the network's own parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

_CONVOLUTIONS: dict[type[nn.Module], tuple[str, int]] = {
    nn.Conv1d: ("conv", 1),
    nn.Conv2d: ("conv", 2),
    nn.Conv3d: ("conv", 3),
    nn.ConvTranspose1d: ("conv_transpose", 1),
    nn.ConvTranspose2d: ("conv_transpose", 2),
    nn.ConvTranspose3d: ("conv_transpose", 3),
}
_CONV_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSE_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_FUNCTIONS: dict[Any, tuple[str, int, tuple[str, ...]]] = {
    F.linear: ("linear", 0, ("input", "weight", "bias")),
    F.conv1d: ("conv", 1, _CONV_ARGUMENTS),
    F.conv2d: ("conv", 2, _CONV_ARGUMENTS),
    F.conv3d: ("conv", 3, _CONV_ARGUMENTS),
    F.conv_transpose1d: ("conv_transpose", 1, _TRANSPOSE_ARGUMENTS),
    F.conv_transpose2d: ("conv_transpose", 2, _TRANSPOSE_ARGUMENTS),
    F.conv_transpose3d: ("conv_transpose", 3, _TRANSPOSE_ARGUMENTS),
}


@dataclass(frozen=True)
class Geometry:
    """What a convolution or linear layer does with its weight, apart from the weight.

    Attributes:
        kind: "linear", "conv" or "conv_transpose".
        spatial_dims: 1, 2 or 3; 0 for linear.
        options: stride, padding, dilation and, where transposed, output_padding.
        padding_mode: as in ``nn.Conv2d``.
        kernel_size: of a transposed convolution that may be called with ``output_size``.
    """

    kind: str
    spatial_dims: int
    options: dict[str, Any] = field(default_factory=dict)
    padding_mode: str = "zeros"
    kernel_size: tuple[int, ...] = ()
    pad: tuple[int, ...] = ()

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
        output_size: of a transposed convolution, as given in the call.
    """

    name: str
    weight: str
    bias: str | None
    geometry: Geometry
    groups: int
    input: fx.Node
    output_size: Any = None


def layer_call(node: fx.Node, root: nn.Module, parameter_names: dict[int, str]) -> LayerCall | None:
    """The layer that a node calls, or None if it is something else.

    Args:
        node: a node of a traced graph.
        root: the network the graph's targets refer to.
        parameter_names: the one name of each parameter by ``id``; a tied parameter's second name maps to the first.
    """
    if node.op == "call_module":
        return _module_call(node, root.get_submodule(str(node.target)), parameter_names)
    if node.op == "call_function" and node.target in _FUNCTIONS:
        return _function_call(node, root, parameter_names)
    return None


def _module_call(node: fx.Node, module: nn.Module, parameter_names: dict[int, str]) -> LayerCall | None:
    source = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("x"))
    if not isinstance(source, fx.Node):
        return None
    if isinstance(module, nn.Linear):
        geometry, groups, output_size = Geometry("linear", 0), 1, None
    elif type(module) in _CONVOLUTIONS:
        assert isinstance(module, nn.modules.conv._ConvNd)
        kind, spatial_dims = _CONVOLUTIONS[type(module)]
        options: dict[str, Any] = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
        output_size = None
        if kind == "conv_transpose":
            options["output_padding"] = module.output_padding
            output_size = node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size")
        geometry = Geometry(
            kind,
            spatial_dims,
            options,
            module.padding_mode,
            tuple(module.kernel_size),
            tuple(getattr(module, "_reversed_padding_repeated_twice", ())),
        )
        groups = module.groups
    else:
        return None
    bias = None if module.bias is None else parameter_names[id(module.bias)]
    return LayerCall(str(node.target), parameter_names[id(module.weight)], bias, geometry, groups, source, output_size)


def _function_call(node: fx.Node, root: nn.Module, parameter_names: dict[int, str]) -> LayerCall | None:
    kind, spatial_dims, names = _FUNCTIONS[node.target]
    arguments: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    source, weight, bias = arguments.get("input"), arguments.get("weight"), arguments.get("bias")
    groups: Any = arguments.get("groups", 1)
    weight_name = _parameter_of(weight, root, parameter_names)
    bias_name = _parameter_of(bias, root, parameter_names)
    options = {k: v for k, v in arguments.items() if k not in ("input", "weight", "bias", "groups")}
    if (
        not isinstance(source, fx.Node)
        or weight_name is None
        or (bias is not None and bias_name is None)
        or any(isinstance(v, fx.Node) for v in (groups, *options.values()))
    ):
        return None
    return LayerCall(weight_name, weight_name, bias_name, Geometry(kind, spatial_dims, options), groups, source)


def _parameter_of(argument: Any, root: nn.Module, parameter_names: dict[int, str]) -> str | None:
    if isinstance(argument, fx.Node) and argument.op == "get_attr":
        owner, _, attribute = str(argument.target).rpartition(".")
        return parameter_names.get(id(getattr(root.get_submodule(owner), attribute)))
    return None


def parameter_names(root: nn.Module) -> dict[int, str]:
    """The one name of each parameter by ``id``."""
    return {id(parameter): name for name, parameter in root.named_parameters()}

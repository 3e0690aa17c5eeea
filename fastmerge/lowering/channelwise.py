"""Which operations treat each channel alone, so that they may run once on a joined tensor instead of once per stream.

A list of what is known to be so; whatever is not on it runs per stream.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastmerge.wide.streams import concatenate_joined

Shape = tuple[int, ...]

ACTIVATION_MODULES: set[Any] = {
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign),
    *(nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink),
    *(nn.LogSigmoid, nn.Threshold),
}
ACTIVATION_FUNCTIONS: set[Any] = {
    *(F.relu, F.relu_, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.softplus, F.softsign),
    *(F.sigmoid, F.tanh, F.hardtanh, F.hardsigmoid, F.hardswish, F.hardshrink, F.softshrink, F.tanhshrink),
    *(F.logsigmoid, F.threshold, torch.relu, torch.relu_, torch.sigmoid, torch.tanh),
}
_POINTWISE_MODULES = {*ACTIVATION_MODULES, nn.Identity, nn.Dropout, nn.AlphaDropout}
_SPATIAL_MODULES: dict[Any, int] = {
    **dict.fromkeys((nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d, nn.Dropout1d), 1),
    **dict.fromkeys((nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout2d), 2),
    **dict.fromkeys((nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d, nn.Dropout3d), 3),
    **dict.fromkeys((nn.LPPool2d, nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d), 2),
    **dict.fromkeys((nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), 2),
}
_POINTWISE_FUNCTIONS: set[Any] = {
    *(*ACTIVATION_FUNCTIONS, F.dropout, F.alpha_dropout, torch.abs, torch.exp, torch.sqrt, torch.square, torch.neg),
    *(torch.add, torch.sub, torch.mul, torch.div, torch.maximum, torch.minimum, torch.clamp, torch.pow),
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow),
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv),
}
_POINTWISE_METHODS = {
    *("relu", "relu_", "sigmoid", "tanh", "abs", "exp", "sqrt", "square", "neg", "add", "add_", "sub", "mul", "mul_"),
    *("div", "clamp", "clamp_", "pow", "contiguous", "clone", "float", "half", "bfloat16", "double"),
}
_SPATIAL_FUNCTIONS: dict[Any, int] = {
    **dict.fromkeys((F.max_pool1d, F.avg_pool1d, F.adaptive_avg_pool1d, F.adaptive_max_pool1d, F.dropout1d), 1),
    **dict.fromkeys((F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.dropout2d), 2),
    **dict.fromkeys((F.max_pool3d, F.avg_pool3d, F.adaptive_avg_pool3d, F.adaptive_max_pool3d, F.dropout3d), 3),
}
_REDUCTIONS = {torch.mean, torch.sum, torch.amax, "mean", "sum", "amax"}
_CONCATENATIONS = {torch.cat, torch.concat, torch.concatenate}
_NORM_MODULES = (nn.modules.batchnorm._NormBase, nn.GroupNorm)
_NORM_FUNCTIONS = (F.batch_norm, F.group_norm, F.instance_norm, torch.batch_norm, torch.group_norm, torch.instance_norm)
_MAY_ALIAS = {"contiguous", "float", "half", "bfloat16", "double", F.dropout, F.alpha_dropout, *_SPATIAL_FUNCTIONS}
_MAY_ALIAS_MODULES = {nn.Identity, nn.Dropout, nn.AlphaDropout, *_SPATIAL_MODULES}


@dataclass(frozen=True)
class Placement:
    """Where the channels lie in a joined tensor.

    Attributes:
        dim: the dimension, from 0.
        channels: of one teacher.
        rank: number of dimensions.
    """

    dim: int
    channels: int
    rank: int


@dataclass(frozen=True)
class JoinedCall:
    """An operation to run on joined tensors.

    Attributes:
        placement: of the result.
        may_alias: whether the result may share memory with what it was computed from.
        call: what to emit instead of the operation itself: a function and its further arguments; None: the operation.
    """

    placement: Placement
    may_alias: bool = False
    call: tuple[Callable[..., Any], tuple[Any, ...]] | None = None


def joined_call(
    node: fx.Node, root: nn.Module, operands: Mapping[fx.Node, Placement], shape: Shape | None, num_teachers: int
) -> JoinedCall | None:
    """How an operation runs on joined tensors; None if it must run per stream.

    Args:
        node: of a teacher's graph; not a layer.
        root: the network its target refers to.
        operands: those of its operands that are joined.
        shape: of one teacher's result, if it is a tensor.
        num_teachers: T.
    """
    flat = _flattening_view(node, operands, shape)
    if flat is not None:
        return flat
    if shape is None or not operands or any(source not in operands for source in node.all_input_nodes):
        return None
    target: Any = type(root.get_submodule(str(node.target))) if node.op == "call_module" else node.target
    placements = list(operands.values())
    first = placements[0]
    result = replace(first, rank=len(shape))
    may_alias = target in _MAY_ALIAS or target in _MAY_ALIAS_MODULES
    if target in _POINTWISE_MODULES or target in _POINTWISE_FUNCTIONS or target in _POINTWISE_METHODS:
        return JoinedCall(result, may_alias) if set(placements) == {first} and len(shape) == first.rank else None
    spatial = _SPATIAL_MODULES.get(target, _SPATIAL_FUNCTIONS.get(target))
    if spatial is not None:
        fits = len(placements) == 1 and first.dim == 1 and first.rank == spatial + 2 == len(shape)
        return JoinedCall(result, may_alias) if fits else None
    if target in (F.interpolate, nn.Upsample):
        return JoinedCall(result) if len(placements) == 1 and first.dim == 1 and first.rank > 2 else None
    if target is F.pad:
        padded = len(_argument(node, 1, "pad", ())) // 2
        return JoinedCall(result) if first.dim < first.rank - padded else None
    if target in (torch.flatten, "flatten", nn.Flatten):
        return _flatten(node, root, first, shape)
    if target in _REDUCTIONS:
        return _reduction(node, first, shape)
    if target in _CONCATENATIONS:
        return _concatenation(node, placements, shape, num_teachers)
    return None


def is_norm(node: fx.Node, root: nn.Module) -> bool:
    """Whether an operation is a batch, group or instance normalisation."""
    if node.op == "call_module":
        return isinstance(root.get_submodule(str(node.target)), _NORM_MODULES)
    return node.op == "call_function" and node.target in _NORM_FUNCTIONS


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _flatten(node: fx.Node, root: nn.Module, place: Placement, shape: Shape) -> JoinedCall | None:
    """All dimensions from the channels' on become one, or some after it."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        assert isinstance(module, nn.Flatten)
        start, end = module.start_dim, module.end_dim
    else:
        start, end = _argument(node, 1, "start_dim", 0), _argument(node, 2, "end_dim", -1)
    start, end = start % place.rank, end % place.rank
    if start < place.dim <= end or end < place.dim:
        return None
    return JoinedCall(Placement(place.dim, shape[place.dim], len(shape)), may_alias=True)


def _flattening_view(node: fx.Node, operands: Mapping[fx.Node, Placement], shape: Shape | None) -> JoinedCall | None:
    """``x.view(x.size(0), -1)`` and the like, which is ``x.flatten(1)``."""
    if node.op != "call_method" or node.target not in ("view", "reshape") or shape is None or len(shape) != 2:
        return None
    source, *sizes = node.args
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = list(sizes[0])
    place = operands.get(source) if isinstance(source, fx.Node) else None
    if place is None or place.dim != 1 or len(sizes) != 2 or not _is_batch_size(sizes[0]) or sizes[1] != -1:
        return None
    return JoinedCall(Placement(1, shape[1], 2), may_alias=True, call=(torch.flatten, (1,)))


def _is_batch_size(value: Any) -> bool:
    if not isinstance(value, fx.Node):
        return False
    if value.target == "size":
        return value.args[1:] == (0,)
    if value.target is operator.getitem and value.args[1] == 0 and isinstance(value.args[0], fx.Node):
        shape = value.args[0]
        return (shape.target is getattr and shape.args[1] == "shape") or (
            shape.target == "size" and len(shape.args) == 1
        )
    return False


def _reduction(node: fx.Node, place: Placement, shape: Shape) -> JoinedCall | None:
    dims = _argument(node, 1, "dim", None)
    dims = [dims] if isinstance(dims, int) else dims
    if not isinstance(dims, (tuple, list)) or not dims:
        return None
    reduced = {d % place.rank for d in dims}
    if place.dim in reduced:
        return None
    gone = 0 if len(shape) == place.rank else sum(d < place.dim for d in reduced)
    return JoinedCall(Placement(place.dim - gone, place.channels, len(shape)))


def _concatenation(node: fx.Node, placements: list[Placement], shape: Shape, num_teachers: int) -> JoinedCall | None:
    tensors, dim = node.args[0] if node.args else node.kwargs.get("tensors"), _argument(node, 1, "dim", 0)
    first = placements[0]
    if not isinstance(tensors, (tuple, list)) or any((p.dim, p.rank) != (first.dim, first.rank) for p in placements):
        return None
    if dim % first.rank != first.dim:
        return JoinedCall(first) if set(placements) == {first} else None
    call = (concatenate_joined, (num_teachers, first.dim))
    return JoinedCall(Placement(first.dim, shape[first.dim], first.rank), call=call)

"""What each ATen operation does to channels: the one table that grouping, lowering and fusion read.

Names are those of the operation's packet, without the underscore of an operation in place: ``aten.add_.Tensor`` is "add".
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

LAYERS: dict[str, tuple[str, int]] = {
    "linear": ("linear", 0),
    **{f"conv{d}d": ("conv", d) for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": ("conv_transpose", d) for d in (1, 2, 3)},
}
# linear layers by a weight of (in, out), and how many arguments they then have
PRODUCTS = {"matmul": 2, "mm": 2, "addmm": 3}
LAYER_NORMS = {"layer_norm", "rms_norm"}
NORMS = {"batch_norm", "group_norm", "instance_norm"}
SAME = {
    *("clone", "contiguous", "_to_copy", "alias", "detach", "lift_fresh", "lift_fresh_copy", "to", "zero", "type_as"),
    *("dropout", "native_dropout", "_fused_dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"),
}
RESHAPES = {"view", "_unsafe_view", "reshape", "_reshape_alias", "view_as", "reshape_as"}
MOVEMENTS = {
    *("permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "repeat", "tile", "flip", "roll", "unfold"),
    *("slice", "select", "narrow", "split", "split_with_sizes", "unbind", "cat", "stack"),
    *("index", "index_select", "gather"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle"),
}
# values stay what they are, in another place
KEEPING = {*SAME, *RESHAPES, "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "cat", "stack"}
POOLS = (
    "max_pool",
    "fractional_max_pool",
    "avg_pool",
    "adaptive_",
    "_adaptive_",
    "upsample_",
    "_upsample_",
    "reflection_pad",
    "replication_pad",
)
REDUCTIONS = {
    *("mean", "sum", "amax", "amin", "max", "min", "median", "prod", "var", "std", "var_mean", "std_mean"),
    *("linalg_vector_norm", "norm", "logsumexp", "nanmean", "nansum"),
}
NEW = {
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
    *("new_zeros", "new_empty", "new_ones", "new_full"),
}
ALONG = {"_softmax", "_log_softmax", "softmax", "log_softmax", "cumsum", "cumprod", "sort", "_safe_softmax"}
EMBEDDINGS = {"embedding", "embedding_bag"}
# in place or not, elements of the last operand are added to those of the first that an index along one dimension names
SCATTERS = {"index_add", "scatter_add"}
LINEAR = {
    *SCATTERS,
    *SAME,
    *RESHAPES,
    *MOVEMENTS,
    "mean",
    "sum",
    "add",
    "sub",
    "neg",
    "constant_pad_nd",
    "pad",
    "flatten",
    "chunk",
}
LINEAR_PREFIXES = ("avg_pool", "adaptive_avg_pool", "_adaptive_avg_pool", "upsample_", "_upsample_")

ACTIVATIONS = {
    *("relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "softplus", "softsign", "sigmoid"),
    *("tanh", "hardtanh", "hardsigmoid", "hardswish", "hardshrink", "softshrink", "tanhshrink", "log_sigmoid"),
    *("log_sigmoid_forward", "threshold", "clamp", "clamp_min", "clamp_max", "rrelu", "rrelu_with_noise"),
}
# pointwise operations that PyTorch does not tag as such
_UNTAGGED = {*ACTIVATIONS, "prelu", "_prelu_kernel", "where", "lerp", "rsub", "masked_fill"}
# spatial operations on (N, C, ...) by name and number of spatial dimensions, which end in "1d", "2d" or "3d"
SPATIAL = (
    *("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool"),
    *("reflection_pad", "replication_pad"),
)
SPATIAL_DROPOUTS = {"feature_dropout", "feature_alpha_dropout"}


def op_name(node: fx.Node) -> str:
    """The name of the ATen operation that a node calls; of anything else (a placeholder, a Python operator) ""."""
    return packet_name(node.target) if isinstance(node.target, torch._ops.OpOverload) else ""


def packet_name(operation: Any) -> str:
    """The name of an overload of an ATen operation, without the underscore of one in place."""
    name = str(operation.overloadpacket.__name__)
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def bind(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by the names in the operation's schema, defaults included."""
    return bound(node.target, node.args, node.kwargs)


def bound(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of an operation, likewise."""
    return {
        a.name: args[i] if i < len(args) else kwargs.get(a.name, a.default_value)
        for i, a in enumerate(operation._schema.arguments)
    }


def writes_in_place(node: fx.Node) -> bool:
    """Whether an operation changes one of its operands."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def has_effects(node: fx.Node) -> bool:
    """Whether an operation whose result nobody reads is needed all the same: it changes a tensor or draws numbers."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return writes_in_place(node) or torch.Tag.nondeterministic_seeded in node.target.tags


def may_alias(node: fx.Node) -> bool:
    """Whether an operation's result may share memory with what it was computed from."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    # composite operations don't say: reshape, flatten and contiguous are views where they can be
    returns = node.target._schema.returns
    return any(r.alias_info is not None for r in returns) or op_name(node) in {*SAME, *RESHAPES, "flatten", "chunk"}


def is_size(node: fx.Node) -> bool:
    """Whether a node is a number: the length of a dimension, or what Python computes from such."""
    name = op_name(node)
    python = node.op == "call_function" and not isinstance(node.target, torch._ops.OperatorBase)
    return name.startswith("sym_") or (python and node.target is not operator.getitem)


def reduced_dims(dim: int | Sequence[int] | None, rank: int) -> list[int]:
    """The dimensions that a reduction of a tensor of so many is along: all of them where none is named."""
    dims = [dim] if isinstance(dim, int) else dim or range(rank)
    return [d % rank for d in dims]


def correction_of(arguments: Mapping[str, Any]) -> float:
    """What a variance's or deviation's divisor is less than the number of elements, from its bound arguments."""
    correction = arguments.get("correction", int(arguments.get("unbiased", True)))
    return 1 if correction is None else correction


@functools.cache
def is_pointwise(name: str) -> bool:
    """Whether an operation treats every element alone: by PyTorch's tags, which not every overload carries, or known to."""
    packet = getattr(torch.ops.aten, name, None)
    return name in _UNTAGGED or any(
        torch.Tag.pointwise in getattr(packet, o).tags for o in (packet.overloads() if packet else ())
    )

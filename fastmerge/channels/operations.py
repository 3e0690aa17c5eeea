"""ATen operations by what they do to channels. Names are without the underscore of an operation in place."""

from __future__ import annotations

import functools

import torch

SAME = {
    *("clone", "contiguous", "_to_copy", "alias", "detach", "lift_fresh", "lift_fresh_copy", "to", "zero"),
    *("dropout", "native_dropout", "_fused_dropout"),
}
RESHAPES = {"view", "_unsafe_view", "reshape", "_reshape_alias"}
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
# pointwise operations that PyTorch does not tag as such
POINTWISE = {
    *("hardswish", "leaky_relu", "prelu", "_prelu_kernel", "rrelu", "rrelu_with_noise", "log_sigmoid_forward"),
    *("hardshrink", "softshrink", "celu", "selu", "where", "lerp"),
}
NEW = {
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
    *("new_zeros", "new_empty", "new_ones", "new_full"),
}
ALONG = {"_softmax", "_log_softmax", "softmax", "log_softmax", "cumsum", "cumprod", "sort", "_safe_softmax"}
LINEAR = {*SAME, *RESHAPES, *MOVEMENTS, "mean", "sum", "add", "sub", "neg", "constant_pad_nd"}
LINEAR_PREFIXES = ("avg_pool", "adaptive_avg_pool", "_adaptive_avg_pool", "upsample_", "_upsample_")


@functools.cache
def is_pointwise(name: str) -> bool:
    """Whether an operation treats every element alone: by PyTorch's tags, which not every overload carries, or known to."""
    packet = getattr(torch.ops.aten, name, None)
    return name in POINTWISE or any(
        torch.Tag.pointwise in getattr(packet, o).tags for o in (packet.overloads() if packet else ())
    )

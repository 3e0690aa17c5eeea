"""A convolution or linear layer applied as its geometry says, to one tensor or to each teacher's own.

Two-dimensional convolutions of several teachers, streams or groups of one tensor, run on a CUDA device by whatever was
measured to be the fastest there for each pass (``fastmerge.kernels.block_conv``); all others are PyTorch's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmerge.channels.layer_calls import Geometry
from fastmerge.kernels.block_conv import block_diagonal_conv2d, grouped_conv2d
from fastmerge.wide.weights import Weight, parts_of, whole_of

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}

# torch.compile can't ask what was measured. Of many groups, which the kernels are not made for, it gets PyTorch's own.
_MOST_GROUPS_COMPILED = 4


def convolve(geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
    """Applies a layer.

    Args:
        geometry: kind, stride, padding and so on.
        x: what it reads.
        weight: its weight.
        bias: its bias, or None.
        groups: of a convolution.
    """
    options = geometry.options
    few = groups <= _MOST_GROUPS_COMPILED or not torch.compiler.is_compiling()
    if groups > 1 and few and _runs_as_measured(geometry, x, weight):
        return grouped_conv2d(x, weight, bias, groups=groups, **options)
    if geometry.spatial_dims == 0:
        return F.linear(x, weight if geometry.kind == "linear" else weight.t(), bias)
    if geometry.kind == "conv":
        return _CONV[geometry.spatial_dims](x, weight, bias, groups=groups, **options)
    return _CONV_TRANSPOSE[geometry.spatial_dims](x, weight, bias, groups=groups, **options)


def convolve_streams(
    geometry: Geometry,
    streams: Sequence[Tensor],
    weight: Weight,
    bias: Weight | None,
    groups: int = 1,
) -> tuple[Tensor, ...]:
    """Applies a layer to T tensors, each with its own weights.

    Args:
        geometry: kind, stride, padding and so on.
        streams: T tensors of one shape.
        weight: the T weights, one under the other along dimension 0, and perhaps each; see ``weights.hand_out_weights``.
        bias: the T biases likewise, or None.
        groups: of each convolution.
    """
    weights, biases = parts_of(weight, len(streams)), None if bias is None else parts_of(bias, len(streams))
    if groups == 1 and _runs_as_measured(geometry, streams[0], weight[0]):
        parts = weights, biases
        return block_diagonal_conv2d(streams, weight[0], whole_of(bias), parts=parts, **geometry.options)
    each: Sequence[Tensor | None] = [None] * len(streams) if biases is None else biases
    return tuple(
        convolve(geometry, x, own_weight, own_bias, groups)
        for x, own_weight, own_bias in zip(streams, weights, each, strict=True)
    )


def _runs_as_measured(geometry: Geometry, x: Tensor, weight: Tensor) -> bool:
    """Whether a layer runs by whatever was measured to be the fastest: on a CUDA device, where a kernel could take it."""
    return x.is_cuda and x.dim() == 4 and _is_plain_conv2d(geometry, weight)


def _is_plain_conv2d(geometry: Geometry, weight: Tensor) -> bool:
    """Whether a layer is a two-dimensional convolution that pads both sides alike, with zeros."""
    if geometry.kind != "conv" or geometry.spatial_dims != 2:
        return False
    return geometry.options.get("padding") != "same" or all(size % 2 == 1 for size in weight.shape[2:])

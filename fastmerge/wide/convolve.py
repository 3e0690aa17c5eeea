"""A convolution or linear layer applied as its geometry says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastmerge.channels.layer_calls import Geometry

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def convolve(
    geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: Any = None, groups: int = 1
) -> Tensor:
    """Applies a layer.

    Args:
        geometry: kind, stride, padding and so on.
        x: what it reads.
        weight: its weight.
        bias: its bias, or None.
        output_size: of a transposed convolution called with it.
        groups: of a convolution.
    """
    options = dict(geometry.options)
    if geometry.kind == "linear":
        return F.linear(x, weight, bias)
    if geometry.kind == "conv":
        if geometry.padding_mode != "zeros":
            x = F.pad(x, geometry.pad, mode=geometry.padding_mode)
            options["padding"] = 0
        return _CONV[geometry.spatial_dims](x, weight, bias, groups=groups, **options)
    if output_size is not None:
        options["output_padding"] = _output_padding(geometry, x, output_size)
    return _CONV_TRANSPOSE[geometry.spatial_dims](x, weight, bias, groups=groups, **options)


def _output_padding(geometry: Geometry, x: Tensor, output_size: Sequence[int]) -> list[int]:
    options, n = geometry.options, geometry.spatial_dims
    smallest = [
        (x.shape[2 + d] - 1) * options["stride"][d]
        - 2 * options["padding"][d]
        + options["dilation"][d] * (geometry.kernel_size[d] - 1)
        + 1
        for d in range(n)
    ]
    return [int(size) - low for size, low in zip(list(output_size)[-n:], smallest, strict=True)]

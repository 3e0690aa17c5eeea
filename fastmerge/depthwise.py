"""Depthwise convolutions in float64, which PyTorch runs on a CPU channel by channel."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def is_slow(func: Any, args: Sequence[Any]) -> bool:
    """Whether an operation is a convolution that :func:`depthwise` runs faster than PyTorch."""
    if func is not torch.ops.aten.convolution.default:
        return False
    x, weight, _, stride, _, _, transposed, _, groups = args
    return (
        x.dtype == torch.float64
        and x.device.type == "cpu"
        and x.dim() == 4
        and len(stride) == 2
        and not transposed
        and groups == x.shape[1] == len(weight)
        and weight[0].numel() < groups
    )


def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """A depthwise convolution of x, (N, C, H, W), entry by entry of the kernel rather than channel by channel."""
    (rows, columns), weight_HWC = padding, weight[:, 0].permute(1, 2, 0).contiguous()
    x_NHWC = F.pad(x.permute(0, 2, 3, 1), (0, 0, columns, columns, rows, rows)).contiguous()
    spans = [
        range(0, size - d * (k - 1), s)
        for size, k, s, d in zip(x_NHWC.shape[1:3], weight.shape[2:], stride, dilation, strict=True)
    ]
    out = x_NHWC.new_zeros(len(x), *(len(span) for span in spans), len(weight))
    for i, j in product(*(range(k) for k in weight.shape[2:])):
        h, w = (
            slice(n * d, n * d + span[-1] + 1, s) for n, d, s, span in zip((i, j), dilation, stride, spans, strict=True)
        )
        out.addcmul_(x_NHWC[:, h, w], weight_HWC[i, j])
    return (out if bias is None else out.add_(bias)).permute(0, 3, 1, 2).contiguous()

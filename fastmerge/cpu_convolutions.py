"""Convolutions that PyTorch runs slowly on a CPU, run in another way.

Depthwise ones in float64 it runs channel by channel. Of a weight that is much larger than what it is applied to, oneDNN
reorders all of it at each call.

Under ``vmap`` a convolution of R networks becomes one with R groups. oneDNN runs that at a fraction of the speed of R
convolutions in turn, unless they are so small that starting them is what takes the time. Measured with LeNet's layers, batch
32, forward and backward of ten networks: 28×28 35 ms grouped and 18 ms in turn, 8×8 0.7 and 1.6 ms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx

_aten = torch.ops.aten
_LARGE = 32  # times as many elements as its input a large weight has
_LEAST_PRODUCTS = 1_000_000  # multiplications per network from which on splitting pays


def faster(func: Any, args: Sequence[Any]) -> Callable[..., Tensor] | None:
    """What to call, with the first six arguments, in place of an operation of ATen's; None: the operation itself."""
    if func is not _aten.convolution.default:
        return None
    x, weight, _, stride, _, _, transposed, _, groups = args
    if x.device.type != "cpu" or x.dtype != weight.dtype or x.dim() != 4 or len(stride) != 2 or transposed:
        return None
    if x.dtype == torch.float64 and groups == x.shape[1] == len(weight) and weight[0].numel() < groups:
        return depthwise
    return by_matrix if x.dtype == torch.float32 and groups == 1 and weight.numel() > _LARGE * x.numel() else None


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
    spans = _spans(x_NHWC.shape[1:3], weight, stride, dilation)
    out = x_NHWC.new_zeros(len(x), *(len(span) for span in spans), len(weight))
    for i, j in product(*(range(k) for k in weight.shape[2:])):
        h, w = (
            slice(n * d, n * d + span[-1] + 1, s) for n, d, s, span in zip((i, j), dilation, stride, spans, strict=True)
        )
        out.addcmul_(x_NHWC[:, h, w], weight_HWC[i, j])
    return (out if bias is None else out.add_(bias)).permute(0, 3, 1, 2).contiguous()


def by_matrix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """A convolution of x, (N, C, H, W), as a product of the weight as it lies and of all patches."""
    padded = [size + 2 * p for size, p in zip(x.shape[2:], padding, strict=True)]
    sizes = [len(span) for span in _spans(padded, weight, stride, dilation)]
    patches = F.unfold(x, weight.shape[2:], tuple(dilation), tuple(padding), tuple(stride)).transpose(0, 1).flatten(1)
    out = (weight.flatten(1) @ patches).view(len(weight), len(x), *sizes).transpose(0, 1).contiguous()
    return out if bias is None else out.add_(bias.view(-1, 1, 1))


def _spans(padded: Sequence[int], weight: Tensor, stride: Sequence[int], dilation: Sequence[int]) -> list[range]:
    """Where kernels begin, along each dimension of what is convolved."""
    return [
        range(0, size - d * (k - 1), s)
        for size, k, s, d in zip(padded, weight.shape[2:], stride, dilation, strict=True)
    ]


def split_convolutions(graph: fx.Graph, replicates: int) -> None:
    """Replaces the large grouped convolutions of a graph, in place.

    Args:
        graph: of ATen operations, with example values in ``node.meta["val"]``.
        replicates: how many networks are stacked.
    """
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        args = cast(Any, node.args)
        if node.target is _aten.convolution.default:
            if _pays(args[8], node.meta["val"], args[1].meta["val"], replicates):
                node.target, node.args = convolution, (replicates, *args)
        elif node.target is _aten.convolution_backward.default and _pays(
            args[9], args[0].meta["val"], args[2].meta["val"], replicates
        ):
            node.target, node.args = convolution_backward, (replicates, *args)


def _pays(groups: int, output: Tensor, weight: Tensor, replicates: int) -> bool:
    if groups % replicates:
        return False
    products = output.numel() // replicates * math.prod(weight.shape[1:])
    return products >= _LEAST_PRODUCTS


def convolution(replicates: int, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    """``aten.convolution`` with its groups dealt out to as many calls as there are replicates."""
    *geometry, groups = options
    xs, weights = x.chunk(replicates, 1), weight.chunk(replicates)
    biases: Sequence[Tensor | None] = [None] * replicates if bias is None else bias.chunk(replicates)
    call: Any = torch.convolution
    parts = [call(*tensors, *geometry, groups // replicates) for tensors in zip(xs, weights, biases, strict=True)]
    return torch.cat(parts, 1)


def convolution_backward(
    replicates: int, dy: Tensor, x: Tensor, weight: Tensor, bias_sizes: list[int] | None, *options: Any
) -> tuple[Tensor | None, ...]:
    """``aten.convolution_backward``, dealt out likewise: gradients of input, weight and bias, where asked for."""
    *geometry, groups, mask = options
    sizes = None if bias_sizes is None else [size // replicates for size in bias_sizes]
    parts = [
        _aten.convolution_backward(*tensors, sizes, *geometry, groups // replicates, mask)
        for tensors in zip(dy.chunk(replicates, 1), x.chunk(replicates, 1), weight.chunk(replicates), strict=True)
    ]
    columns = zip(*parts, strict=True)
    return tuple(
        torch.cat(column, dim) if wanted else None for column, dim, wanted in zip(columns, (1, 0, 0), mask, strict=True)
    )

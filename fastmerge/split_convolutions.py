"""Stacked convolutions on a CPU: one after another where a grouped convolution would be slower.

Under ``vmap`` a convolution of R networks becomes one with R groups. oneDNN runs that at a fraction of the speed of R
convolutions in turn, unless they are so small that starting them is what takes the time. Measured with LeNet's layers,
batch
32, forward and backward of ten networks: 28×28 35 ms grouped and 18 ms in turn, 8×8 0.7 and 1.6 ms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

_aten = torch.ops.aten
_LEAST_PRODUCTS = 1_000_000  # multiplications per network from which on splitting pays


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

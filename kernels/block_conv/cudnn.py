"""The passes of a block convolution in cuDNN, one stream after another or in groups: what is always there.

Dims: T streams, N batch, C input channels, K output channels (of one stream), H W positions, R S kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fastmerge.kernels.block_conv.formulas import masked_weight
from fastmerge.kernels.block_conv.layouts import empty_laid_out, laid_out
from fastmerge.kernels.block_conv.problem import Problem
from torch import Tensor

_convolution = torch.ops.aten.convolution.default
_convolution_backward = torch.ops.aten.convolution_backward.default


def split_forward(problem: Problem, xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """The outputs, one stream after another: T tensors (N, K, H', W'), or one joined one."""
    biases = [None] * problem.groups if bias is None else bias.chunk(problem.groups)
    parts = [
        _convolution(x, w, b, *problem.geometry.options, False, [0, 0], 1)
        for x, w, b in zip(_each(xs, problem), _dense(problem, weight).chunk(problem.groups), biases, strict=True)
    ]
    return _like_given(parts, xs)


def split_input_gradient(problem: Problem, dys: Sequence[Tensor], weight: Tensor, size: Sequence[int]) -> list[Tensor]:
    """The gradients of the inputs, one stream after another: T tensors of this size, or one joined one."""
    x = _unread(dys[0], (size[0], weight.shape[1], *size[2:]))
    weight = laid_out(_dense(problem, weight), problem.channels_last)
    parts = [
        _backward(problem, dy, x, w, 1, 0)
        for dy, w in zip(_each(dys, problem), weight.chunk(problem.groups), strict=True)
    ]
    return _like_given(parts, dys)


def split_weight_gradient(
    problem: Problem, dys: Sequence[Tensor], xs: Sequence[Tensor], weight_size: Sequence[int]
) -> Tensor:
    """The gradient of the weight (T·K, C, R, S), one stream after another."""
    # Of the weight it needs no more than shape and layout.
    size = weight_size[0] // problem.groups, *weight_size[1:]
    weight = empty_laid_out(xs[0], size, problem.channels_last)
    parts = [
        _backward(problem, dy, x, weight, 1, 1) for dy, x in zip(_each(dys, problem), _each(xs, problem), strict=True)
    ]
    return _dense(problem, torch.cat(parts) if len(parts) > 1 else parts[0])


def grouped_forward(problem: Problem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The joined output (N, T·K, H', W'), of the joined input."""
    return _convolution(x, weight, bias, *problem.geometry.options, False, [0, 0], problem.groups)


def grouped_input_gradient(problem: Problem, dy: Tensor, weight: Tensor, size: Sequence[int]) -> Tensor:
    """The gradient of the joined input, of this size."""
    x = _unread(dy, size)
    return _backward(problem, dy, x, laid_out(weight, problem.channels_last), problem.groups, 0)


def grouped_weight_gradient(problem: Problem, dy: Tensor, x: Tensor, weight_size: Sequence[int]) -> Tensor:
    """The gradient of the weight, of joined tensors."""
    weight = empty_laid_out(x, weight_size, problem.channels_last)
    return _backward(problem, dy, x, weight, problem.groups, 1)


def _backward(problem: Problem, dy: Tensor, x: Tensor, weight: Tensor, groups: int, which: int) -> Tensor:
    wanted = [which == 0, which == 1, False]
    return _convolution_backward(dy, x, weight, None, *problem.geometry.options, False, [0, 0], groups, wanted)[which]


def _unread(like: Tensor, size: Sequence[int]) -> Tensor:
    """An input whose shape alone is looked at, without memory of its size.

    PyTorch runs cuDNN channels-last where input or weight is, so that it is the weight's layout that says so.
    """
    return like.new_empty(()).expand(tuple(size))


def _each(tensors: Sequence[Tensor], problem: Problem) -> Sequence[Tensor]:
    return tensors if len(tensors) == problem.groups else tensors[0].chunk(problem.groups, 1)


def _like_given(parts: list[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    return parts if len(parts) == len(given) else [torch.cat(parts, 1)]


def _dense(problem: Problem, weight: Tensor) -> Tensor:
    return weight if problem.live is None else masked_weight(weight, problem.live.mask)

"""The block convolution as an operation of PyTorch: what autograd and torch.compile see.

There are two ways to the same passes, see ``direct``. Operators choose their implementation when they run (``choice``), so a
compiled graph holds no choice that another card or shape would have to take back.

Dims: T streams, N batch, C input channels, K output channels (of one stream), H W positions, R S kernel, L live blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fastmerge.kernels.block_conv import passes
from fastmerge.kernels.block_conv.formulas import Geometry, LiveBlocks
from fastmerge.kernels.block_conv.layouts import empty_laid_out
from fastmerge.kernels.block_conv.problem import Problem
from torch import Tensor
from torch.autograd.function import once_differentiable


class BlockConv(torch.autograd.Function):
    """All passes without the operators: of a problem, weight, bias or None, and T inputs or one joined one."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, weight: Tensor, bias: Tensor | None, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.problem, ctx.size, ctx.has_bias = problem, xs[0].shape, bias is not None
        # The weight gradient alone needs the inputs.
        ctx.save_for_backward(weight, *(xs if ctx.needs_input_grad[1] else ()))
        return tuple(passes.forward(problem, xs, weight, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        weight, *xs = ctx.saved_tensors
        _, needs_weight, needs_bias, *needs_xs = ctx.needs_input_grad
        dxs: Sequence[Tensor | None] = [None] * len(dys)
        dweight = dbias = None
        if any(needs_xs):
            dxs = passes.input_gradient(ctx.problem, dys, weight, ctx.size)
        if needs_weight:
            dweight = passes.weight_gradient(ctx.problem, dys, xs, weight.shape)
        if ctx.has_bias and needs_bias:
            dbias = torch.cat([dy.sum((0, 2, 3)) for dy in dys])
        return None, dweight, dbias, *dxs


def _problem(
    weight_size: Sequence[int],
    groups: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    live: list[Tensor],
    channels_last: bool,
) -> Problem:
    (r, s), (sh, sw), (ph, pw), (dh, dw) = weight_size[2:], stride, padding, dilation
    geometry = Geometry((r, s), (sh, sw), (ph, pw), (dh, dw))
    return Problem(groups, geometry, LiveBlocks(*live) if live else None, channels_last)


@torch.library.custom_op("fastmerge::block_conv", mutates_args=())
def block_conv(
    xs: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    live: list[Tensor],
    channels_last: bool,
) -> list[Tensor]:
    """T convolutions: ``xs`` are T tensors or one joined one, ``live`` nothing or the fields of a ``LiveBlocks``.

    ``channels_last`` is the layout of the results and of both gradients, whatever that of the gradients that come in.
    """
    problem = _problem(weight.shape, groups, stride, padding, dilation, live, channels_last)
    return passes.forward(problem, xs, weight, bias)


@block_conv.register_fake
def _(
    xs: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    live: list[Tensor],
    channels_last: bool,
) -> list[Tensor]:
    geometry = _problem(weight.shape, groups, stride, padding, dilation, [], channels_last).geometry
    n, _, height, width = xs[0].shape
    size = (n, weight.shape[0] // len(xs), *geometry.output_size(height, width))
    return [empty_laid_out(x, size, channels_last) for x in xs]


@torch.library.custom_op("fastmerge::block_conv_input_gradient", mutates_args=())
def block_conv_input_gradient(
    dys: list[Tensor],
    weight: Tensor,
    size: list[int],
    groups: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    live: list[Tensor],
    channels_last: bool,
) -> list[Tensor]:
    """Gradients of the inputs, each of ``size``."""
    return passes.input_gradient(
        _problem(weight.shape, groups, stride, padding, dilation, live, channels_last), dys, weight, size
    )


@block_conv_input_gradient.register_fake
def _(dys: list[Tensor], weight: Tensor, size: list[int], *options: Any) -> list[Tensor]:
    return [empty_laid_out(dy, size, channels_last=options[-1]) for dy in dys]


@torch.library.custom_op("fastmerge::block_conv_weight_gradient", mutates_args=())
def block_conv_weight_gradient(
    dys: list[Tensor],
    xs: list[Tensor],
    weight: Tensor,
    groups: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    live: list[Tensor],
    channels_last: bool,
) -> Tensor:
    """Gradient of the weight, of which the shape alone matters; exact zeros where no block is live."""
    return passes.weight_gradient(
        _problem(weight.shape, groups, stride, padding, dilation, live, channels_last), dys, xs, weight.shape
    )


@block_conv_weight_gradient.register_fake
def _(dys: list[Tensor], xs: list[Tensor], weight: Tensor, *options: Any) -> Tensor:
    return empty_laid_out(weight, weight.shape, channels_last=options[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    xs, weight, bias, ctx.groups, ctx.stride, ctx.padding, ctx.dilation, live, ctx.channels_last = inputs
    ctx.size, ctx.streams, ctx.has_bias = list(xs[0].shape), len(xs), bias is not None
    # The weight gradient alone needs the inputs.
    inputs_needed = xs if weight.requires_grad else []
    ctx.inputs_saved = len(inputs_needed)
    ctx.save_for_backward(weight, *live, *inputs_needed)


def _backward(ctx: Any, dys: Sequence[Tensor | None]) -> tuple[Any, ...]:
    weight, *rest = ctx.saved_tensors
    live, xs = rest[: len(rest) - ctx.inputs_saved], rest[len(rest) - ctx.inputs_saved :]
    options = (ctx.groups, ctx.stride, ctx.padding, ctx.dilation, live, ctx.channels_last)
    needs_xs, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    dxs: Sequence[Tensor | None] = [None] * ctx.streams
    dweight = dbias = None
    if any(needs_xs) if isinstance(needs_xs, (list, tuple)) else needs_xs:
        dxs = block_conv_input_gradient(dys, weight, ctx.size, *options)
    if needs_weight:
        dweight = block_conv_weight_gradient(dys, xs, weight, *options)
    if ctx.has_bias and needs_bias:
        dbias = torch.cat([dy.sum((0, 2, 3)) for dy in dys])
    return dxs, dweight, dbias, None, None, None, None, [None] * len(live), None


block_conv.register_autograd(_backward, setup_context=_setup_context)

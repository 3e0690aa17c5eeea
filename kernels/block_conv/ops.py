"""The block convolution as operations of PyTorch: what autograd and torch.compile see.

The operations choose their implementation when they run (``choice``), so a compiled graph holds no choice that
another card or shape would have to take back.

Dims: T streams, N batch, C input channels, K output channels (of one stream), H W positions, R S kernel, L live blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fastmerge.kernels.block_conv import passes
from fastmerge.kernels.block_conv.formulas import Geometry, LiveBlocks, empty_channels_last
from fastmerge.kernels.block_conv.problem import Problem
from torch import Tensor


def _problem(
    weight_size: Sequence[int],
    groups: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    live: list[Tensor],
) -> Problem:
    (r, s), (sh, sw), (ph, pw), (dh, dw) = weight_size[2:], stride, padding, dilation
    geometry = Geometry((r, s), (sh, sw), (ph, pw), (dh, dw))
    return Problem(groups, geometry, LiveBlocks(*live) if live else None)


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
) -> list[Tensor]:
    """T convolutions: ``xs`` are T tensors or one joined one, ``live`` nothing or the fields of a ``LiveBlocks``."""
    problem = _problem(weight.shape, groups, stride, padding, dilation, live)
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
) -> list[Tensor]:
    geometry = _problem(weight.shape, groups, stride, padding, dilation, []).geometry
    n, _, height, width = xs[0].shape
    size = (n, weight.shape[0] // len(xs), *geometry.output_size(height, width))
    return [empty_channels_last(x, size) for x in xs]


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
) -> list[Tensor]:
    """Gradients of the inputs, each of ``size``."""
    return passes.input_gradient(_problem(weight.shape, groups, stride, padding, dilation, live), dys, weight, size)


@block_conv_input_gradient.register_fake
def _(dys: list[Tensor], weight: Tensor, size: list[int], *_: Any) -> list[Tensor]:
    return [empty_channels_last(dy, size) for dy in dys]


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
) -> Tensor:
    """Gradient of the weight, of which the shape alone matters; exact zeros where no block is live."""
    return passes.weight_gradient(
        _problem(weight.shape, groups, stride, padding, dilation, live), dys, xs, weight.shape
    )


@block_conv_weight_gradient.register_fake
def _(dys: list[Tensor], xs: list[Tensor], weight: Tensor, *_: Any) -> Tensor:
    return empty_channels_last(weight, weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    xs, weight, bias, ctx.groups, ctx.stride, ctx.padding, ctx.dilation, live = inputs
    ctx.size, ctx.streams, ctx.has_bias = list(xs[0].shape), len(xs), bias is not None
    # The weight gradient alone needs the inputs.
    inputs_needed = xs if weight.requires_grad else []
    ctx.inputs_saved = len(inputs_needed)
    ctx.save_for_backward(weight, *live, *inputs_needed)


def _backward(ctx: Any, dys: Sequence[Tensor | None]) -> tuple[Any, ...]:
    weight, *rest = ctx.saved_tensors
    live, xs = rest[: len(rest) - ctx.inputs_saved], rest[len(rest) - ctx.inputs_saved :]
    options = (ctx.groups, ctx.stride, ctx.padding, ctx.dilation, live)
    needs_xs, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    dxs: Sequence[Tensor | None] = [None] * ctx.streams
    dweight = dbias = None
    if any(needs_xs) if isinstance(needs_xs, (list, tuple)) else needs_xs:
        dxs = block_conv_input_gradient(dys, weight, ctx.size, *options)
    if needs_weight:
        dweight = block_conv_weight_gradient(dys, xs, weight, *options)
    if ctx.has_bias and needs_bias:
        dbias = torch.cat([dy.sum((0, 2, 3)) for dy in dys])
    return dxs, dweight, dbias, None, None, None, None, [None] * len(live)


block_conv.register_autograd(_backward, setup_context=_setup_context)

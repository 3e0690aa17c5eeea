"""BatchNorm, activation, max-pooling and gate as operations of PyTorch: what torch.compile and other tracers see.

Dims: N batch, C channels, H W of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fastmerge.kernels.batch_norm.formulas import Norm, empty_in_layout, pooled_shape
from fastmerge.kernels.batch_norm.ops import empty_gradient
from torch import Tensor


@torch.library.custom_op("fastmerge::batch_norm_act_pool", mutates_args=())
def pool(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gate: Tensor | None,
    training: bool,
    eps: float,
    activation: str,
    window: Sequence[int],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and what ``pool_backward`` needs of it where it is kept: the x that each element came from, and its place."""
    # Imported here: a machine without CUDA never imports Triton.
    from fastmerge.kernels.batch_norm import pool_triton

    norm = Norm([x], weight, bias, mean, var, None, gate, eps, activation)
    y, peak, place = pool_triton.pool(norm, window, keep)
    if peak is None or place is None:
        return y[0], x.new_empty(0), x.new_empty(0, dtype=torch.int8)
    return y[0], peak[0], place[0]


@pool.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gate: Tensor | None,
    training: bool,
    eps: float,
    activation: str,
    window: Sequence[int],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = pooled_shape(x, window)
    if not keep:
        return empty_in_layout(x, shape), x.new_empty(0), x.new_empty(0, dtype=torch.int8)
    return empty_in_layout(x, shape), empty_in_layout(x, shape), empty_in_layout(x, shape, torch.int8)


@torch.library.custom_op("fastmerge::batch_norm_act_pool_backward", mutates_args=())
def pool_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gate: Tensor | None,
    peak: Tensor,
    place: Tensor,
    training: bool,
    eps: float,
    activation: str,
    window: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of ``pool``, in training through mean and variance too; empty where not needed."""
    from fastmerge.kernels.batch_norm import unpool_triton

    norm = Norm([x], weight, bias, mean, var, None, gate, eps, activation)
    dx, *gradients = unpool_triton.gradients([dy], None, norm, [peak], [place], training, window, needs)
    dx, dweight, dbias, dgate = (x.new_empty(0) if g is None else g for g in (dx and dx[0], *gradients))
    return dx, dweight, dbias, dgate


@pool_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gate: Tensor | None,
    peak: Tensor,
    place: Tensor,
    training: bool,
    eps: float,
    activation: str,
    window: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = empty_in_layout(x) if needs[0] else x.new_empty(0)
    dweight, dbias, dgate = (
        empty_gradient(x, t, need) for t, need in zip((weight, bias, gate), needs[1:], strict=True)
    )
    return dx, dweight, dbias, dgate


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, mean, var, gate, ctx.training, ctx.eps, ctx.activation, ctx.window, _ = inputs
    _, peak, place = output
    ctx.save_for_backward(x, weight, bias, mean, var, gate, peak, place)


def _backward(ctx: Any, dy: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 5)]
    gradients = pool_backward(dy, *ctx.saved_tensors, ctx.training, ctx.eps, ctx.activation, ctx.window, needs)
    dx, dweight, dbias, dgate = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return dx, dweight, dbias, None, None, dgate, None, None, None, None, None


pool.register_autograd(_backward, setup_context=_setup_context)

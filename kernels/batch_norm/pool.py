"""BatchNorm, activation, max-pooling and gate as one operation: the stem. Reference: ``formulas``.

    y = max_pool(act((x - mean) / sqrt(var + eps) · weight + bias)) · gate

The activation before the pooling is never written, forward or backward. Statistics, and the two ways to the kernels, are
those of ``act``.

Dims: N batch, C channels, H W of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from fastmerge.kernels.batch_norm import act, ops, pool_ops
from fastmerge.kernels.batch_norm.formulas import (
    MAX_WINDOW,
    batch_norm_act_pool_reference,
    check,
    gated,
    pooling_window,
)
from torch import Tensor

__all__ = ["batch_norm_act_pool", "batch_norm_act_pool_reference", "why_not_fused"]


class _BatchNormActPool(torch.autograd.Function):
    """Both passes without the operators."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        gate: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        activation: str,
        window: tuple[int, ...],
        keep: bool,
    ) -> Tensor:
        from fastmerge.kernels.batch_norm import pool_triton

        mean, var = running_mean, running_var
        if training:
            mean, var = act.eager_statistics(x, running_mean, running_var, momentum)
        y, peak, place = pool_triton.pool(x, weight, bias, mean, var, gate, eps, activation, window, keep)
        if keep:
            ctx.training, ctx.eps, ctx.activation, ctx.window = training, eps, activation, window
            ctx.save_for_backward(x, weight, bias, mean, var, gate, peak, place)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from fastmerge.kernels.batch_norm import unpool_triton

        needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 5)]
        dx, dweight, dbias, dgate = unpool_triton.gradients(
            dy, *ctx.saved_tensors, ctx.training, ctx.eps, ctx.activation, ctx.window, needs
        )
        return dx, dweight, dbias, None, None, dgate, *[None] * 6


def batch_norm_act_pool(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int] = 0,
    gate: Tensor | None = None,
) -> Tensor:
    """BatchNorm, activation, max-pooling and gate: ``max_pool2d(act(batch_norm(x))) * gate``.

    Fused on a CUDA device where ``why_not_fused`` has no objection, in plain PyTorch elsewhere. Of equal values in a window
    the first, row by row, gets the gradient, as in torch; values are compared as they are in x, before any rounding.

    Args:
        x: shape (N, C, H, W), float32, float16 or bfloat16 for the fused operation; any strides.
        weight, bias, running_mean, running_var, training, momentum, eps: as those of ``act.batch_norm_act``.
        activation: "relu" or "identity".
        kernel_size: of the pooling, one number or (height, width); at most 128 positions for the fused operation.
        stride: one number or (height, width).
        padding: one number or (height, width), at most half the kernel.
        gate: shape (N, C) or (1, C), at least 0, any floating dtype and row stride, or None. It doesn't promote the result.

    Returns:
        Shape (N, C, OH, OW) with ``OH = (H + 2 padding - kernel_size) // stride + 1``, dtype of ``x``, dense; channels-last if
        ``x`` is so or is a slice of something channels-last, otherwise contiguous. Differentiable once with respect to x,
        weight, bias and gate.

    Raises:
        ValueError: for an unknown activation, a gate of the wrong shape, a window that doesn't fit, evaluation without
            running statistics, or one value per channel in training.
    """
    window = pooling_window(x, kernel_size, stride, padding)
    tensors = (x, weight, bias, running_mean, running_var)
    if why_not_fused(*tensors, kernel_size=window[:2], activation=activation, gate=gate):
        if act.why_not_fused(*tensors, activation=activation, gate=gate) is None:
            # On a CPU all but the pooling.
            options: dict[str, Any] = {"training": training, "momentum": momentum, "eps": eps, "activation": activation}
            check("batch_norm_act_pool", x, training, activation, None, gate, running_mean, running_var)
            y = act.batch_norm_act(*tensors, **options)
            return gated(F.max_pool2d(y, window[:2], window[2:4], window[4:]), gate)
        return batch_norm_act_pool_reference(
            *tensors,
            training=training,
            momentum=momentum,
            eps=eps,
            activation=activation,
            kernel_size=window[:2],
            stride=window[2:4],
            padding=window[4:],
            gate=gate,
        )
    check("batch_norm_act_pool", x, training, activation, None, gate, running_mean, running_var)
    learning = [t is not None and t.requires_grad for t in (x, weight, bias, gate)]
    keep = torch.is_grad_enabled() and any(learning)
    if not act.runs_direct(x):
        mean, var = running_mean, running_var
        if training:
            mean, var = ops.statistics(x.detach(), running_mean, running_var, momentum)
        return pool_ops.pool(x, weight, bias, mean, var, gate, training, eps, activation, window, keep)[0]
    return _BatchNormActPool.apply(*tensors, gate, training, momentum, eps, activation, window, keep)


def why_not_fused(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    kernel_size: Sequence[int],
    activation: str = "relu",
    gate: Tensor | None = None,
) -> str | None:
    """Why ``batch_norm_act_pool`` would run in plain PyTorch, or None if it would run fused."""
    if not act._holds_kernels(x):
        return f"x is on {x.device.type}, not on a CUDA device"
    if kernel_size[0] * kernel_size[1] > MAX_WINDOW:
        return f"the pooling window has {kernel_size[0] * kernel_size[1]} positions, more than {MAX_WINDOW}"
    return act.why_not_fused(x, weight, bias, running_mean, running_var, activation=activation, gate=gate)

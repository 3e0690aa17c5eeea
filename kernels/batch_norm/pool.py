"""BatchNorm, activation, max-pooling and gate of one tensor: the stem. Everything else is in ``act``."""

from __future__ import annotations

from collections.abc import Sequence

from fastmerge.kernels.batch_norm import act
from fastmerge.kernels.batch_norm.formulas import MAX_WINDOW
from torch import Tensor


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
        activation: as there.
        kernel_size: of the pooling, one number or (height, width); at most 128 positions for the fused operation.
        stride: one number or (height, width).
        padding: one number or (height, width), at most half the kernel.
        gate: shape (N, C) or (1, C), at least 0, any floating dtype and row stride, or None. It doesn't promote the result.

    Returns:
        Shape (N, C, OH, OW) with ``OH = (H + 2 padding - kernel_size) // stride + 1``, dtype of ``x``, dense; channels-last if
        ``x`` is so or is a slice of something channels-last, otherwise contiguous. Differentiable with respect to x, weight,
        bias and gate; under torch.compile once.

    Raises:
        ValueError: for an unknown activation, a gate of the wrong shape, a window that doesn't fit, evaluation without
            running statistics, or one value per channel in training.
    """
    return act.batch_norm_act_streams(
        (x,),
        weight,
        bias,
        running_mean,
        running_var,
        training=training,
        momentum=momentum,
        eps=eps,
        activation=activation,
        gate=gate,
        pool=(kernel_size, stride, padding),
    )[0]


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

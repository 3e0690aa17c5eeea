"""BatchNorm, residual add, activation and gate as operations of PyTorch: what torch.compile and other tracers see.

One takes the statistics and updates the running ones; one is a function of the statistics and has a gradient.

Dims: N batch, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fastmerge.kernels.batch_norm.formulas import Norm, empty_in_layout
from torch import Tensor


@torch.library.custom_op("fastmerge::batch_norm_statistics", mutates_args=("running_mean", "running_var"))
def statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel; updates the running statistics."""
    # Imported here: a machine without CUDA never imports Triton.
    from fastmerge.kernels.batch_norm import statistics_triton

    return statistics_triton.statistics([x], running_mean, running_var, momentum)


@statistics.register_fake
def _(x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float) -> tuple[Tensor, Tensor]:
    c = x.shape[1]
    return x.new_empty(c, dtype=torch.float32), x.new_empty(c, dtype=torch.float32)


@torch.library.custom_op("fastmerge::batch_norm_act", mutates_args=())
def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    training: bool,
    eps: float,
    activation: str,
) -> Tensor:
    """``act((x - mean) / sqrt(var + eps) * weight + bias + residual) * gate``."""
    from fastmerge.kernels.batch_norm import forward_triton

    norm = Norm([x], weight, bias, mean, var, None if residual is None else [residual], gate, eps, activation)
    return forward_triton.normalize(norm)[0]


@normalize.register_fake
def _(x: Tensor, *arguments: Any) -> Tensor:
    return empty_in_layout(x)


@torch.library.custom_op("fastmerge::batch_norm_act_backward", mutates_args=())
def normalize_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    training: bool,
    eps: float,
    activation: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of ``normalize``, in training through mean and variance too; empty where not needed."""
    from fastmerge.kernels.batch_norm import backward_triton

    norm = Norm([x], weight, bias, mean, var, None if residual is None else [residual], gate, eps, activation)
    dx, dweight, dbias, dresidual, dgate = backward_triton.gradients([dy], None, norm, training, needs)
    # An operator returns tensors, and none of its arguments.
    gradients = (dx and dx[0], dweight, dbias, dresidual and dresidual[0], dgate)
    dx, dweight, dbias, dresidual, dgate = (x.new_empty(0) if g is None or g is dy else g for g in gradients)
    return dx, dweight, dbias, dresidual, dgate


@normalize_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    training: bool,
    eps: float,
    activation: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    changed = activation != "identity" or gate is not None
    dx, dresidual = (empty_in_layout(x) if need else x.new_empty(0) for need in (needs[0], needs[3] and changed))
    dweight, dbias, dgate = (empty_gradient(x, t, needs[i]) for t, i in ((weight, 1), (bias, 2), (gate, 4)))
    return dx, dweight, dbias, dresidual, dgate


def empty_gradient(x: Tensor, tensor: Tensor | None, needed: bool) -> Tensor:
    """What a backward operator returns for a tensor other than x, to a fake call."""
    return x.new_empty(0) if tensor is None or not needed else tensor.new_empty(tensor.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, mean, var, residual, gate, ctx.training, ctx.eps, ctx.activation = inputs
    save(ctx, x, weight, bias, mean, var, residual, gate)


def save(ctx: Any, x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, residual: Any, gate: Any) -> None:
    """Keeps for the backward pass what it needs: the residual only where the activation or the gates' gradient does."""
    gate_learns = gate is not None and gate.requires_grad
    if ctx.activation == "identity" and not gate_learns:
        residual = None
    ctx.save_for_backward(x, weight, bias, mean, var, residual, gate)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, var, residual, gate = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 5, 6)]
    gradients = normalize_backward(
        dy, x, weight, bias, mean, var, residual, gate, ctx.training, ctx.eps, ctx.activation, needs
    )
    dx, dweight, dbias, dresidual, dgate = (g if need else None for g, need in zip(gradients, needs, strict=True))
    if dresidual is not None and ctx.activation == "identity" and gate is None:
        dresidual = dy
    return dx, dweight, dbias, None, None, dresidual, dgate, None, None, None


normalize.register_autograd(_backward, setup_context=_setup_context)

"""BatchNorm, residual add, activation and gate as one operation. Reference: ``formulas``.

    y = act((x - mean) / sqrt(var + eps) · weight + bias + residual) · gate

Two passes over the tensors forward (statistics, result), two backward (sums, dx); kept for the backward pass are x, the
residual where the activation or the gates' gradient needs it, and vectors of C numbers. Sums are deterministic.

There are two ways to the same kernels. torch.compile and other tracers see custom operators (``ops``). Plain eager
calls go through an ``autograd.Function``, which spares the operators' dispatch on a path where the network's small layers wait
for the CPU. On a CPU that function runs a C++ extension (``cpu``) in place of the kernels; what traces a call there
sees plain PyTorch.

Dims: N batch, C channels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from fastmerge.kernels.batch_norm import cpu, ops
from fastmerge.kernels.batch_norm.formulas import ACTIVATIONS, batch_norm_act_reference, check
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["batch_norm_act", "batch_norm_act_reference", "why_not_fused"]

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _BatchNormAct(torch.autograd.Function):
    """Both passes without the operators."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        residual: Tensor | None,
        gate: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        activation: str,
    ) -> Tensor:
        mean, var = running_mean, running_var
        if training:
            mean, var = eager_statistics(x, running_mean, running_var, momentum)
        ctx.training, ctx.eps, ctx.activation = training, eps, activation
        ctx.on_cpu, ctx.has_residual = not _holds_kernels(x), residual is not None
        ops.save(ctx, x, weight, bias, mean, var, residual, gate)
        normalize: Any = cpu.normalize
        if not ctx.on_cpu:
            from fastmerge.kernels.batch_norm.forward_triton import normalize
        return normalize(x, weight, bias, mean, var, residual, gate, eps, activation)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 5, 6)]
        if torch.is_grad_enabled():
            return _differentiable_gradients(ctx, dy, needs)
        gradients: Any = cpu.gradients
        if not ctx.on_cpu:
            from fastmerge.kernels.batch_norm.backward_triton import gradients
        x, weight, bias, mean, var, residual, gate = ctx.saved_tensors
        dx, dweight, dbias, dresidual, dgate = gradients(
            dy, x, weight, bias, mean, var, residual, gate, ctx.training, ctx.eps, ctx.activation, needs
        )
        return dx, dweight, dbias, None, None, dresidual, dgate, None, None, None, None


def _differentiable_gradients(ctx: Any, dy: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradients by way of the reference, for a backward pass that is to be differentiated itself."""
    x, weight, bias, mean, var, residual, gate = ctx.saved_tensors
    if ctx.has_residual and residual is None:  # not kept, for its values change no gradient
        residual = torch.zeros_like(x).requires_grad_(needs[3])
    y = batch_norm_act_reference(
        x,
        weight,
        bias,
        None if ctx.training else mean,
        None if ctx.training else var,
        training=ctx.training,
        eps=ctx.eps,
        residual=residual,
        activation=ctx.activation,
        gate=gate,
    )
    wanted = [tensor for tensor, need in zip((x, weight, bias, residual, gate), needs, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    dx, dweight, dbias, dresidual, dgate = (next(found) if need else None for need in needs)
    return dx, dweight, dbias, None, None, dresidual, dgate, None, None, None, None


def eager_statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor]:
    """``ops.statistics`` without the operator's dispatch."""
    if not _holds_kernels(x):
        return cpu.statistics(x, running_mean, running_var, momentum)
    from fastmerge.kernels.batch_norm import statistics_triton

    for running in (running_mean, running_var):
        if running is not None:
            torch.autograd.graph.increment_version(running)
    return statistics_triton.statistics(x, running_mean, running_var, momentum)


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str = "relu",
    gate: Tensor | None = None,
) -> Tensor:
    """BatchNorm, residual add, activation and gate: ``act(batch_norm(x) + residual) * gate``.

    Fused on a CUDA device or a CPU where ``why_not_fused`` has no objection, in plain PyTorch elsewhere. Mean and variance are
    computed in float32 whatever the dtype of ``x``; so is everything up to the result, which is rounded once.

    Args:
        x: shape (N, C, ...), float32, float16 or bfloat16 for the fused operation; in any layout, also as a slice of the
            channels of a wider tensor. On a CPU: float32 or bfloat16, channels side by side.
        weight: shape (C,), or None for ones; its dtype is its own affair.
        bias: shape (C,), or None for zeros.
        running_mean: shape (C,), updated in place in training; needed in evaluation.
        running_var: as ``running_mean``; the variance that goes into it is the unbiased one.
        training: whether to normalise with the statistics of ``x``.
        momentum: weight of the new statistics in the running ones.
        eps: added to the variance.
        residual: shape and dtype of ``x``, in any layout, or None.
        activation: "relu" or "identity".
        gate: shape (N, C) or (1, C), at least 0, any floating dtype and row stride, or None. It doesn't promote the result.

    Returns:
        Shape and dtype of ``x``, dense; channels-last if ``x`` is so or is a slice of something channels-last, otherwise
        contiguous. Differentiable with respect to x, weight, bias, residual and gate; under torch.compile once.

    Raises:
        ValueError: for an unknown activation, a residual or gate of the wrong shape, evaluation without running statistics,
            or one value per channel in training.
    """
    if why_not_fused(x, weight, bias, running_mean, running_var, residual=residual, activation=activation, gate=gate):
        return batch_norm_act_reference(
            x,
            weight,
            bias,
            running_mean,
            running_var,
            training=training,
            momentum=momentum,
            eps=eps,
            residual=residual,
            activation=activation,
            gate=gate,
        )
    check("batch_norm_act", x, training, activation, residual, gate, running_mean, running_var)
    if not runs_direct(x):
        mean, var = running_mean, running_var
        if training:
            mean, var = ops.statistics(x.detach(), running_mean, running_var, momentum)
        return ops.normalize(x, weight, bias, mean, var, residual, gate, training, eps, activation)
    return _BatchNormAct.apply(
        x, weight, bias, running_mean, running_var, residual, gate, training, momentum, eps, activation
    )


def runs_direct(x: Tensor) -> bool:
    """Whether nothing traces the call, so that the kernels can be launched without a custom operator."""
    if torch.compiler.is_compiling():
        return False
    return type(x) in (Tensor, torch.nn.Parameter) and torch._C._len_torch_dispatch_stack() == 0


def why_not_fused(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str = "relu",
    gate: Tensor | None = None,
) -> str | None:
    """Why ``batch_norm_act`` would run in plain PyTorch, or None if it would run fused."""
    if not _holds_kernels(x):
        reason = _why_not_on_cpu(x)
        if reason is not None:
            return reason
    elif not _HAS_TRITON:
        return "Triton is not installed"
    if torch._C._functorch.maybe_current_level() is not None:
        return "custom operators don't run under the transforms of torch.func"
    if activation not in ACTIVATIONS:
        return f"the activation is {activation}, not one of {', '.join(ACTIVATIONS)}"
    if x.dtype not in _DTYPES:
        return f"x is {x.dtype}"
    if x.numel() == 0:
        return "x is empty"
    if residual is not None and residual.dtype != x.dtype:
        return f"the residual is {residual.dtype}, x is {x.dtype}"
    for tensor in (weight, bias, running_mean, running_var, residual, gate):
        if tensor is not None and tensor.device != x.device:
            return f"x is on {x.device}, another argument on {tensor.device}"
        if tensor is not None and tensor.dtype == torch.float64:
            return f"an argument is {tensor.dtype}"
    return None


def _why_not_on_cpu(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device.type}, neither on a CUDA device nor on a CPU"
    if not runs_direct(x):
        return "the call is traced, which on a CPU sees plain PyTorch"
    if forward_ad._current_level >= 0:
        return "there is no forward-mode derivative"
    return cpu.why_not(x)


def _holds_kernels(x: Tensor) -> bool:
    """Whether Triton's kernels can run on a tensor."""
    return x.is_cuda

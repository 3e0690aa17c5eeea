"""BatchNorm, residual add, activation, max-pooling and gate as one operation. Reference: ``formulas``.

    y = act((x - mean) / sqrt(var + eps) · weight + bias + residual) · gate
    y = max_pool(act((x - mean) / sqrt(var + eps) · weight + bias)) · gate

Two passes over the tensors forward (statistics, result), two backward (sums, dx); kept for the backward pass are x, the
residual where the activation or the gates' gradient needs it, and vectors of C numbers. An activation before a pooling is never
written, forward or backward. Sums are deterministic.

One call takes the T streams of a network, one tensor per teacher, beside vectors that hold all teachers' channels.

There are two ways to the same kernels, see ``direct``: custom operators (``ops``, ``pool_ops``) and an ``autograd.Function``.
On a CPU that function runs a C++ extension (``cpu``) in place of the kernels; what traces a call there sees plain PyTorch.

Dims: N batch, C channels of a stream, T streams.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fastmerge.kernels.batch_norm import cpu, ops, pool_ops
from fastmerge.kernels.batch_norm.formulas import (
    ACTIVATIONS,
    MAX_WINDOW,
    Norm,
    batch_norm_act_pool_reference,
    batch_norm_act_reference,
    check,
    gated,
    of_stream,
    pooling_window,
)
from fastmerge.kernels.direct import apply, runs_direct
from fastmerge.kernels.launch import Looks, looks
from torch import Tensor
from torch.autograd import forward_ad

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Call(NamedTuple):
    """The arguments that are no tensors; see ``batch_norm_act_streams``."""

    streams: int
    training: bool
    momentum: float
    eps: float
    activation: str
    window: tuple[int, ...] | None
    readers: int
    on_cpu: bool
    keep: bool


@functools.cache
def _kernels() -> Any:
    """The passes as Triton runs them, imported at the first launch: a machine without CUDA never imports Triton."""
    from fastmerge.kernels.batch_norm import (
        backward_triton,
        forward_triton,
        pool_triton,
        statistics_triton,
        unpool_triton,
    )

    return SimpleNamespace(
        statistics=statistics_triton.statistics,
        normalize=forward_triton.normalize,
        normalize_batch=forward_triton.normalize_batch,
        gradients=backward_triton.gradients,
        pool=pool_triton.pool,
        pool_gradients=unpool_triton.gradients,
    )


class _BatchNormAct(torch.autograd.Function):
    """Both passes without the operators."""

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        running: tuple[Any, Any, Tensor | None],
        seen: Looks,
        weight: Tensor | None,
        bias: Tensor | None,
        gate: Tensor | None,
        *streams: Tensor,
    ) -> tuple[Tensor, ...]:
        xs, residual = streams[: call.streams], streams[call.streams :] or None
        mean, var, batches = running
        peak: Any = ()
        place: Any = ()
        if call.on_cpu:
            norm = Norm(xs, weight, bias, mean, var, residual, gate, call.eps, call.activation)
            y, norm = cpu.forward(norm, (mean, var), call.momentum, call.training)
            if batches is not None:
                batches.add_(1)
        else:
            kernels = _kernels()
            if call.training:
                torch.autograd.graph.increment_version([t for t in running if t is not None])
            norm = Norm(xs, weight, bias, mean, var, residual, gate, call.eps, call.activation)
            if call.training and call.window is None:
                y, norm = kernels.normalize_batch(norm, call.momentum, batches, seen)
            else:
                if call.training:
                    mean, var = kernels.statistics(xs, mean, var, call.momentum, batches)
                    norm = norm._replace(mean=mean, var=var)
                if call.window is None:
                    y = kernels.normalize(norm)
                else:
                    y, peak, place = kernels.pool(norm, call.window, call.keep)
        if call.keep:
            ctx.call = call
            ctx.set_materialize_grads(False)
            if not norm.activates and not (gate is not None and gate.requires_grad):
                residual = None  # its values change no gradient
            ctx.save_for_backward(weight, bias, norm.mean, norm.var, gate, *norm.x, *(residual or ()), *peak, *place)
        # To autograd the second reader's are tensors of their own, so that it doesn't add up what the readers send back.
        return tuple(y) if call.readers == 1 else (*y, *[tensor.detach() for tensor in y])

    @staticmethod
    def backward(ctx: Any, *dy: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        count = call.streams
        _, _, _, needs_dweight, needs_dbias, needs_dgate, *needs_streams = ctx.needs_input_grad
        weight, bias, mean, var, gate, *tensors = ctx.saved_tensors
        x, kept = tensors[:count], tensors[count:]
        needs = (any(needs_streams[:count]), needs_dweight, needs_dbias, any(needs_streams[count:]), needs_dgate)
        first, more = _per_reader(dy, count)
        if first is None:
            return (None,) * len(ctx.needs_input_grad)
        residual = kept if call.window is None and kept else None
        if residual is None and needs[3] and torch.is_grad_enabled():
            residual = [torch.zeros_like(t).requires_grad_() for t in x]
        norm = Norm(x, weight, bias, mean, var, residual, gate, call.eps, call.activation)
        gradients: Any
        if torch.is_grad_enabled():
            gradients = _differentiable_gradients(call, first, more, norm, needs)
        elif call.on_cpu:
            gradients = cpu.gradients(first, more, norm, call.training, needs)
        elif call.window is None:
            gradients = _kernels().gradients(first, more, norm, call.training, needs)
        else:
            of_x, *of_vectors = _kernels().pool_gradients(
                *(first, more, norm, kept[:count], kept[count:], call.training, call.window),
                (*needs[:3], needs_dgate),
            )
            gradients = (of_x, *of_vectors[:2], None, of_vectors[2])
        dx, dweight, dbias, dresidual, dgate = gradients
        of_streams = [*(dx or [None] * count), *(dresidual or [None] * (len(needs_streams) - count))]
        of_streams = [g if need else None for g, need in zip(of_streams, needs_streams, strict=True)]
        return None, None, None, dweight, dbias, dgate, *of_streams


def _per_reader(dy: Sequence[Tensor | None], count: int) -> tuple[Any, Any]:
    """The gradients of all streams from one reader, and from a second one; None where there are none."""
    if all([g is not None for g in dy]):  # noqa: C419, a generator takes longer
        return dy[:count], dy[count:] or None
    readers = [own for own in (dy[:count], dy[count:]) if any(g is not None for g in own)]
    like = next((g for g in dy if g is not None), None)
    zeros: list[Any] = [[torch.zeros_like(like) if g is None else g for g in own] for own in readers]
    return (*zeros, None, None)[:2]  # type: ignore[return-value]


def _differentiable_gradients(
    call: _Call, dy: Sequence[Tensor], more: Sequence[Tensor] | None, norm: Norm, needs: Sequence[bool]
) -> tuple[Any, ...]:
    """The gradients by way of the reference, for a backward pass that is to be differentiated itself."""
    if more is not None:
        dy = [a + b for a, b in zip(dy, more, strict=True)]
    running = (None, None) if call.training else (norm.mean, norm.var)
    y = _reference(call, norm.x, norm.weight, norm.bias, *running, norm.residual, norm.gate)
    groups = (norm.x, [norm.weight], [norm.bias], norm.residual or [], [norm.gate])
    wanted = [t for group, need in zip(groups, needs, strict=True) if need for t in group]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True, allow_unused=True))
    dx, dweight, dbias, dresidual, dgate = (
        [next(found) for _ in group] if need else None for group, need in zip(groups, needs, strict=True)
    )
    return dx, dweight and dweight[0], dbias and dbias[0], dresidual, dgate and dgate[0]  # lists of one


def _reference(
    call: _Call,
    xs: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residuals: Sequence[Tensor] | None,
    gate: Tensor | None,
) -> list[Tensor]:
    """The reference, stream by stream."""
    outputs = []
    for t, x in enumerate(xs):
        vectors = [of_stream(v, t, len(xs)) for v in (weight, bias, running_mean, running_var)]
        options: dict[str, Any] = {"training": call.training, "momentum": call.momentum, "eps": call.eps}
        options |= {"activation": call.activation, "gate": of_stream(gate, t, len(xs), 1)}
        if call.window is None:
            residual = None if residuals is None else residuals[t]
            outputs.append(batch_norm_act_reference(x, *vectors, residual=residual, **options))
        else:
            pooling = {"kernel_size": call.window[:2], "stride": call.window[2:4], "padding": call.window[4:]}
            outputs.append(batch_norm_act_pool_reference(x, *vectors, **pooling, **options))
    return outputs


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
        activation: "relu", "relu6", "silu", "hardswish" or "identity".
        gate: shape (N, C) or (1, C), at least 0, any floating dtype and row stride, or None. It doesn't promote the result.

    Returns:
        Shape and dtype of ``x``, dense; channels-last if ``x`` is so or is a slice of something channels-last, otherwise
        contiguous. Differentiable with respect to x, weight, bias, residual and gate; under torch.compile once.

    Raises:
        ValueError: for an unknown activation, a residual or gate of the wrong shape, evaluation without running statistics,
            or one value per channel in training.
    """
    return batch_norm_act_streams(
        (x,),
        weight,
        bias,
        running_mean,
        running_var,
        training=training,
        momentum=momentum,
        eps=eps,
        residuals=None if residual is None else (residual,),
        activation=activation,
        gate=gate,
    )[0]


def batch_norm_act_streams(
    xs: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residuals: Sequence[Tensor] | None = None,
    activation: str = "relu",
    gate: Tensor | None = None,
    pool: tuple[Any, Any, Any] | None = None,
    num_batches_tracked: Tensor | None = None,
    readers: int = 1,
) -> tuple[Tensor, ...]:
    """``batch_norm_act``, or with ``pool`` ``batch_norm_act_pool``, of T tensors at once.

    Args:
        xs: T tensors of one shape, each as ``x`` there.
        weight, bias, running_mean, running_var: shape (T·C,), stream by stream.
        training, momentum, eps, activation: as there.
        residuals: T tensors, or None.
        gate: shape (N, T·C) or (1, T·C), or None.
        pool: kernel size, stride and padding of a max-pooling after the activation.
        num_batches_tracked: counters of which each goes up by 1 in training, or None.
        readers: 2 where two operations read each result and neither changes it in place: each gets its own tensor, of the
            same memory, and the backward pass adds up what they send back.

    Returns:
        T results for the first reader, then T for a second one.
    """
    window = None if pool is None else pooling_window(xs[0], *pool)
    x, vectors = xs[0], (weight, bias, running_mean, running_var)
    call = _Call(len(xs), training, momentum, eps, activation, window, readers, not _holds_kernels(x), True)
    is_direct = runs_direct(x)
    batches = num_batches_tracked if training else None
    reason, seen = _reason(call, is_direct, xs, vectors, residuals, gate, batches)
    if reason is None and window is not None and call.on_cpu:
        # All but the pooling.
        ys = batch_norm_act_streams(
            *(xs, *vectors),
            training=training,
            momentum=momentum,
            eps=eps,
            activation=activation,
            num_batches_tracked=num_batches_tracked,
        )
        pooled = [F.max_pool2d(y, window[:2], window[2:4], window[4:]) for y in ys]
        return tuple(gated(y, of_stream(gate, t, len(xs), 1)) for t, y in enumerate(pooled)) * readers
    if reason is None and is_direct:
        if window is not None:
            tensors = (*xs, weight, bias, gate)
            learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
            call = call._replace(keep=learns)
        running = running_mean, running_var, batches
        tensors = weight, bias, gate, *xs, *(residuals or ())
        results: tuple[Tensor, ...] = apply(_BatchNormAct, call, running, seen, *tensors)
        return results
    if batches is not None:
        batches.add_(1)
    way = _reference if reason is not None else _operators
    return tuple(way(call, xs, *vectors, residuals, gate)) * readers


def _operators(
    call: _Call,
    xs: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residuals: Sequence[Tensor] | None,
    gate: Tensor | None,
) -> list[Tensor]:
    """The operators, stream by stream."""
    outputs = []
    for t, x in enumerate(xs):
        scale, shift, mean, var = (of_stream(v, t, len(xs)) for v in (weight, bias, running_mean, running_var))
        own_gate = of_stream(gate, t, len(xs), 1)
        if call.training:
            mean, var = ops.statistics(x.detach(), mean, var, call.momentum)
        options = (call.training, call.eps, call.activation)
        if call.window is None:
            residual = None if residuals is None else residuals[t]
            outputs.append(ops.normalize(x, scale, shift, mean, var, residual, own_gate, *options))
        else:
            learners = [tensor is not None and tensor.requires_grad for tensor in (x, weight, bias, gate)]
            keep = torch.is_grad_enabled() and any(learners)
            outputs.append(pool_ops.pool(x, scale, shift, mean, var, own_gate, *options, call.window, keep)[0])
    return outputs


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
    reason = _why_not_here(x, runs_direct(x))
    if reason is not None:
        return reason
    residuals = None if residual is None else (residual,)
    return _why_not((x,), (weight, bias, running_mean, running_var), residuals, activation, gate, None)


def _why_not_here(x: Tensor, is_direct: bool) -> str | None:
    """What speaks against the fused operation in how a call is made, rather than in its arguments."""
    if not _holds_kernels(x):
        if x.device.type != "cpu":
            return f"x is on {x.device.type}, neither on a CUDA device nor on a CPU"
        if not is_direct:
            return "the call is traced, which on a CPU sees plain PyTorch"
        if forward_ad._current_level >= 0:
            return "there is no forward-mode derivative"
    if torch._C._functorch.maybe_current_level() is not None:  # last: torch.compile breaks the graph at it
        return "custom operators don't run under the transforms of torch.func"
    return None


def _why_not(
    xs: Sequence[Tensor],
    vectors: Sequence[Tensor | None],
    residuals: Sequence[Tensor] | None,
    activation: str,
    gate: Tensor | None,
    window: tuple[int, ...] | None,
) -> str | None:
    """What speaks against the fused operation in shapes, strides, dtypes and devices."""
    x = xs[0]
    if not _holds_kernels(x):
        reasons = [reason for reason in map(cpu.why_not, xs) if reason is not None]
        if reasons:
            return reasons[0]
    elif not _HAS_TRITON:
        return "Triton is not installed"
    elif window is not None and window[0] * window[1] > MAX_WINDOW:
        return f"the pooling window has {window[0] * window[1]} positions, more than {MAX_WINDOW}"
    if activation not in ACTIVATIONS:
        return f"the activation is {activation}, not one of {', '.join(ACTIVATIONS)}"
    if x.dtype not in _DTYPES:
        return f"x is {x.dtype}"
    if x.numel() == 0:
        return "x is empty"
    for residual in residuals or ():
        if residual.dtype != x.dtype:
            return f"the residual is {residual.dtype}, x is {x.dtype}"
    for tensor in (*vectors, *(residuals or ()), gate):
        if tensor is not None and tensor.device != x.device:
            return f"x is on {x.device}, another argument on {tensor.device}"
        if tensor is not None and tensor.dtype == torch.float64:
            return f"an argument is {tensor.dtype}"
    return None


_reasons: dict[Any, tuple[str | None, Looks]] = {}  # with the first of equal looks, which is found faster again


def _reason(
    call: _Call,
    is_direct: bool,
    xs: Sequence[Tensor],
    vectors: Sequence[Tensor | None],
    residuals: Sequence[Tensor] | None,
    gate: Tensor | None,
    batches: Tensor | None,
) -> tuple[str | None, Looks]:
    """``_why_not``, after a look at whether the arguments fit one another; remembered for all that look alike.

    Returns:
        The reason, and in a direct call the ``looks`` of tensors in the order of ``Norm``, of streams the first, and batches.
    """
    reason = _why_not_here(xs[0], is_direct)
    if reason is not None or not is_direct:
        _check(call, xs, vectors, residuals, gate)
        return reason or _why_not(xs, vectors, residuals, call.activation, gate, call.window), ()
    seen = looks(xs[0], *vectors, residuals and residuals[0], gate, batches)
    key = call, cpu._batch_norm is None, seen, looks(*xs[1:], *(residuals[1:] if residuals else ()))
    if key not in _reasons:
        _check(call, xs, vectors, residuals, gate)
        if len(_reasons) >= 4096:
            _reasons.clear()
        _reasons[key] = _why_not(xs, vectors, residuals, call.activation, gate, call.window), seen
    return _reasons[key]


def _check(
    call: _Call,
    xs: Sequence[Tensor],
    vectors: Sequence[Tensor | None],
    residuals: Sequence[Tensor] | None,
    gate: Tensor | None,
) -> None:
    name = "batch_norm_act" if call.window is None else "batch_norm_act_pool"
    for t, x in enumerate(xs):
        if x.shape != xs[0].shape or x.dtype != xs[0].dtype or x.device != xs[0].device:
            raise ValueError(
                f"{name} needs streams of one shape, dtype and device; got {xs[0].dtype} of shape {tuple(xs[0].shape)} on "
                f"{xs[0].device} and {x.dtype} of shape {tuple(x.shape)} on {x.device}"
            )
        residual = None if residuals is None else residuals[t]
        check(name, x, call.training, call.activation, residual, of_stream(gate, t, len(xs), 1), *vectors[2:])


def _holds_kernels(x: Tensor) -> bool:
    """Whether Triton's kernels can run on a tensor."""
    return x.is_cuda

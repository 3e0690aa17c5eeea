"""Statistics of BatchNorm: over the batches of all processes together, and estimated anew for a network."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode


class SyncedBatchNorm(TorchFunctionMode):
    """Within this context every BatchNorm in training mode takes its statistics over the batches of all processes.

        y = (x - mean) / sqrt(var + eps) · weight + bias

    Forward, each process sends its mean, its sum of squared deviations and its count, which are put together as Chan does;
    backward, the sums of dy and of dy · (x - mean). torch's SyncBatchNorm does the same on CUDA devices alone, and in modules
    that replace a network's own.

    It meets each call of :func:`torch.nn.functional.batch_norm`, whoever makes it: a BatchNorm of ``torch.nn``, one of another
    library, a network's own code, a big student that does not run fused. All processes must make the same calls. Gradients
    are those of the sum of the processes' losses, as DistributedDataParallel averages them.

    Args:
        group: of processes; None is all.
        without_gradients: Whether it meets calls without gradients, too. In scoring, processes may have unequally many.
    """

    def __init__(self, group: Any = None, without_gradients: bool = False) -> None:
        super().__init__()
        self.group, self.without_gradients = group, without_gradients

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm and (self.without_gradients or torch.is_grad_enabled()):
            return _batch_norm(self.group, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(
    group: Any,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As :func:`torch.nn.functional.batch_norm`, in its names, but for the statistics of a training batch."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    y, mean, var, count = _Synced.apply(input, weight, bias, eps, group)
    if running_mean is not None and running_var is not None:
        unbiased = var * (count / (count - 1).clamp(min=1))
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    return y


class _Synced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, var, count = _statistics(x, group)
        gain, shift = (None if t is None else t.to(mean.dtype) for t in (weight, bias))
        y = F.batch_norm(x, mean, var, gain, shift, training=False, eps=eps)
        ctx.group, ctx.of_weight, ctx.of_bias = group, _dtype(weight), _dtype(bias)
        ctx.save_for_backward(x, gain, mean, torch.rsqrt(var + eps), count)
        ctx.mark_non_differentiable(mean, var, count)
        return y, mean, var, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, mean, inverse, count = ctx.saved_tensors
        wide, dims = (-1, *[1] * (x.dim() - 2)), [d for d in range(x.dim()) if d != 1]
        far = x.to(mean.dtype) - mean.view(wide)
        dy = dy.to(mean.dtype)
        sums = torch.stack([dy.sum(dims), (dy * far).sum(dims)])
        dbias = None if ctx.of_bias is None else sums[0].to(ctx.of_bias)
        dweight = None if ctx.of_weight is None else (sums[1] * inverse).to(ctx.of_weight)
        dx = None
        if ctx.needs_input_grad[0]:
            whole = sums.to(torch.float64, copy=True)
            dist.all_reduce(whole, group=ctx.group)
            means = (whole / count).to(mean.dtype)
            dx = dy - means[0].view(wide) - far * (means[1] * inverse.square()).view(wide)
            dx = (dx * (inverse if gain is None else inverse * gain).view(wide)).to(x.dtype)
        return dx, dweight, dbias, None, None


def _statistics(x: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of each channel, (C,), in float32 or wider, and how many values they are of, (), float64."""
    dims, channels = [d for d in range(x.dim()) if d != 1], x.shape[1]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    own = x.numel() // channels
    message = torch.zeros(2 * channels + 1, dtype=torch.float64, device=x.device)
    if own:
        var, mean = torch.var_mean(x.to(wide), dims, correction=0)
        message[:channels], message[channels:-1], message[-1] = mean, var * own, own
    parts = [torch.empty_like(message) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, message, group=group)
    each = torch.stack(parts)
    means_PC, squares_PC, counts_P1 = each[:, :channels], each[:, channels:-1], each[:, -1:]
    count = counts_P1.sum()
    mean = (counts_P1 * means_PC).sum(0) / count
    var = (squares_PC + counts_P1 * (means_PC - mean).square()).sum(0) / count
    return mean.to(wide), var.to(wide), count


def _dtype(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


ENOUGH_SAMPLES = 4096


def has_statistics(network: nn.Module) -> bool:
    """Whether a network has a BatchNorm with running statistics."""
    return any(True for _ in _norms(network))


@torch.no_grad()
def recalibrate(network: nn.Module, loader: Iterable[Any]) -> None:
    """Estimates a network's BatchNorm statistics anew, as the mean over batches; nothing else changes.

    A compressed student has the big student's statistics. Its channels now read fewer others, so these statistics are wrong
    until training has updated them; this updates them at once. Meanwhile Dropout and the like are in eval mode, and BatchNorm
    normalises each batch by the batch's own statistics.

    Args:
        network: changed in place; without BatchNorm it stays as it is, and the loader is not read.
        loader: yields inputs, or (input, target) as train loaders do; a tuple of tensors in place of the input goes to a
            network of several inputs. A few thousand samples in batches of the training's size are enough.

    Raises:
        ValueError: the loader is empty.
        FloatingPointError: a statistic became NaN or Inf; the network has its former statistics then.
    """
    norms = list(_norms(network))
    if not norms:
        return
    modes = {module: module.training for module in network.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    device = next(network.parameters()).device
    before = {buffer: buffer.clone() for norm in norms for buffer in norm.buffers()}
    try:
        network.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative mean
            norm.training = True
        batches = 0
        for batch in loader:
            inputs = _inputs(batch)
            with single_samples_named(inputs):
                network(*(value.to(device) for value in inputs))
            batches += 1
        if not batches:
            raise ValueError("recalibrate needs at least one batch; the loader is empty")
        for name, norm in network.named_modules():
            if norm in momenta and not all(bool(buffer.isfinite().all()) for buffer in norm.buffers()):
                raise FloatingPointError(
                    f"the statistics of '{name}' became NaN or Inf over {batches} batches; look for NaN or Inf in the loader's "
                    "inputs and in the network's weights"
                )
    except BaseException:
        for buffer, values in before.items():
            buffer.copy_(values)
        raise
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def single_samples_named(inputs: tuple[Tensor, ...]) -> Iterator[None]:
    """Within it BatchNorm's error over a batch of one sample says what to do."""
    try:
        yield
    except ValueError as error:
        if len(inputs[0]) != 1 or "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            "the loader gave a batch of one sample, which BatchNorm can't train on: leave out a last batch of one "
            "(DataLoader(drop_last=True)) or take another batch size"
        ) from error


def _norms(network: nn.Module) -> Iterable[_BatchNorm]:
    return (m for m in network.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None)


def _inputs(batch: Any) -> tuple[Tensor, ...]:
    if isinstance(batch, (tuple, list)):
        batch = batch[0]
    return tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)

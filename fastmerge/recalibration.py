"""BatchNorm statistics estimated anew, for a network whose channels changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

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

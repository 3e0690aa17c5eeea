"""A BatchNorm over processes of unequal shares: what each computes, for one process to compare with."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmerge.batch_statistics import SyncedBatchNorm

SHAPES = ((7, 3), (9, 5, 4, 3), (8, 2, 6))


def shares(x: Tensor, size: int) -> list[Tensor]:
    """Unequal ones, the last one of a single sample."""
    sizes = {1: [len(x)], 2: [len(x) - 1, 1], 3: [len(x) - 3, 2, 1]}[size]
    return list(x.split(sizes))


def case(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The whole batch, far from zero, and the gradient of its output."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return (3 * x + 10).to(dtype), dy.to(dtype)


def norm(channels: int, momentum: float | None, affine: bool, dtype: torch.dtype) -> nn.Module:
    made = nn.BatchNorm1d(channels, momentum=momentum, affine=affine)
    made._check_input_dim = lambda x: None  # of any number of dimensions
    if affine:
        with torch.no_grad():
            made.weight.copy_(torch.linspace(0.5, 2, channels))
            made.bias.copy_(torch.linspace(-1, 1, channels))
    return made.to(torch.float64 if dtype == torch.float64 else torch.float32)


def run(rank: int, size: int, dtype: torch.dtype, momentum: float | None, affine: bool) -> list[dict[str, Any]]:
    """Two training calls of every shape, with the second one's gradients, and one in eval mode."""
    found = []
    for shape in SHAPES:
        layer, (x, dy) = norm(shape[1], momentum, affine, dtype), case(shape, dtype)
        mine, its = (shares(t, size)[rank] for t in (x, dy))
        mine = mine.requires_grad_()
        with SyncedBatchNorm() if size > 1 else contextlib.nullcontext():
            layer((2 * mine).detach())
            y = layer(mine)
            y.backward(its)
        tensors = {"y": y.detach(), "dx": mine.grad, **dict(layer.named_buffers())}
        tensors |= {f"d{name}": p.grad for name, p in layer.named_parameters()}
        with torch.no_grad(), SyncedBatchNorm() if size > 1 else contextlib.nullcontext():
            tensors["eval"] = layer.eval()(mine)  # other processes need not take part
        found.append({name: tensor.double().tolist() for name, tensor in tensors.items()})
    return found


def empty(rank: int, size: int) -> list[Any]:
    """The last process has no samples."""
    x = torch.arange(12.0, dtype=torch.float64).view(4, 3)
    mine = (x if rank < size - 1 else x[:0]).requires_grad_()
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    with SyncedBatchNorm():
        y = F.batch_norm(mine, mean, var, training=True, momentum=1.0)
        y.square().sum().backward()
    return [len(y), mean.tolist(), var.tolist()]

"""BatchNorm of all teachers at once, with what follows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmerge.kernels.batch_norm import batch_norm_act, batch_norm_act_pool, why_not_fused
from fastmerge.wide.streams import GateStreams, split_streams

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _runs_as_rows(x: Tensor) -> bool:
    """Whether to normalise images, channels-last or a slice of channels of such, as one row of channels per pixel.

    On a CPU torch's channels-last kernel for rows is faster than that for images.
    """
    return (
        x.device.type == "cpu"
        and x.dim() == 4
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and x.stride(1) == 1
        and x.stride(2) == x.stride(3) * x.shape[3]
        and x.stride(0) == x.stride(2) * x.shape[2]
    )


def _has_fused(x: Tensor, training: bool) -> bool:
    """Whether there is a fused operation that pays: on a CPU evaluation runs what the teachers run, to the same rounding."""
    return x.is_cuda or (training and x.device.type == "cpu" and why_not_fused(x) is None)


class WideBatchNorm(nn.Module):
    """The teachers' BatchNorms as one of T·C channels, teacher by teacher.

    A joined tensor is normalised as a whole, streams one by one with views of the same parameters and statistics.

    Args:
        norms: T BatchNorms of ``torch.nn`` with the same options.

    Attributes:
        weight, bias: (T·C,), or None where they are not affine.
        running_mean, running_var: (T·C,), or None where they are not tracked.
        num_batches_tracked: (T,), or None.
        fused: whether the normalisation and what follows it run as one operation: True, False, or "auto" for where there is
            such an operation, on a CPU in training mode alone.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(self, norms: Sequence[Any]) -> None:
        super().__init__()
        first = norms[0]
        self.num_teachers = len(norms)
        self.eps, self.momentum = first.eps, first.momentum
        self.fused: bool | str = "auto"
        for name in ("weight", "bias"):
            tensors = [getattr(norm, name) for norm in norms]
            joined = None if tensors[0] is None else nn.Parameter(torch.cat([t.detach() for t in tensors]))
            self.register_parameter(name, joined)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            tensors = [getattr(norm, name) for norm in norms]
            self.register_buffer(
                name, None if tensors[0] is None else torch.cat([t.detach().reshape(-1) for t in tensors])
            )

    def forward(
        self,
        *values: Tensor,
        activation: str | None = None,
        residual: Sequence[Tensor] | None = None,
        pool: tuple[Any, Any, Any] | None = None,
        gates: Tensor | None = None,
        gate: GateStreams | None = None,
    ) -> tuple[Tensor, ...]:
        """Normalises T streams, or one joined tensor with its channels in dimension 1, and does what follows.

        Args:
            values: what to normalise.
            activation: "relu" or "identity"; None: a normalisation alone, which is never fused.
            residual: what to add before the activation, one tensor per value.
            pool: kernel size, stride and padding of a max-pooling after the activation.
            gates: the matrix of gates, or None for open gates.
            gate: which of its columns multiply the result; None for no gate.
        """
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        factors = self._factors()
        apart = len(values) == 1 and self.momentum is None  # each teacher counts its own batches
        residuals: Sequence[Tensor | None] = [None] * len(values) if residual is None else residual
        if apart:
            values = split_streams(values[0], self.num_teachers, 1)
            first = residuals[0]
            residuals = [None] * len(values) if first is None else split_streams(first, self.num_teachers, 1)
        columns: Sequence[Tensor | None] = [None] * len(values)
        if gates is not None and gate is not None:
            columns = gate.columns(gates, joined=len(values) == 1)
        fused = activation is not None and (
            _has_fused(values[0], self.training) if self.fused == "auto" else bool(self.fused)
        )
        outputs = []
        for t, (x, tensors) in enumerate(zip(values, self._tensors(len(values)), strict=True)):
            if fused:
                assert activation is not None
                outputs.append(self._fused(x, tensors, factors[t], activation, residuals[t], pool, columns[t]))
            else:
                outputs.append(self._plain(x, tensors, factors[t], activation, residuals[t], pool))
        if not fused and gate is not None:
            outputs = list(gate(gates, *outputs))
        return (torch.cat(outputs, dim=1),) if apart else tuple(outputs)

    def _plain(
        self,
        x: Tensor,
        tensors: Sequence[Tensor | None],
        factor: float,
        activation: str | None,
        residual: Tensor | None,
        pool: tuple[Any, Any, Any] | None,
    ) -> Tensor:
        """All but the gate, as separate operations."""
        mean, var, weight, bias = tensors
        as_rows = _runs_as_rows(x)
        rows = x.permute(0, 2, 3, 1).flatten(0, 2) if as_rows else x
        y = F.batch_norm(rows, mean, var, weight, bias, self.training or mean is None, factor, self.eps)
        if activation == "relu" and residual is None:
            y = y.relu_()
        if as_rows:
            y = y.unflatten(0, (x.shape[0], *x.shape[2:])).permute(0, 3, 1, 2)
        if residual is not None:
            y = y + residual
            y = y.relu_() if activation == "relu" else y
        return y if pool is None else F.max_pool2d(y, *pool)

    def _fused(
        self,
        x: Tensor,
        tensors: Sequence[Tensor | None],
        factor: float,
        activation: str,
        residual: Tensor | None,
        pool: tuple[Any, Any, Any] | None,
        gate: Tensor | None,
    ) -> Tensor:
        mean, var, weight, bias = tensors
        if gate is not None and gate.shape[0] not in (1, x.shape[0]):
            gate = gate.repeat_interleave(x.shape[0] // gate.shape[0], dim=0)
        options: dict[str, Any] = {
            "training": self.training or mean is None,
            "momentum": factor,
            "eps": self.eps,
            "activation": activation,
            "gate": gate,
        }
        if pool is None:
            return batch_norm_act(x, weight, bias, mean, var, residual=residual, **options)
        kernel_size, stride, padding = pool
        return batch_norm_act_pool(
            x, weight, bias, mean, var, kernel_size=kernel_size, stride=stride, padding=padding, **options
        )

    def _tensors(self, count: int) -> list[tuple[Tensor | None, ...]]:
        """Running mean and variance, weight and bias: of each stream, or of all together."""
        tensors = (self.running_mean, self.running_var, self.weight, self.bias)
        if count == 1:
            return [tensors]
        parts = [[None] * count if x is None else list(x.chunk(count)) for x in tensors]
        return list(zip(*parts, strict=True))

    def _factors(self) -> list[float]:
        """How much of the batch enters the running statistics, per teacher: as much as of any before for momentum None."""
        if self.momentum is not None:
            return [self.momentum] * self.num_teachers
        if not self.training or self.num_batches_tracked is None:
            return [0.0] * self.num_teachers
        return [1 / count for count in self.num_batches_tracked.tolist()]

    def extra_repr(self) -> str:
        sized = self.weight if self.weight is not None else self.running_mean
        channels = "" if sized is None else f"{len(sized)} channels of "
        return (
            f"{channels}{self.num_teachers} teachers, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.weight is not None}, track_running_stats={self.running_mean is not None}"
        )

"""BatchNorm of all teachers at once, with what follows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmerge.kernels.batch_norm import ACTIVATIONS, batch_norm_act_streams, why_not_fused
from fastmerge.wide.streams import GateStreams, split_streams


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


def _activated(y: Tensor, activation: str | None) -> Tensor:
    """In place where autograd finds the gradient from the result, or needs none; elsewhere that would cost a copy."""
    inplace = activation in ("relu", "relu6") or not (torch.is_grad_enabled() and y.requires_grad)
    return y if activation is None else ACTIVATIONS[activation](y, inplace=inplace)


class WideBatchNorm(nn.Module):
    """The teachers' BatchNorms as one of T·C channels, teacher by teacher.

    A joined tensor is normalised as a whole; so are streams, with the same parameters and statistics, where they run fused.

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
        readers: int = 1,
    ) -> tuple[Tensor, ...]:
        """Normalises T streams, or one joined tensor with its channels in dimension 1, and does what follows.

        Args:
            values: what to normalise.
            activation: a name as ``batch_norm_act`` takes it; None: a normalisation alone, which is never fused.
            residual: what to add before the activation, one tensor per value.
            pool: kernel size, stride and padding of a max-pooling after the activation.
            gates: the matrix of gates, or None for open gates.
            gate: which of its columns multiply the result; None for no gate.
            readers: how many times the results are handed out: 2 where two operations read them, neither of which changes
                them in place. The backward pass then adds up the gradients of both where it reads them.

        Returns:
            The results, one per value, and again for each further reader.
        """
        if len(values) == 1 and self.momentum is None:  # each teacher counts its own batches
            streams = split_streams(values[0], self.num_teachers, 1)
            residuals = None if residual is None else split_streams(residual[0], self.num_teachers, 1)
            outputs = self.forward(
                *streams, activation=activation, residual=residuals, pool=pool, gates=gates, gate=gate
            )
            return (torch.cat(outputs, dim=1),) * readers
        if activation is not None and self._runs_fused(values[0]):
            return self._fused(values, activation, residual, pool, gates, gate, readers)
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        factors = self._factors()
        plain = [
            self._plain(
                *(x, self._tensors(t, len(values)), factors[t], activation),
                *(None if residual is None else residual[t], pool),
            )
            for t, x in enumerate(values)
        ]
        return tuple(plain if gate is None else gate(gates, *plain)) * readers

    def _runs_fused(self, x: Tensor) -> bool:
        """On a CPU evaluation runs what the teachers run, to the same rounding."""
        if self.fused == "auto":
            return x.is_cuda or (self.training and x.device.type == "cpu" and why_not_fused(x) is None)
        return bool(self.fused)

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
        weight, bias, mean, var = tensors
        as_rows = _runs_as_rows(x)
        rows = x.permute(0, 2, 3, 1).flatten(0, 2) if as_rows else x
        y = F.batch_norm(rows, mean, var, weight, bias, self.training or mean is None, factor, self.eps)
        if residual is None:
            y = _activated(y, activation)
        if as_rows:
            y = y.unflatten(0, (x.shape[0], *x.shape[2:])).permute(0, 3, 1, 2)
        if residual is not None:
            y = _activated(y + residual, activation)
        return y if pool is None else F.max_pool2d(y, *pool)

    def _fused(
        self,
        values: Sequence[Tensor],
        activation: str,
        residual: Sequence[Tensor] | None,
        pool: tuple[Any, Any, Any] | None,
        gates: Tensor | None,
        gate: GateStreams | None,
        readers: int,
    ) -> tuple[Tensor, ...]:
        samples, columns = values[0].shape[0], None if gate is None else gates
        if columns is not None and columns.shape[0] not in (1, samples):
            columns = columns.repeat_interleave(samples // columns.shape[0], dim=0)
        tensors, counters, training = self._tensors(), self._buffers["num_batches_tracked"], self.training
        counted = training and counters is not None
        options: dict[str, Any] = {
            "training": training or tensors[2] is None,
            "eps": self.eps,
            "activation": activation,
            "pool": pool,
        }
        if self.momentum is not None or not counted:
            return batch_norm_act_streams(
                values,
                *tensors,
                momentum=self.momentum or 0.0,
                residuals=residual,
                gate=columns,
                num_batches_tracked=counters if counted else None,
                readers=readers,
                **options,
            )
        assert counters is not None
        counters.add_(1)
        outputs = [
            batch_norm_act_streams(
                (x,),
                *self._tensors(t, len(values)),
                momentum=factor,
                residuals=None if residual is None else (residual[t],),
                gate=None if columns is None else columns.chunk(len(values), 1)[t],
                **options,
            )[0]
            for t, (x, factor) in enumerate(zip(values, self._factors(), strict=True))
        ]
        return tuple(outputs) * readers

    def _tensors(self, stream: int = 0, count: int = 1) -> list[Tensor | None]:
        """Weight, bias, running mean and variance: of one of the streams, or of all together."""
        parameters, buffers = self._parameters, self._buffers  # as attributes, nn.Module looks them up in Python
        tensors = [parameters["weight"], parameters["bias"], buffers["running_mean"], buffers["running_var"]]
        return tensors if count == 1 else [t if t is None else t.chunk(count)[stream] for t in tensors]

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

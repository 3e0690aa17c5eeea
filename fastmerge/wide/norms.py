"""BatchNorm of all teachers at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmerge.wide.streams import split_streams

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class WideBatchNorm(nn.Module):
    """The teachers' BatchNorms as one of T·C channels, teacher by teacher.

    A joined tensor is normalised as a whole, streams one by one with views of the same parameters and statistics.

    Args:
        norms: T BatchNorms of ``torch.nn`` with the same options.

    Attributes:
        weight, bias: (T·C,), or None where they are not affine.
        running_mean, running_var: (T·C,), or None where they are not tracked.
        num_batches_tracked: (T,), or None.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(self, norms: Sequence[Any]) -> None:
        super().__init__()
        first = norms[0]
        self.num_teachers, self.num_features = len(norms), first.num_features
        self.eps, self.momentum = first.eps, first.momentum
        for name in ("weight", "bias"):
            tensors = [getattr(norm, name) for norm in norms]
            joined = None if tensors[0] is None else nn.Parameter(torch.cat([t.detach() for t in tensors]))
            self.register_parameter(name, joined)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            tensors = [getattr(norm, name) for norm in norms]
            self.register_buffer(
                name, None if tensors[0] is None else torch.cat([t.detach().reshape(-1) for t in tensors])
            )

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Normalises T streams, or one joined tensor with its channels in dimension 1."""
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        factors = self._factors()
        if len(values) == 1:
            if self.momentum is not None:
                return (self._normalise(values[0], self._tensors, factors[0]),)
            return (torch.cat(self.forward_streams(split_streams(values[0], self.num_teachers, 1), factors), dim=1),)
        return self.forward_streams(values, factors)

    def forward_streams(self, streams: Sequence[Tensor], factors: Sequence[float]) -> tuple[Tensor, ...]:
        """Normalises each stream with its part of the parameters and statistics."""
        parts = [[None] * self.num_teachers if x is None else x.chunk(self.num_teachers) for x in self._tensors]
        each = zip(streams, zip(*parts, strict=True), factors, strict=True)
        return tuple(self._normalise(x, tensors, factor) for x, tensors, factor in each)

    @property
    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.running_mean, self.running_var, self.weight, self.bias

    def _factors(self) -> list[float]:
        """How much of the batch enters the running statistics, per teacher: as much as of any before for momentum None."""
        if self.momentum is not None:
            return [self.momentum] * self.num_teachers
        if not self.training or self.num_batches_tracked is None:
            return [0.0] * self.num_teachers
        return [1 / count for count in self.num_batches_tracked.tolist()]

    def _normalise(self, x: Tensor, tensors: Sequence[Tensor | None], factor: float) -> Tensor:
        mean, var, weight, bias = tensors
        return F.batch_norm(x, mean, var, weight, bias, self.training or mean is None, factor, self.eps)

    def extra_repr(self) -> str:
        return (
            f"{self.num_teachers} x {self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.weight is not None}, track_running_stats={self.running_mean is not None}"
        )

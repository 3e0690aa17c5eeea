"""Grouped and depthwise convolutions of all teachers at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastmerge.channels.layer_calls import Geometry
from fastmerge.wide.convolve import convolve, convolve_streams
from fastmerge.wide.weights import Weight, own, whole_of


def is_depthwise(groups: int, shape: Sequence[int]) -> bool:
    """Whether each channel has a filter of its own and nothing else."""
    return groups == shape[0] and shape[1] == 1


class GroupedLayer(nn.Module):
    """The teachers' grouped convolutions as one of T times the groups, teacher by teacher.

    Args:
        geometry: how the weight is applied.
        groups: of one teacher.
        weights: the teachers' weights.
        biases: the teachers' biases, or None.
    """

    def __init__(
        self, geometry: Geometry, groups: int, weights: Sequence[Tensor], biases: Sequence[Tensor] | None
    ) -> None:
        super().__init__()
        self.geometry, self._groups, self.num_teachers = geometry, groups, len(weights)
        self.is_depthwise = is_depthwise(groups, weights[0].shape)
        self.weight = nn.Parameter(torch.cat(list(weights)))
        self.bias = None if biases is None else nn.Parameter(torch.cat(list(biases)))

    @property
    def groups(self) -> int:
        """Of one teacher: of a depthwise convolution as many as it has channels left."""
        return self.weight.shape[0] // self.num_teachers if self.is_depthwise else self._groups

    def forward(self, *values: Tensor, weight: Weight | None = None, bias: Weight | None = None) -> tuple[Tensor, ...]:
        """Applies the layer to T streams, each with its own weights, or to one joined tensor.

        Args:
            values: the streams, or the joined tensor.
            weight, bias: the layer's own as ``hand_out_weights`` gives them; None: as they are.
        """
        weight, bias = own(self, weight, bias)
        if len(values) == 1:
            groups = self.num_teachers * self.groups
            return (convolve(self.geometry, values[0], weight[0], whole_of(bias), groups),)
        return convolve_streams(self.geometry, values, weight, bias, self.groups)

    def extra_repr(self) -> str:
        return (
            f"{self.geometry.kind}, {self.num_teachers} x {tuple(self.weight.shape[1:])}, groups={self.groups}, "
            f"bias={self.bias is not None}"
        )

"""Layers of the big student: T teachers' layers side by side.

A value in the big student is either *shared* (one tensor: the network's input, its averaged output), T *streams*, one per
teacher, or *joined*: the streams in one tensor, teacher by teacher along its channels. A wide convolution or linear layer
reads and writes any kind with one weight:

* shared → streams: the teachers' weights stacked over the shared input, (T·out, in);
* streams → streams, unlinked: block-diagonal, only the blocks stored, (T·out, in); linked: dense, (T·out, T·in);
* streams → shared: side by side over the number of teachers, (out, T·in), so that the output is the teachers' mean;
* shared → shared: the mean.

(The two dimensions swap places for transposed convolutions.) A grouped convolution reads and writes streams or a joined tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmerge.channels.layer_calls import Geometry
from fastmerge.compaction import set_data
from fastmerge.kernels.block_conv import block_diagonal_conv2d, grouped_conv2d
from fastmerge.wide.streams import split_streams
from fastmerge.wide.weights import Weight, own, parts_of, whole_of

# Two-dimensional convolutions of several teachers, streams or groups of one tensor, run on a CUDA device by whatever was
# measured to be the fastest there for each pass (``fastmerge.kernels.block_conv``); all others are PyTorch's.
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}

# torch.compile can't ask what was measured. Of many groups, which the kernels are not made for, it gets PyTorch's own.
_MOST_GROUPS_COMPILED = 4


@dataclass(frozen=True)
class Wiring:
    """Which kinds of value a wide layer connects.

    Attributes:
        reads_streams: rather than a shared tensor.
        writes_streams: rather than their mean.
        always_dense: whether the off-diagonal weights are there from the start, where what a weight is computed from is zero
            off the diagonal but the weight is not.
    """

    reads_streams: bool
    writes_streams: bool
    always_dense: bool = False

    @property
    def has_off_diagonal(self) -> bool:
        """Whether there are off-diagonal weights to come."""
        return self.reads_streams and self.writes_streams and not self.always_dense


class WideLayer(nn.Module):
    """A convolution or linear layer of all teachers.

    Args:
        geometry: how the weight is applied.
        wiring: what it reads and writes.
        weights: the teachers' weights, one shape.
        biases: the teachers' biases, or None.
        keep_each_bias: whether an averaging layer remembers each teacher's bias, so that it can also give each teacher's
            own output (:meth:`each`).
    """

    bias_offset: Tensor | None

    def __init__(
        self,
        geometry: Geometry,
        wiring: Wiring,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor] | None,
        keep_each_bias: bool = False,
    ) -> None:
        super().__init__()
        self.geometry, self.wiring = geometry, wiring
        self.num_teachers = len(weights)
        self.linked = False
        self.in_channels = weights[0].shape[geometry.in_dim]
        if wiring.writes_streams:
            weight = torch.cat(list(weights), dim=0 if wiring.reads_streams else geometry.out_dim)
            if wiring.reads_streams and wiring.always_dense:
                weight = self.dense(weight)
            bias = torch.cat(list(biases)) if biases is not None else None
        else:
            if wiring.reads_streams:
                weight = torch.cat(list(weights), dim=geometry.in_dim) / self.num_teachers
            else:
                weight = torch.stack(list(weights)).mean(0)
            bias = torch.stack(list(biases)).mean(0) if biases is not None else None
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias) if bias is not None else None
        offset = (
            torch.stack(list(biases)) - bias if keep_each_bias and biases is not None and bias is not None else None
        )
        self.register_buffer("bias_offset", offset)

    def link(self) -> None:
        """From block-diagonal to dense, in place: the Parameter stays, its data gets the dense shape."""
        if self.wiring.has_off_diagonal and not self.linked:
            set_data(self.weight, self.dense(self.weight.data))
            self.linked = True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes a linked state into a block-diagonal layer, which it links, and a block-diagonal one into a linked layer."""
        key = f"{prefix}weight"
        given = state_dict.get(key)
        if given is not None and self.wiring.has_off_diagonal and given.shape != self.weight.shape:
            if not self.linked and given.numel() == self.weight.numel() * self.num_teachers:
                self.link()
            elif self.linked and given.numel() * self.num_teachers == self.weight.numel():
                state_dict = {**state_dict, key: self.dense(given)}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def dense(self, blocks: Tensor) -> Tensor:
        """A block-diagonal tensor (T·a, b, ...) with its zeros written out: (T·a, T·b, ...)."""
        rows, columns = blocks.shape[0] // self.num_teachers, blocks.shape[1]
        wide = blocks.new_zeros(blocks.shape[0], columns * self.num_teachers, *blocks.shape[2:])
        for t in range(self.num_teachers):
            wide[t * rows : (t + 1) * rows, t * columns : (t + 1) * columns] = blocks[t * rows : (t + 1) * rows]
        # what is contiguous in both layouts, as weights of one channel are, keeps PyTorch's own
        if blocks.dim() == 4 and not blocks.is_contiguous() and blocks.is_contiguous(memory_format=torch.channels_last):
            wide = wide.contiguous(memory_format=torch.channels_last)
        return wide

    def forward(
        self,
        values: Sequence[Tensor],
        join: bool = False,
        weight: Weight | None = None,
        bias: Weight | None = None,
    ) -> tuple[Tensor, ...]:
        """Applies the layer.

        Args:
            values: the T streams, one joined tensor, or one shared tensor.
            join: whether to write one joined tensor rather than T streams.
            weight, bias: the layer's own as ``hand_out_weights`` gives them; None: as they are.

        Returns:
            The T streams, or one joined or shared tensor, in a tuple.
        """
        if weight is not None and len(weight) > 1 and len(values) > 1 and not (join or self.linked):  # cut for streams
            return convolve_streams(self.geometry, values, weight, bias)
        weight, bias = own(self, weight, bias)
        if self.wiring.has_off_diagonal and not self.linked:
            return self._block_diagonal(values, weight, bias, join)
        dim = self.geometry.channel_dim
        if not self.wiring.reads_streams and self.wiring.writes_streams:
            streams = self._apart(values)
            if streams is not None:  # each teacher's own, where all run to their own outputs
                weights = weight[0].chunk(self.num_teachers, self.geometry.out_dim)
                biases = [None] * len(streams) if bias is None else whole_of(bias).chunk(self.num_teachers)  # type: ignore[union-attr]
                outputs = tuple(
                    convolve(self.geometry, x, w, b) for x, w, b in zip(streams, weights, biases, strict=True)
                )
                return (torch.cat(outputs, dim),) if join else outputs
        x = values[0] if len(values) == 1 else torch.cat(list(values), dim)
        out = convolve(self.geometry, x, weight[0], whole_of(bias))
        if join or not self.wiring.writes_streams:
            return (out,)
        return split_streams(out, self.num_teachers, dim)

    def _apart(self, values: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """The streams, if a layer that reads what all teachers share is given such."""
        if len(values) > 1:
            return values
        joined = values[0].shape[self.geometry.channel_dim] == self.num_teachers * self.in_channels
        return self._streams(values) if joined else None

    def each(self, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Each teacher's own output of an averaging layer; their mean is :meth:`forward`."""
        outputs = []
        for t, x in enumerate(self._streams(values)):
            weight = (
                self.weight.narrow(self.geometry.in_dim, t * self.in_channels, self.in_channels) * self.num_teachers
            )
            bias = self.bias if self.bias is None or self.bias_offset is None else self.bias + self.bias_offset[t]
            outputs.append(convolve(self.geometry, x, weight, bias))
        return tuple(outputs)

    def _block_diagonal(
        self, values: Sequence[Tensor], weight: Weight, bias: Weight | None, join: bool
    ) -> tuple[Tensor, ...]:
        if len(values) == 1 and join and self.geometry.spatial_dims:
            return (convolve(self.geometry, values[0], weight[0], whole_of(bias), self.num_teachers),)
        outputs = convolve_streams(self.geometry, self._streams(values), weight, bias)
        return (torch.cat(outputs, self.geometry.channel_dim),) if join else outputs

    def _streams(self, values: Sequence[Tensor]) -> Sequence[Tensor]:
        if len(values) > 1:
            return values
        return split_streams(values[0], self.num_teachers, self.geometry.channel_dim)

    def extra_repr(self) -> str:
        shape = list(self.weight.shape)
        if self.wiring.has_off_diagonal and not self.linked:
            shape[1] *= self.num_teachers  # of the blocks, which lie one under the other
        state = "" if not self.wiring.has_off_diagonal else ", linked" if self.linked else ", block-diagonal"
        return (
            f"{self.geometry.kind}, {shape[self.geometry.in_dim]} -> {shape[self.geometry.out_dim]} channels "
            f"of {self.num_teachers} teachers, {'streams' if self.wiring.reads_streams else 'shared'} -> "
            f"{'streams' if self.wiring.writes_streams else 'mean'}{state}, bias={self.bias is not None}"
        )


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


def convolve(geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
    """Applies a layer.

    Args:
        geometry: kind, stride, padding and so on.
        x: what it reads.
        weight: its weight.
        bias: its bias, or None.
        groups: of a convolution.
    """
    options = geometry.options
    few = groups <= _MOST_GROUPS_COMPILED or not torch.compiler.is_compiling()
    if groups > 1 and few and _runs_as_measured(geometry, x, weight):
        return grouped_conv2d(x, weight, bias, groups=groups, **options)
    if geometry.spatial_dims == 0:
        return F.linear(x, weight if geometry.kind == "linear" else weight.t(), bias)
    if geometry.kind == "conv":
        return _CONV[geometry.spatial_dims](x, weight, bias, groups=groups, **options)
    return _CONV_TRANSPOSE[geometry.spatial_dims](x, weight, bias, groups=groups, **options)


def convolve_streams(
    geometry: Geometry,
    streams: Sequence[Tensor],
    weight: Weight,
    bias: Weight | None,
    groups: int = 1,
) -> tuple[Tensor, ...]:
    """Applies a layer to T tensors, each with its own weights.

    Args:
        geometry: kind, stride, padding and so on.
        streams: T tensors of one shape.
        weight: the T weights, one under the other along dimension 0, and perhaps each; see ``weights.hand_out_weights``.
        bias: the T biases likewise, or None.
        groups: of each convolution.
    """
    weights, biases = parts_of(weight, len(streams)), None if bias is None else parts_of(bias, len(streams))
    if groups == 1 and _runs_as_measured(geometry, streams[0], weight[0]):
        parts = weights, biases
        return block_diagonal_conv2d(streams, weight[0], whole_of(bias), parts=parts, **geometry.options)
    each: Sequence[Tensor | None] = [None] * len(streams) if biases is None else biases
    return tuple(
        convolve(geometry, x, own_weight, own_bias, groups)
        for x, own_weight, own_bias in zip(streams, weights, each, strict=True)
    )


def _runs_as_measured(geometry: Geometry, x: Tensor, weight: Tensor) -> bool:
    """Whether a layer runs by whatever was measured to be the fastest: on a CUDA device, where a kernel could take it."""
    return x.is_cuda and x.dim() == 4 and _is_plain_conv2d(geometry, weight)


def _is_plain_conv2d(geometry: Geometry, weight: Tensor) -> bool:
    """Whether a layer is a two-dimensional convolution that pads both sides alike, with zeros."""
    if geometry.kind != "conv" or geometry.spatial_dims != 2:
        return False
    return geometry.options.get("padding") != "same" or all(size % 2 == 1 for size in weight.shape[2:])

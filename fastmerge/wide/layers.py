"""Layers of the big student: T teachers' layers side by side.

A value in the big student is either *shared* (one tensor: the network's input, its averaged output) or T *streams*, one per
teacher. A wide convolution or linear layer reads and writes either kind with one weight:

* shared → streams: the teachers' weights stacked over the shared input, (T·out, in);
* streams → streams, unlinked: block-diagonal, only the blocks stored, (T·out, in); linked: dense, (T·out, T·in);
* streams → shared: side by side over the number of teachers, (out, T·in), so that the output is the teachers' mean;
* shared → shared: the mean.

(The two dimensions swap places for transposed convolutions.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmerge.channels.layer_calls import Geometry

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True)
class Wiring:
    """Which kinds of value a wide layer connects."""

    reads_streams: bool
    writes_streams: bool

    @property
    def has_off_diagonal(self) -> bool:
        return self.reads_streams and self.writes_streams


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
        self.out_channels = weights[0].shape[geometry.out_dim]
        self.in_channels = weights[0].shape[geometry.in_dim]
        if wiring.writes_streams:
            weight = torch.cat(list(weights), dim=0 if wiring.reads_streams else geometry.out_dim)
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
            self.weight.data = self.dense(self.weight.data)
            self.weight.grad = None
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
        if blocks.dim() == 4 and blocks.is_contiguous(memory_format=torch.channels_last):
            wide = wide.contiguous(memory_format=torch.channels_last)
        return wide

    def forward(self, streams: Sequence[Tensor], output_size: Any = None) -> tuple[Tensor, ...]:
        """Applies the layer.

        Args:
            streams: the T streams, or one shared tensor.
            output_size: of a transposed convolution called with it.

        Returns:
            The T streams, or one shared tensor, in a tuple.
        """
        if self.wiring.has_off_diagonal and not self.linked:
            return self._block_diagonal(streams, output_size)
        x = streams[0] if len(streams) == 1 else torch.cat(list(streams), dim=self.geometry.channel_dim)
        out = self._compute(x, self.weight, self.bias, output_size)
        if not self.wiring.writes_streams:
            return (out,)
        # unsafe: as tensors of their own to autograd, so that a ReLU in place on one stream leaves the others' versions alone
        return tuple(torch.unsafe_split(out, self.out_channels, dim=self.geometry.channel_dim))

    def each(self, streams: Sequence[Tensor], output_size: Any = None) -> tuple[Tensor, ...]:
        """Each teacher's own output of an averaging layer; their mean is :meth:`forward`."""
        outputs = []
        for t, x in enumerate(streams):
            weight = (
                self.weight.narrow(self.geometry.in_dim, t * self.in_channels, self.in_channels) * self.num_teachers
            )
            bias = self.bias if self.bias is None or self.bias_offset is None else self.bias + self.bias_offset[t]
            outputs.append(self._compute(x, weight, bias, output_size))
        return tuple(outputs)

    def _block_diagonal(self, streams: Sequence[Tensor], output_size: Any) -> tuple[Tensor, ...]:
        rows = self.weight.shape[0] // self.num_teachers
        outputs = []
        for t, x in enumerate(streams):
            bias = None if self.bias is None else self.bias.narrow(0, t * self.out_channels, self.out_channels)
            outputs.append(self._compute(x, self.weight.narrow(0, t * rows, rows), bias, output_size))
        return tuple(outputs)

    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: Any) -> Tensor:
        geometry, options = self.geometry, dict(self.geometry.options)
        if geometry.kind == "linear":
            return F.linear(x, weight, bias)
        if geometry.kind == "conv":
            if geometry.padding_mode != "zeros":
                x = F.pad(x, geometry.pad, mode=geometry.padding_mode)
                options["padding"] = 0
            return _CONV[geometry.spatial_dims](x, weight, bias, **options)
        if output_size is not None:
            options["output_padding"] = self._output_padding(x, output_size)
        return _CONV_TRANSPOSE[geometry.spatial_dims](x, weight, bias, **options)

    def _output_padding(self, x: Tensor, output_size: Sequence[int]) -> list[int]:
        options, n = self.geometry.options, self.geometry.spatial_dims
        smallest = [
            (x.shape[2 + d] - 1) * options["stride"][d]
            - 2 * options["padding"][d]
            + options["dilation"][d] * (self.geometry.kernel_size[d] - 1)
            + 1
            for d in range(n)
        ]
        return [int(size) - low for size, low in zip(list(output_size)[-n:], smallest, strict=True)]

    def extra_repr(self) -> str:
        state = "" if not self.wiring.has_off_diagonal else ", linked" if self.linked else ", block-diagonal"
        return (
            f"{self.geometry.kind}, {self.num_teachers} x ({self.in_channels} -> {self.out_channels}), "
            f"{'streams' if self.wiring.reads_streams else 'shared'} -> "
            f"{'streams' if self.wiring.writes_streams else 'mean'}{state}, bias={self.bias is not None}"
        )


class StreamTensors(nn.Module):
    """One parameter or buffer of each teacher, for code that uses it outside a layer, such as a per-channel scale."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        for t, tensor in enumerate(tensors):
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(self.attribute(t), nn.Parameter(tensor.detach().clone(), tensor.requires_grad))
            else:
                self.register_buffer(self.attribute(t), tensor.detach().clone())

    @staticmethod
    def attribute(teacher: int) -> str:
        """The name of one teacher's tensor."""
        return f"teacher{teacher}"


class GateStreams(nn.Module):
    """Multiplies the channels that a layer is about to read by their gates.

    Args:
        index: int64 (T, channels), the column of the gate matrix for each stream's channels; one past the last gate where
            a channel has none.
        channel_dim: where the channels lie in the streams.
        sample_dim: where the samples lie.
    """

    index: Tensor

    def __init__(self, index: Tensor, channel_dim: int, sample_dim: int = 0) -> None:
        super().__init__()
        self.register_buffer("index", index, persistent=False)
        self.channel_dim, self.sample_dim = channel_dim, sample_dim
        steps = torch.arange(index.shape[1])
        whole = bool((index == index[:, :1] + steps).all())
        self.starts = tuple(index[:, 0].tolist()) if whole else None

    def forward(self, gates: Tensor | None, *streams: Tensor) -> tuple[Tensor, ...]:
        """Gates each stream.

        Args:
            gates: (N or 1, all gates and a last column of ones), or None for open gates.
            streams: T tensors with N·k samples; the k parts of one sample, side by side, share its gates.
        """
        if gates is None:
            return streams
        gated = []
        for t, x in enumerate(streams):
            if self.starts is not None:
                gate = gates.narrow(1, self.starts[t], self.index.shape[1])
            else:
                gate = gates.index_select(1, self.index[t])
            samples, channel_dim = x.shape[self.sample_dim], self.channel_dim % x.dim()
            if gate.shape[0] != 1 and gate.shape[0] != samples:
                gate = gate.repeat_interleave(samples // gate.shape[0], dim=0)
            shape = [1] * x.dim()
            shape[self.sample_dim], shape[channel_dim] = gate.shape
            gate = gate.to(x.dtype)
            gated.append(x * (gate if self.sample_dim < channel_dim else gate.t()).reshape(shape))
        return tuple(gated)

    def extra_repr(self) -> str:
        return f"{self.index.shape[0]} x {self.index.shape[1]} channels"

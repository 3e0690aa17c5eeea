"""Values of T teachers, side by side: separate streams, or joined in one tensor, teacher by teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmerge.kernels.batch_norm import joined_of
from fastmerge.kernels.direct import apply, runs_direct


def split_streams(joined: Tensor, num_teachers: int, dim: int) -> tuple[Tensor, ...]:
    """The T streams of a joined tensor, without a copy.

    To autograd they are tensors of their own, so that a ReLU in place on one leaves the others' versions alone.
    """
    if joined.requires_grad and runs_direct(joined):
        streams: tuple[Tensor, ...] = apply(_Split, joined, num_teachers, dim)
        return streams
    return tuple(torch.unsafe_split(joined, joined.shape[dim] // num_teachers, dim))


class _Split(torch.autograd.Function):
    """Takes a joined tensor apart. Gradients that were written into one tensor go back as that tensor, without a copy."""

    @staticmethod
    def forward(ctx: Any, joined: Tensor, num_teachers: int, dim: int) -> tuple[Tensor, ...]:
        ctx.dim = dim
        return tuple(torch.unsafe_split(joined, joined.shape[dim] // num_teachers, dim))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        whole = None if torch.is_grad_enabled() else joined_of(gradients, ctx.dim)
        return torch.cat(gradients, ctx.dim) if whole is None else whole, None, None


def concatenate_joined(tensors: Sequence[Tensor], num_teachers: int, dim: int) -> Tensor:
    """Concatenates joined tensors along their channels, each teacher's together, with one copy."""
    parts = [torch.split(tensor, tensor.shape[dim] // num_teachers, dim) for tensor in tensors]
    return torch.cat([part[t] for t in range(num_teachers) for part in parts], dim)


def mean_of_streams(*values: Any) -> Any:
    """The teachers' mean of a tensor; of class numbers and flags, what most of them give, the least of several.

    Anything else (a size) is the same for all.
    """
    if not isinstance(values[0], Tensor):
        return values[0]
    if not (values[0].is_floating_point() or values[0].is_complex()):
        return torch.stack([value.long() for value in values]).mode(0).values.to(values[0].dtype)
    return sum(values[1:], values[0]) / len(values)


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


class AveragedTensor(nn.Module):
    """A parameter or buffer that acts on the network's output, such as a temperature: the teachers' mean.

    Args:
        tensors: the teachers'.
        keep_each: whether it remembers each teacher's, so that it can also give that.
    """

    offset: Tensor | None

    def __init__(self, tensors: Sequence[Tensor], keep_each: bool) -> None:
        super().__init__()
        mean = torch.stack([tensor.detach() for tensor in tensors]).mean(0)
        if isinstance(tensors[0], nn.Parameter):
            self.mean = nn.Parameter(mean)
        else:
            self.register_buffer("mean", mean)
        offset = torch.stack([tensor.detach() - mean for tensor in tensors]) if keep_each else None
        self.register_buffer("offset", offset)

    def forward(self, teacher: int) -> Tensor:
        """One teacher's own; their mean is ``mean``."""
        return self.mean if self.offset is None else self.mean + self.offset[teacher]


class GateStreams(nn.Module):
    """Multiplies the channels that a layer is about to read by their gates.

    Args:
        index: per stream int64 (channels,), the column of the gate matrix for each of its channels; one past the last gate
            where a channel has none.
        channel_dim: where the channels lie in the streams.
        samples_are_fast: whether, where k positions of each sample lie in one dimension, neighbours are of different samples.
        sample_dim: where the samples lie; None for what is computed once for a batch, with the gates of its first sample.
    """

    index: Tensor

    def __init__(
        self, index: Sequence[Tensor], channel_dim: int, sample_dim: int | None = 0, samples_are_fast: bool = False
    ) -> None:
        super().__init__()
        self.register_buffer("index", torch.cat(list(index)), persistent=False)
        self.sizes = [len(row) for row in index]
        self.channel_dim, self.sample_dim, self.samples_are_fast = channel_dim, sample_dim, samples_are_fast
        self.start = _start_of_run(self.index)

    def forward(self, gates: Tensor | None, *values: Tensor) -> tuple[Tensor, ...]:
        """Gates each value.

        Args:
            gates: (N or 1, channels of all streams), from ``gates.hand_out_gates``, or None for open gates.
            values: T streams or one joined tensor, with N·k samples; the k parts of one sample, side by side, share its
                gates.
        """
        if gates is None:
            return values
        gated = []
        for gate, x in zip(self.columns(gates, joined=len(values) == 1), values, strict=True):
            gated.append(x * self.shaped(gate, x))
        return tuple(gated)

    def shaped(self, gate: Tensor, x: Tensor) -> Tensor:
        """The gates (N or 1, channels) of a stream as a tensor that broadcasts to it, of its dtype."""
        channel_dim, shape = self.channel_dim % x.dim(), [1] * x.dim()
        if self.sample_dim is None:
            shape[channel_dim] = gate.shape[1]
            return gate[0].to(x.dtype).reshape(shape)
        samples = x.shape[self.sample_dim]
        if gate.shape[0] != 1 and gate.shape[0] != samples:
            k = samples // gate.shape[0]
            gate = gate.repeat(k, 1) if self.samples_are_fast else gate.repeat_interleave(k, dim=0)
        shape[self.sample_dim], shape[channel_dim] = gate.shape
        gate = gate.to(x.dtype)
        return (gate if self.sample_dim < channel_dim else gate.t()).reshape(shape)

    def columns(self, gates: Tensor, joined: bool) -> Sequence[Tensor]:
        """The gates of each stream's channels, or of all side by side: (N or 1, channels) each, views."""
        return [gates] if joined else gates.split(self.sizes, 1)

    def extra_repr(self) -> str:
        return f"{' + '.join(map(str, self.sizes))} channels"


def _start_of_run(index: Tensor) -> int | None:
    """The first of indices that follow one another, or None where they don't."""
    start = int(index[0]) if len(index) else 0
    return start if torch.equal(index, torch.arange(start, start + len(index), device=index.device)) else None

"""What the gates weigh in T streams: layer normalisation, one value for many channels, a last layer that an embedding shares.

With open gates a normalisation is each teacher's own; with the gates of as many channels as one teacher has at 1 and the others
at 0, it is the student's. In between, as gates close, each stream's statistics come more and more from the others' channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmerge.wide.streams import GateStreams


def gated_layer_norm(
    gates: Tensor | None,
    streams: Sequence[Tensor],
    weights: Sequence[Tensor] | None,
    biases: Sequence[Tensor] | None,
    size: int,
    kept: float,
    eps: float | None,
    centred: bool,
    *,
    gate: GateStreams,
) -> tuple[Tensor, ...]:
    """Normalises T streams over their last dimension.

    Teacher t's mean and variance are over all streams' channels, a channel of stream s weighted by its gate g times ``a_ts``:
    1 for s = t, else ``c = clamp((1 − ḡ) / (1 − k/(T·n)), 0, 1)``, where ḡ is the mean gate of all T·n channels, and k is how
    many the student has, or n if that is more.

    Args:
        gates: (N or 1, all streams' channels), or None for open gates.
        streams: T tensors (N, ..., channels).
        weights: the teachers' scales (channels,), or None.
        biases: likewise.
        size: T·n, the channels of all teachers before any was dropped, which count as closed.
        kept: k.
        eps: None: the machine precision of the dtype that is computed in, as in ``nn.RMSNorm``.
        centred: whether the mean is taken off: False for RMSNorm.
        gate: the module that knows which gate belongs to which channel.

    Returns:
        T streams, without their gates.
    """
    count = len(streams)
    scales = [None] * count if weights is None else weights
    shifts = [None] * count if biases is None else biases
    if gates is None:
        plain = (
            F.layer_norm(x, x.shape[-1:], eps=eps or 0.0) if centred else F.rms_norm(x, x.shape[-1:], eps=eps)
            for x in streams
        )
        return tuple(_affine(y, *parameters) for y, *parameters in zip(plain, scales, shifts, strict=True))
    columns = gate.columns(gates, joined=False)
    dtype = torch.promote_types(streams[0].dtype, torch.float32)
    eps = torch.finfo(dtype).eps if eps is None else eps
    x = [stream.to(dtype) for stream in streams]
    g = [gate.shaped(own, stream) for own, stream in zip(columns, x, strict=True)]
    totals = [own.sum(-1, keepdim=True) for own in g]
    coupling = coupling_of(torch.stack(totals).sum(0), size, kept)
    safe = [total.clamp_min(_LEAST) for total in totals]
    means = [(own * v).sum(-1, keepdim=True) / total for own, v, total in zip(g, x, safe, strict=True)]
    if not centred:
        means = [torch.zeros_like(mean) for mean in means]
    spreads = [(own * (v - m).square()).sum(-1, keepdim=True) for own, v, m in zip(g, x, means, strict=True)]
    outputs = []
    for t in range(count):
        shares = [1 if s == t else coupling for s in range(count)]
        total = torch.stack([share * own for share, own in zip(shares, totals, strict=True)]).sum(0).clamp_min(_LEAST)
        mean = sum(share * own * m for share, own, m in zip(shares, totals, means, strict=True)) / total
        within = sum(share * spread for share, spread in zip(shares, spreads, strict=True))
        between = sum(share * own * (m - mean).square() for share, own, m in zip(shares, totals, means, strict=True))
        y = (x[t] - mean) * ((within + between) / total + eps).rsqrt()
        outputs.append(_affine(y.to(streams[t].dtype), scales[t], shifts[t]))
    return tuple(outputs)


def tied_linear(
    gates: Tensor | None, streams: Sequence[Tensor], weights: Sequence[Tensor], size: int, *, gate: GateStreams
) -> Tensor:
    """The last layer of all teachers by the weights of their embeddings: ``Σ W_t x_t / (T ḡ)``, ḡ the mean gate.

    With open gates it is the teachers' mean; with n of T·n channels kept it is the sum over them, as the student's.

    Args:
        gates: (N or 1, all streams' channels), or None for open gates.
        streams: T tensors (N, ..., channels), gated.
        weights: the embeddings' (words, channels).
        size: T·n, the channels of all teachers before any was dropped, which count as closed.
        gate: the module that knows which gate belongs to which channel.
    """
    outputs = [F.linear(x, weight) for x, weight in zip(streams, weights, strict=True)]
    total = sum(outputs[1:], outputs[0])
    if gates is None:
        return total / len(streams)
    scale = len(streams) * (gates.sum(1, keepdim=True) / size).clamp_min(1 / size)
    return total / gate.shaped(scale, total)


def gated_scalars(
    gates: Tensor | None, scalars: Sequence[Tensor], size: int, kept: float, *, gate: GateStreams
) -> tuple[Tensor, ...]:
    """One value for all channels, such as the slope of a PReLU: each teacher's own with open gates, else more and more one.

    Teacher t's is the mean of all teachers', that of s weighted by the sum of the gates of its channels times ``a_ts`` as in
    :func:`gated_layer_norm`. With k of T·n channels kept it is the mean by how many are kept of each teacher, the
    student's. One value serves a whole batch, so the gates are the means over its samples.

    Args:
        gates: (N or 1, all streams' channels), or None for open gates.
        scalars: T tensors of one element.
        size: T·n, the channels of all teachers before any was dropped, which count as closed.
        kept: k.
        gate: the module that knows which gate belongs to which channel.

    Returns:
        T tensors like the scalars.
    """
    if gates is None:
        return tuple(scalars)
    values = torch.stack(list(scalars))
    totals = torch.stack([own.mean(0).sum() for own in gate.columns(gates, joined=False)])
    own = torch.eye(len(scalars), dtype=totals.dtype, device=totals.device)
    weights = totals * (own + coupling_of(totals.sum(), size, kept) * (1 - own))
    shares = weights / weights.sum(1, keepdim=True).clamp_min(_LEAST)
    return (shares.to(values.dtype) @ values.flatten()).view_as(values).unbind()


def coupling_of(total: Tensor, size: int, kept: float) -> Tensor:
    """How much of other teachers' channels a teacher sees: 0 with open gates, 1 where only as many are open as are kept.

    Args:
        total: the sum of the gates.
        size: of how many channels, those dropped included.
        kept: how many are open in the student, below ``size``.
    """
    return ((1 - total / size) / (1 - kept / size)).clamp(0, 1)


_LEAST = 1e-6  # of gates that are all closed, whose channels nobody reads


def _affine(y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    y = y if scale is None else y * scale
    return y if shift is None else y + shift

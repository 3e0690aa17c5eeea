"""Weights that are computed row by row, over the columns of all teachers, with statistics weighted by the gates.

With open gates a row's statistics are those over its own teacher's columns, and columns of other teachers count nothing; with
the gates of as many columns as one teacher has at 1 and the others at 0, they are the student's, over the columns that are
kept. Gates of a batch count by their mean, so that there is one weight for all samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmerge.wide.layer_norm import coupling_of
from fastmerge.wide.streams import GateStreams


def column_weights(
    gates: Tensor | None, rows: Sequence[int], size: int, like: Tensor, *, gate: GateStreams
) -> tuple[Tensor, Tensor]:
    """How much each column counts in the statistics of each row, and in the layer: two tensors (rows, columns).

    A column with gate g counts g in rows of its own teacher and c·g in others' rows, ``c = clamp((1 − ḡ) / (1 − 1/T), 0, 1)``,
    where ḡ is the mean gate of all T·n columns. What other teachers' columns contribute to the layer is scaled by c, too.

    Args:
        gates: (N or 1, all streams' columns), or None for open gates.
        rows: per teacher how many.
        size: T·n, the columns of all teachers before any was dropped, which count as closed.
        like: a tensor of the dtype and on the device of the result.
        gate: the module that knows which gate belongs to which column.
    """
    count, sizes = len(rows), gate.sizes
    g = like.new_ones(sum(sizes)) if gates is None else gates.mean(0).to(like.dtype)
    coupling = coupling_of(g.sum(), size, size / count)
    own, shares = [], []
    for t in range(count):
        share = torch.cat(
            [torch.ones_like(part) * (1 if s == t else coupling) for s, part in enumerate(g.split(sizes))]
        )
        shares.append(share.expand(rows[t], -1))
        own.append((share * g).expand(rows[t], -1))
    return torch.cat(own), torch.cat(shares)


def spread(weights: Tensor, lengths: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Weights of columns as a tensor that lies like a value.

    Args:
        weights: (rows, columns).
        lengths: of the axes of the parameter, 1 for those that the value does not have.
        shape: of the value.
    """
    return weights.view(*weights.shape, *[1] * (len(lengths) - 2)).expand(tuple(lengths)).reshape(tuple(shape))


def weighted_reduction(
    name: str, x: Tensor, weights: Tensor, dims: Sequence[int], keepdim: bool, correction: float = 0
) -> Tensor | tuple[Tensor, Tensor]:
    """A reduction of ATen's in which each element counts by a weight.

    Args:
        name: "mean", "sum", "var", "std", "var_mean", "std_mean", or that of a norm.
        x: what to reduce.
        weights: of its shape.
        dims: along which.
        keepdim: whether they stay, of length 1.
        correction: of a variance.
    """
    dims = list(dims)
    if name == "sum":
        return (weights * x).sum(dims, keepdim)
    if name in ("linalg_vector_norm", "norm"):
        return (weights * x.square()).sum(dims, keepdim).sqrt()
    total = weights.sum(dims, keepdim=True)
    mean = (weights * x).sum(dims, keepdim=True) / total
    whole = mean if keepdim else mean.squeeze(dims)
    if name == "mean":
        return whole
    var = (weights * (x - mean).square()).sum(dims, keepdim=True) / (total - correction)
    var = var if keepdim else var.squeeze(dims)
    var = var.sqrt() if name.startswith("std") else var
    return (var, whole) if name.endswith("mean") else var


def weighted_norm(
    x: Tensor, weights: Tensor, dims: Sequence[int], scale: Tensor | None, shift: Tensor | None, eps: float
) -> Tensor:
    """``(x − mean) / √(var + eps) · scale + shift`` over some dimensions, each element counting by a weight.

    Args:
        x: what to normalise.
        weights: of its shape.
        dims: of the statistics.
        scale, shift: of dimension 1, or None.
        eps: see above.
    """
    var, mean = weighted_reduction("var_mean", x, weights, dims, keepdim=True)
    y = (x - mean) * (var + eps).rsqrt()
    shape = [-1 if d == 1 else 1 for d in range(x.dim())]
    y = y if scale is None else y * scale.view(shape)
    return y if shift is None else y + shift.view(shape)


def joined_weight(weight: Tensor, shares: Tensor) -> Tensor:
    """A computed weight, columns of other teachers scaled by how much they count."""
    return weight * shares.view(*shares.shape, *[1] * (weight.dim() - 2))

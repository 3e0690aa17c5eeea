"""BatchNorm + residual + activation + gate on a CPU, through the C++ extension (csrc/batch_norm.h).

It takes tensors whose channels lie side by side and whose positions follow one another at one distance: channels-last images,
slices of the channels of such, and matrices. All streams go through in one call each way.

Dims: N batch, C channels, P positions of a sample, T streams.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from fastmerge.kernels.batch_norm.formulas import (
    ACTIVATIONS,
    Norm,
    distance_of,
    empty_in_layout,
    empty_streams,
    room_like,
)
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
# Below, threads cost more than they save: elements of a tensor.
_WORTH_THREADS = 1 << 15
_NONE: tuple[list[int], int] = ([], 0)

_batch_norm: Any = None
with contextlib.suppress(ImportError):
    from fastmerge import _batch_norm
if getattr(_batch_norm, "ACTIVATIONS", None) != tuple(ACTIVATIONS):  # built from an older source
    _batch_norm = None


def why_not(x: Tensor) -> str | None:
    """Why a tensor on a CPU can't go through the extension, or None if it can."""
    if _batch_norm is None:
        return "the C++ extension is not built"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}"
    if x.dim() < 2 or _row_stride(x.shape, x.stride()) is None:
        return "the channels of x don't lie side by side"
    return None


def forward(
    norm: Norm, running: tuple[Tensor | None, Tensor | None], momentum: float, training: bool
) -> tuple[list[Tensor], Norm]:
    """The results; in training after the statistics of ``x``, which update the running ones.

    Args:
        norm: in training its mean and variance are to be found.
        running: mean and variance.
        momentum: weight of the new statistics in the running ones.
        training: whether to find statistics.

    Returns:
        The T results, and ``norm`` with the statistics that they were computed with.
    """
    x = norm.x[0]
    norm = norm._replace(x=_all_in_rows(norm.x, x))
    size, shape = len(norm.x) * x.shape[1], _shape(x)
    y, residual, gate = empty_streams(norm.x), _all_in_rows(norm.residual, x), _gates(norm.gate)
    written = [_vector(t) for t in running] if training else [None, None]
    if training:
        norm = norm._replace(mean=_room(size), var=_room(size))
    weight, bias, mean, var = (_vector(t) for t in norm[1:5])
    _batch_norm.forward(
        shape,
        x.dtype == torch.bfloat16,
        _rows(norm.x),
        training,
        *(_address(t) for t in (mean, var, *written)),
        momentum,
        *(_address(t) for t in (weight, bias)),
        norm.eps,
        _rows(residual),
        _gate_rows(gate),
        norm.activation,
        _rows(y),
        _threads(x),
    )
    if training:
        for ours, theirs in zip(written, running, strict=True):
            if theirs is not None and ours is not None:
                if ours.data_ptr() == theirs.data_ptr():
                    torch.autograd.graph.increment_version(theirs)
                else:
                    theirs.copy_(ours)
    return y, norm


def gradients(
    dy: Sequence[Tensor], more: Sequence[Tensor] | None, norm: Norm, training: bool, needs: Sequence[bool]
) -> tuple[Any, ...]:
    """Gradients of x, weight, bias, residual and gate, as many as are needed; arguments as those in ``backward_triton``."""
    x, residual, gate = norm.x[0], _all_in_rows(norm.residual, norm.x[0]), _gates(norm.gate)
    dy, more = _all_in_rows(dy, x), _all_in_rows(more, x)
    weight, bias, mean, var = (_vector(t) for t in norm[1:5])
    changed = norm.activates or gate is not None or more is not None
    dx = room_like(norm.x[0], len(norm.x), distance_of(norm.x)).empty(norm.x[0].device) if needs[0] else None
    dresidual = empty_streams(norm.x) if needs[3] and changed else None
    size = len(norm.x) * x.shape[1]
    dweight, dbias = (_room(size) if need else None for need in needs[1:3])
    dgate = _room(gate.shape) if gate is not None and needs[4] else None
    _batch_norm.backward(
        _shape(x),
        x.dtype == torch.bfloat16,
        _rows(dy),
        _rows(more),
        _rows(norm.x),
        *(_address(t) for t in (mean, var, weight, bias)),
        norm.eps,
        _rows(residual),
        _gate_rows(gate),
        norm.activation,
        training,
        _rows(dx),
        _rows(dresidual),
        *(_address(t) for t in (dweight, dbias)),
        _gate_rows(dgate),
        _threads(x),
    )
    if needs[3] and not changed:
        dresidual = dy
    found = [
        None if g is None or t is None else g.to(t.dtype)
        for g, t in ((dweight, norm.weight), (dbias, norm.bias), (dgate, norm.gate))
    ]
    return dx, found[0], found[1], dresidual, found[2]


def _room(size: int | Sequence[int]) -> Tensor:
    """What the extension writes floats to, whatever PyTorch's default dtype and device are."""
    return torch.empty(size, dtype=torch.float32, device="cpu")


def _shape(x: Tensor) -> tuple[int, int, int]:
    """N, P and C."""
    shape = x.shape
    return shape[0], math.prod(shape[2:]), shape[1]


@functools.lru_cache(maxsize=4096)
def _row_stride(shape: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """Elements from a position to the next, from the last of a sample to the first of the next too; None if they vary."""
    if strides[1] != 1 and shape[1] != 1:
        return None
    stride, rows = None, 1
    for dim in (*range(len(shape) - 1, 1, -1), 0):
        if shape[dim] == 1:
            continue
        if stride is None:
            stride = strides[dim]
        elif strides[dim] != rows * stride:
            return None
        rows *= shape[dim]
    if stride is None:
        return shape[1]
    return stride if stride >= shape[1] else None


def _all_in_rows(tensors: Sequence[Tensor] | None, x: Tensor) -> Sequence[Tensor] | None:
    """Tensors in the dtype of x whose rows are one distance apart, copied where they aren't."""
    if tensors is None:
        return None
    strides = tensors[0].stride()
    if _row_stride(tensors[0].shape, strides) is not None and all(
        t.dtype == x.dtype and t.stride() == strides for t in tensors
    ):
        return tensors
    return [empty_in_layout(x).copy_(tensor) for tensor in tensors]


def _rows(tensors: Sequence[Tensor] | None) -> tuple[list[int], int]:
    """Addresses of streams, and elements from row to row."""
    if tensors is None:
        return _NONE
    stride = _row_stride(tensors[0].shape, tensors[0].stride())
    assert stride is not None
    return [t.data_ptr() for t in tensors], stride


def _vector(tensor: Tensor | None) -> Tensor | None:
    """Dense float32."""
    if tensor is None or (tensor.dtype == torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.detach().float().contiguous()


def _gates(gate: Tensor | None) -> Tensor | None:
    """Rows of float32, channels side by side."""
    if gate is None or (
        gate.dtype == torch.float32 and gate.stride(1) == 1 and (gate.shape[0] == 1 or gate.stride(0) >= gate.shape[1])
    ):
        return gate
    return gate.detach().float().contiguous()


def _gate_rows(gate: Tensor | None) -> tuple[int, int]:
    if gate is None:
        return 0, 0
    return gate.data_ptr(), gate.stride(0) if gate.shape[0] > 1 else 0


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() >= _WORTH_THREADS else 1

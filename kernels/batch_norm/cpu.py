"""BatchNorm + residual + activation + gate on a CPU, through the C++ extension (csrc/batch_norm.h).

It takes tensors whose channels lie side by side and whose positions follow one another at one distance: channels-last images,
slices of the channels of such, and matrices. The functions have the arguments of those in ``forward_triton`` and
``backward_triton``.

Dims: N batch, C channels, P positions of a sample.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from fastmerge.kernels.batch_norm.formulas import empty_in_layout
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
# Below, threads cost more than they save: elements of a tensor.
_WORTH_THREADS = 1 << 15
_NONE = (0, 0)

_batch_norm: Any = None
with contextlib.suppress(ImportError):
    from fastmerge import _batch_norm


def why_not(x: Tensor) -> str | None:
    """Why a tensor on a CPU can't go through the extension, or None if it can."""
    if _batch_norm is None:
        return "the C++ extension is not built"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}"
    if x.dim() < 2 or _row_stride(x) is None:
        return "the channels of x don't lie side by side"
    return None


def statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel; updates the running statistics."""
    mean, var = torch.empty(2, x.shape[1], dtype=torch.float32)
    shape = _shape(x)
    _batch_norm.statistics(shape, _is_bfloat16(x), _rows(x), mean.data_ptr(), var.data_ptr(), _threads(x))
    count = shape[0] * shape[1]
    if running_mean is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    if running_var is not None:
        running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    return mean, var


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor:
    """The result, from the statistics."""
    y = empty_in_layout(x)
    vectors = [_vector(t) for t in (mean, var, weight, bias)]
    residual, gate = _in_rows(residual, x), _gates(gate)
    _batch_norm.normalize(
        _shape(x),
        _is_bfloat16(x),
        _rows(x),
        *map(_address, vectors),
        eps,
        _rows(residual),
        _gate_rows(gate),
        activation == "relu",
        _rows(y),
        _threads(x),
    )
    return y


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    training: bool,
    eps: float,
    activation: str,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias, residual and gate, as many as are needed; that of the residual may be ``dy`` itself."""
    relu = activation == "relu"
    dy = _in_rows(dy, x)
    vectors = [_vector(t) for t in (mean, var, weight, bias)]
    rows_of_residual, rows_of_gates = _in_rows(residual, x), _gates(gate)
    changed = relu or gate is not None
    dx = empty_in_layout(x) if needs[0] else None
    dresidual = empty_in_layout(x) if needs[3] and changed else None
    dweight, dbias = (x.new_empty(x.shape[1], dtype=torch.float32) if need else None for need in needs[1:3])
    dgate = None if rows_of_gates is None or not needs[4] else rows_of_gates.new_empty(rows_of_gates.shape)
    _batch_norm.backward(
        _shape(x),
        _is_bfloat16(x),
        _rows(dy),
        _rows(x),
        *map(_address, vectors),
        eps,
        _rows(rows_of_residual),
        _gate_rows(rows_of_gates),
        relu,
        training,
        _rows(dx),
        _rows(dresidual),
        *map(_address, (dweight, dbias, dgate)),
        _threads(x),
    )
    if needs[3] and not changed:
        dresidual = dy
    return (
        dx,
        None if dweight is None or weight is None else dweight.to(weight.dtype),
        None if dbias is None or bias is None else dbias.to(bias.dtype),
        dresidual,
        None if dgate is None or gate is None else dgate.to(gate.dtype),
    )


def _shape(x: Tensor) -> tuple[int, int, int]:
    """N, P and C."""
    samples, channels = x.shape[:2]
    return samples, x.numel() // max(1, samples * channels), channels


def _row_stride(x: Tensor) -> int | None:
    """Elements from a position to the next, from the last of a sample to the first of the next too; None if they vary."""
    if x.stride(1) != 1 and x.shape[1] != 1:
        return None
    stride, rows = None, 1
    for dim in (*range(x.dim() - 1, 1, -1), 0):
        if x.shape[dim] == 1:
            continue
        if stride is None:
            stride = x.stride(dim)
        elif x.stride(dim) != rows * stride:
            return None
        rows *= x.shape[dim]
    if stride is None:
        return x.shape[1]
    return stride if stride >= x.shape[1] else None


def _in_rows(tensor: Tensor | None, x: Tensor) -> Any:
    """The tensor in the dtype of x, copied if its positions don't follow one another."""
    if tensor is None:
        return None
    tensor = tensor.to(x.dtype)
    return tensor if _row_stride(tensor) is not None else empty_in_layout(x).copy_(tensor)


def _rows(tensor: Tensor | None) -> tuple[int, int]:
    if tensor is None:
        return _NONE
    stride = _row_stride(tensor)
    assert stride is not None
    return tensor.data_ptr(), stride


def _vector(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().float().contiguous()


def _gates(gate: Tensor | None) -> Tensor | None:
    """Dense rows of float32."""
    return None if gate is None else gate.detach().float().contiguous()


def _gate_rows(gate: Tensor | None) -> tuple[int, int]:
    if gate is None:
        return _NONE
    return gate.data_ptr(), gate.shape[1] if gate.shape[0] > 1 else 0


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _is_bfloat16(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() >= _WORTH_THREADS else 1

"""Weights handed out to all layers at once: in autocast's dtype, and cut into the teachers'.

Each layer by itself would launch a cast for every weight and stream, and backward another and a concatenation. Together
these are one operation over all tensors forward and one backward, when all gradients are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastmerge.gates import is_traced
from fastmerge.kernels.direct import apply

Weight = tuple[Tensor, ...]  # a tensor of all teachers and, where it was cut, each teacher's


def hand_out_weights(tensors: Sequence[Tensor], parts: Sequence[int]) -> tuple[Weight, ...]:
    """What layers compute with in this forward.

    Args:
        tensors: weights and biases, each teacher's after the other's along dimension 0.
        parts: into how many each is cut; 1: it isn't.

    Returns:
        Per tensor itself, cast where autocast would, and its parts. Where something must follow each layer (compilers,
        torch.func, DistributedDataParallel, which sends gradients while others are computed) it is the tensor alone.
    """
    if _is_followed():
        return tuple((t,) for t in tensors)
    dtype = _autocast_dtype(tensors[0].device.type) if tensors else None
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    cuts = tuple(count if learns else 1 for count in parts)
    casts = tuple(dtype is not None and t.dtype != dtype and t.dtype in _CAST for t in tensors)
    if not any(casts) and all(count == 1 for count in cuts):
        return tuple((t,) for t in tensors)
    found, handed, at = apply(_HandOut, dtype, casts, cuts, *tensors), [], 0
    for tensor, cast, count in zip(tensors, casts, cuts, strict=True):
        start, at = at, at + cast + (count if count > 1 else 0)
        handed.append(found[start:at] if cast else (tensor, *found[start:at]))
    return tuple(handed)


def own(layer: Any, weight: Weight | None, bias: Weight | None) -> tuple[Weight, Weight | None]:
    """What was handed out to a layer, or its own weight and bias."""
    if weight is not None:
        return weight, bias
    return (layer.weight,), None if layer.bias is None else (layer.bias,)


def whole_of(weight: Weight | None) -> Tensor | None:
    """All teachers' weight or bias in one tensor, or None for None."""
    return None if weight is None else weight[0]


def parts_of(weight: Weight, count: int) -> Sequence[Tensor]:
    """Each teacher's part of a handed out weight."""
    return weight[1:] if len(weight) > 1 else weight[0].chunk(count)


_CAST = (torch.float32, torch.float16, torch.bfloat16)  # what autocast casts


def _autocast_dtype(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _is_followed() -> bool:
    if is_traced():
        return True
    return (torch.distributed.is_available() and torch.distributed.is_initialized()) or forward_ad._current_level >= 0


class _HandOut(torch.autograd.Function):
    """Casts and cuts; backward puts the parts' gradients together in the tensors' dtypes."""

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, casts: Sequence[bool], cuts: Sequence[int], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.casts, ctx.cuts, ctx.tensors = casts, cuts, tensors
        cast = {k: torch.empty_like(tensors[k], dtype=dtype) for k, needed in enumerate(casts) if needed}
        if cast:
            torch._foreach_copy_([*cast.values()], [tensors[k] for k in cast])
        outputs: list[Tensor] = []
        for k, (tensor, count) in enumerate(zip(tensors, cuts, strict=True)):
            outputs += [cast[k]] if k in cast else []
            outputs += cast.get(k, tensor).chunk(count) if count > 1 else ()
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given, needs = iter(gradients), ctx.needs_input_grad[3:]
        differentiable = torch.is_grad_enabled()
        totals: list[Tensor | None] = []
        into: list[Tensor] = []
        out_of: list[Tensor] = []
        for tensor, needed, cast, count in zip(ctx.tensors, needs, ctx.casts, ctx.cuts, strict=True):
            whole = next(given) if cast else None
            parts = [next(given) for _ in range(count if count > 1 else 0)]
            if not needed or (whole is None and all(part is None for part in parts)):
                totals.append(None)
            elif differentiable or (whole is not None and any(part is not None for part in parts)):
                totals.append(_total(tensor.dtype, whole, parts))
            else:
                total = torch.empty_like(tensor)
                totals.append(total)
                pieces = [total] if whole is not None else total.chunk(count)
                for piece, gradient in zip(pieces, [whole] if whole is not None else parts, strict=True):
                    if gradient is None:
                        piece.zero_()
                    elif (alike := _like(piece, gradient)) is not None:
                        into.append(piece)
                        out_of.append(alike)
                    else:
                        piece.copy_(gradient)
        if into:
            torch._foreach_copy_(into, out_of)
        return None, None, None, *totals


def _like(piece: Tensor, gradient: Tensor) -> Tensor | None:
    """A gradient with the very strides of what it goes into, as one launch for many needs; None if it lies otherwise."""
    strides = piece.stride()
    if gradient.stride() == strides:
        return gradient
    steps = zip(piece.shape, gradient.stride(), strides, strict=True)
    return gradient.as_strided(piece.shape, strides) if all(n == 1 or a == b for n, a, b in steps) else None


def _total(dtype: torch.dtype, whole: Tensor | None, parts: Sequence[Tensor | None]) -> Tensor:
    """The gradient of one tensor by operations that can be differentiated."""
    found = [] if whole is None else [whole.to(dtype)]
    if any(part is not None for part in parts):
        first = next(part for part in parts if part is not None)
        found.append(torch.cat([torch.zeros_like(first) if part is None else part for part in parts]).to(dtype))
    return found[0] if len(found) == 1 else found[0] + found[1]

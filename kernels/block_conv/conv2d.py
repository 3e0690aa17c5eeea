"""Convolutions of several networks at once: block-diagonal, grouped, and sparse by blocks of channels.

Formula and reference: ``formulas``. On CUDA devices of compute capability 9.0 and newer, in float32, float16 and bfloat16,
each pass of each layer runs whatever was measured to be fastest: cuDNN one stream after another, cuDNN's groups, or an
implicit GEMM in Triton (``correlate_triton``, ``wgrad_triton``), which multiplies float32 in TF32 where cuDNN does
(``arithmetic``). Where nothing was measured, and everywhere else, it is plain PyTorch.
:func:`fastmerge.kernels.block_conv.choice.set_measuring` says when to measure.

Dims: T streams, N batch, C input channels, K output channels (of one stream), H W positions, R S kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any, cast

import torch
from fastmerge.kernels.block_conv import ops
from fastmerge.kernels.block_conv.choice import choices
from fastmerge.kernels.block_conv.formulas import (
    Geometry,
    LiveBlocks,
    Pair,
    Parts,
    block_diagonal_reference,
    block_sparse_reference,
    grouped_reference,
    live_blocks,
    plain_convolutions,
    refusal,
)
from fastmerge.kernels.block_conv.layouts import lies_channels_last
from fastmerge.kernels.block_conv.passes import runs_plain, worth_an_operation
from fastmerge.kernels.block_conv.problem import Problem
from fastmerge.kernels.direct import runs_direct
from torch import Tensor

__all__ = ["LiveBlocks", "block_diagonal_conv2d", "block_sparse_conv2d", "grouped_conv2d", "live_blocks"]

# What autocast turns into its own dtype.
_AUTOCAST = {torch.float32, torch.float16, torch.bfloat16}


def block_diagonal_conv2d(
    xs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    parts: Parts | None = None,
) -> tuple[Tensor, ...]:
    """Convolves T tensors, each with its own weight: what ``F.conv2d`` gives for each, autocast included.

    Args:
        xs: T tensors (N, C, H, W) of one shape. For the Triton kernels C and K must be multiples of 16 bytes. They read
            channels-last tensors and slices of their channels as they lie; of contiguous ones they make copies, and give
            contiguous results, as ``F.conv2d`` does.
        weight: (T·K, C, R, S), the T weights one under the other.
        bias: (T·K,), or None.
        stride: 1 or 2 for the Triton kernels.
        padding: as in ``F.conv2d``.
        dilation: as in ``F.conv2d``; 1 for the Triton kernels at stride 2.
        parts: the T weights and the T biases, or None, where the caller has each by itself: convolutions of PyTorch read these.

    Returns:
        T tensors (N, K, H', W'), differentiable once on the fused path.

    Raises:
        ValueError: if the shapes don't fit together.
    """
    xs, name = tuple(xs), None
    if parts is not None and not torch.compiler.is_compiling():
        name = _name_of(xs, weight, stride, padding, dilation)
        if runs_plain(name, xs[0].shape[0]):
            return plain_convolutions(xs, *parts, (stride, padding, dilation))
    if not xs or any(x.dim() != 4 or x.shape != xs[0].shape for x in xs):
        shapes = ", ".join(str(tuple(x.shape)) for x in xs) or "none"
        raise ValueError(f"block_diagonal_conv2d needs inputs (N, C, H, W) of one shape; got {shapes}")
    _check_weight("block_diagonal_conv2d", xs[0].shape[1], weight, bias, len(xs))
    geometry = _geometry(weight, stride, padding, dilation)
    ys = _fused(xs, weight, bias, len(xs), geometry, name=name)
    return block_diagonal_reference(xs, weight, bias, geometry, parts) if ys is None else tuple(ys)


def _name_of(xs: Sequence[Tensor], weight: Tensor, *options: Any) -> Hashable:
    """What tells calls apart of which one may be worth an operation and another not."""
    x = xs[0]
    differentiated = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    of_tensors = x.shape, x.stride(), x.dtype, x.device, weight.shape, weight.dtype
    return len(xs), of_tensors, options, differentiated, torch.is_autocast_enabled("cuda"), choices.measures()


def grouped_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    groups: int,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """``F.conv2d`` with a few large groups, the T streams of :func:`block_diagonal_conv2d` joined in one tensor.

    Args:
        x: (N, T·C, H, W).
        weight: (T·K, C, R, S).
        bias: (T·K,), or None.
        groups: T.
        stride: as for :func:`block_diagonal_conv2d`.
        padding: likewise.
        dilation: likewise.

    Returns:
        (N, T·K, H', W').

    Raises:
        ValueError: if the shapes don't fit together.
    """
    if x.dim() != 4 or x.shape[1] % groups:
        raise ValueError(f"grouped_conv2d needs an input (N, {groups}·C, H, W); got {tuple(x.shape)}")
    _check_weight("grouped_conv2d", x.shape[1] // groups, weight, bias, groups)
    geometry = _geometry(weight, stride, padding, dilation)
    ys = _fused((x,), weight, bias, groups, geometry)
    return grouped_reference(x, weight, bias, groups, geometry) if ys is None else ys[0]


def block_sparse_conv2d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | LiveBlocks,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Convolves with the live blocks of a weight; the others count as zero and get a gradient of exactly zero.

    Args:
        x: (N, C, H, W).
        weight: (K, C, R, S), dense; what it holds in other blocks is never read by the Triton kernels.
        mask: bool (rows, columns), which blocks of K / rows output and C / columns input channels are live; blocks of
            multiples of 16 channels for the Triton kernels. Its index lists are made at the first call with the same
            tensor; inside torch.compile pass ``live_blocks(mask)``, made outside.
        bias: (K,), or None.
        stride: as for :func:`block_diagonal_conv2d`.
        padding: likewise.
        dilation: likewise.

    Returns:
        (N, K, H', W').

    Raises:
        ValueError: if the shapes don't fit together.
    """
    live = mask if isinstance(mask, LiveBlocks) else live_blocks(mask)
    if x.dim() != 4:
        raise ValueError(f"block_sparse_conv2d needs an input (N, C, H, W); got {tuple(x.shape)}")
    _check_weight("block_sparse_conv2d", x.shape[1], weight, bias, 1)
    if weight.shape[0] % live.mask.shape[0] or weight.shape[1] % live.mask.shape[1]:
        raise ValueError(
            f"block_sparse_conv2d needs a mask that divides the weight's channels {tuple(weight.shape[:2])} into equal "
            f"blocks; got {tuple(live.mask.shape)}"
        )
    geometry = _geometry(weight, stride, padding, dilation)
    ys = _fused((x,), weight, bias, 1, geometry, live)
    return block_sparse_reference(x, weight, live.mask, bias, geometry) if ys is None else ys[0]


def _fused(
    xs: tuple[Tensor, ...],
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    geometry: Geometry,
    live: LiveBlocks | None = None,
    name: Hashable = None,
) -> Sequence[Tensor] | None:
    """The outputs by way of what chooses an implementation, or None where plain PyTorch is the choice."""
    given = [*xs, weight] if bias is None else [*xs, weight, bias]
    # Neither way knows anything of torch.func's transformations. Dynamo can't ask; there the operator itself raises.
    compiling = torch.compiler.is_compiling()
    if not compiling and any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in given):
        return None
    dtype = _computing_dtype(given)
    if dtype is None:
        return None
    channels_last = lies_channels_last(xs[0])
    problem = Problem(groups, geometry, live, channels_last)
    if not compiling:
        differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in given)
        if not worth_an_operation(problem, xs, weight, dtype, differentiated, name):
            return None
    direct = runs_direct(*given)
    if not _takes(xs, weight, geometry, dtype, groups, live, direct):
        return None
    xs = tuple(x.to(dtype) for x in xs)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    if direct:
        return cast(Sequence[Tensor], ops.BlockConv.apply(problem, weight, bias, *xs))
    options = (list(pair) for pair in geometry.options)
    return cast(
        Sequence[Tensor], ops.block_conv(list(xs), weight, bias, groups, *options, list(live or ()), channels_last)
    )


def _takes(
    xs: Sequence[Tensor],
    weight: Tensor,
    geometry: Geometry,
    dtype: torch.dtype,
    groups: int,
    live: LiveBlocks | None,
    remember: bool,
) -> bool:
    """Whether the Triton kernels can take a convolution, found out once for each shape and layout of its tensors."""
    blocks = None if live is None else live.block(weight.shape)
    if not remember:
        return refusal(xs, weight, geometry, dtype, groups, blocks) is None
    call = (geometry, dtype, groups, blocks, weight.device, *((t.shape, t.stride(), t.dtype) for t in (*xs, weight)))
    taken: bool | None = choices.remembered(call)
    if taken is None:
        taken = refusal(xs, weight, geometry, dtype, groups, blocks) is None
        choices.remember(call, taken)
    return taken


def _computing_dtype(tensors: Sequence[Tensor]) -> torch.dtype | None:
    """The dtype that F.conv2d would compute in, or None where the tensors don't agree on one."""
    device, dtypes = tensors[0].device.type, {t.dtype for t in tensors}
    if torch.is_autocast_enabled(device) and dtypes <= _AUTOCAST:
        return torch.get_autocast_dtype(device)
    return dtypes.pop() if len(dtypes) == 1 else None


def _check_weight(function: str, channels: int, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    if weight.dim() != 4 or weight.shape[1] != channels or weight.shape[0] % groups:
        raise ValueError(
            f"{function} needs a weight ({groups}·K, {channels}, R, S) for {groups} times {channels} input channels; "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{function} needs a bias of shape ({weight.shape[0]},); got {tuple(bias.shape)}")


def _geometry(weight: Tensor, stride: Any, padding: Any, dilation: Any) -> Geometry:
    options = (tuple(value) if isinstance(value, list) else value for value in (stride, padding, dilation))
    kernel = weight.shape[2], weight.shape[3]
    # Compilers warn of caches, and sizes that a tracer leaves open can't be looked up.
    known = not torch.compiler.is_compiling() and all(isinstance(size, int) for size in kernel)
    return (_known_geometry if known else _geometry_of)(kernel, *options)


def _geometry_of(kernel: Pair, stride: Any, padding: Any, dilation: Any) -> Geometry:
    strides, dilations = _pair(stride), _pair(dilation)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        extents = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        if strides != (1, 1) or any(extent % 2 for extent in extents):
            raise ValueError(f"padding='same' needs stride 1 and an odd kernel; got {strides} and {kernel}")
        padding = [extent // 2 for extent in extents]
    return Geometry(kernel, strides, _pair(padding), dilations)


_known_geometry = functools.lru_cache(maxsize=1024)(_geometry_of)


def _pair(value: int | Sequence[int]) -> Pair:
    if isinstance(value, int):
        return value, value
    first, second = value if len(value) == 2 else (value[0], value[0])
    return first, second

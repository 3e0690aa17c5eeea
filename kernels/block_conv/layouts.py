"""How the tensors of a block convolution lie in memory: what PyTorch's own convolution gives, and what TMA can fetch.

The Triton kernels read and write channels-last tensors. Others are accepted too: a candidate copies what it reads into that
order and what it wrote out of it, which is part of the time it is measured to take.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def lies_channels_last(tensor: Tensor) -> bool:
    """Whether PyTorch takes a tensor (N, C, H, W) for channels-last: by its strides, dense or not."""
    if tensor.stride(1) == 0:
        return False
    least = 0
    for dim in (1, 3, 2, 0):
        size, stride = tensor.shape[dim], tensor.stride(dim)
        if size == 0 or stride < least:
            return False
        # Equal strides throughout: of one number's layouts contiguous is the one meant.
        if dim == 0 and least == tensor.stride(1):
            return False
        least = stride * size if size > 1 else stride
    return True


def memory_format(channels_last: bool) -> torch.memory_format:
    """The one of the two."""
    return torch.channels_last if channels_last else torch.contiguous_format


def empty_laid_out(like: Tensor, size: Sequence[int], channels_last: bool) -> Tensor:
    """Uninitialised memory (N, C, H, W)."""
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory_format(channels_last))


def laid_out(tensor: Tensor, channels_last: bool) -> Tensor:
    """A tensor (N, C, H, W) without gaps in one of the two layouts, copied only if it isn't.

    Its strides are those of the layout where there is one row, column or channel too, of which ``contiguous`` takes any.
    """
    tensor = tensor.contiguous(memory_format=memory_format(channels_last))
    _, c, h, w = tensor.shape
    strides = (c * h * w, 1, c * w, c) if channels_last else (c * h * w, h * w, w, 1)
    return tensor if tensor.stride() == strides else tensor.as_strided(tensor.shape, strides)


def empty_channels_last(like: Tensor, size: Sequence[int]) -> Tensor:
    """Uninitialised memory (N, C, H, W) with the channels next to each other."""
    return empty_laid_out(like, size, channels_last=True)


def dense_weight(weight: Tensor) -> Tensor:
    """A weight (T·K, C, R, S) in the order (T·K, R, S, C) without gaps, 16 bytes aligned; itself if it is that already."""
    weight = weight.contiguous(memory_format=torch.channels_last)
    return weight if weight.data_ptr() % 16 == 0 else weight.clone()


def turned_weight(weight: Tensor, groups: int) -> Tensor:
    """A copy (T·C, K, R, S) of a weight (T·K, C, R, S), each stream's channels exchanged, in the order (T·C, R, S, K)."""
    outputs, channels, *kernel = weight.shape
    streams = weight.reshape(groups, outputs // groups, channels, *kernel).transpose(1, 2)
    turned = empty_channels_last(weight, (groups * channels, outputs // groups, *kernel))
    turned.view(groups, channels, outputs // groups, *kernel).copy_(streams)
    return turned


def boxes_fit(tensor: Tensor) -> bool:
    """Whether TMA can fetch boxes of a tensor (N, C, H, W): channels-last, or a slice of the channels of such a tensor.

    It must also lie on a multiple of 16 bytes, which says nothing of a tensor that is only traced.
    """
    per_16_bytes = 16 // tensor.element_size()
    n, c, h, w = tensor.stride()
    sizes = tensor.shape[0], *tensor.shape[2:]
    return (tensor.shape[1] == 1 or c == 1) and all(
        stride > 0 and stride % per_16_bytes == 0 for size, stride in zip(sizes, (n, h, w), strict=True) if size > 1
    )


def fitting(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, copied where TMA can't fetch boxes of them: another order, or not 16 bytes aligned."""
    return [t if boxes_fit(t) and t.data_ptr() % 16 == 0 else empty_channels_last(t, t.shape).copy_(t) for t in tensors]

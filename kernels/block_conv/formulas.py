"""Block convolutions in plain PyTorch: the reference of the Triton kernels, and what both need to know.

A *block-diagonal* convolution runs T convolutions of one geometry, each with its own input and weight:

    y_t[n, k, h, w] = b_t[k] + Σ_{c, r, s} x_t[n, c, S h + D r - P, S w + D s - P] weight_t[k, c, r, s]

The T inputs are tensors of their own (*streams*), or T slices of one tensor's channels (*joined*, ``groups=T``). A
*block-sparse* convolution has one input and one dense weight, cut into blocks of output and input channels, of which a mask
says which are *live*; the others count as zero, whatever they hold, and get a gradient of exactly zero.

Dims: T streams, N batch, C input channels, K output channels (of one stream), H W positions, R S kernel.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fastmerge.kernels.block_conv.layouts import boxes_fit, lies_channels_last
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Pair = tuple[int, int]


def _has_descriptors() -> bool:
    # Looked up without importing Triton, which a machine without CUDA never does.
    triton = importlib.util.find_spec("triton")
    folders = (triton and triton.submodule_search_locations) or ()
    return any((Path(folder) / "tools" / "tensor_descriptor.py").is_file() for folder in folders)


_HAS_DESCRIPTORS = _has_descriptors()


@dataclass(frozen=True)
class Geometry:
    """How a two-dimensional convolution is applied; each pair is (rows, columns)."""

    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    def output_size(self, height: int, width: int) -> Pair:
        """The size of the output for an input of this size."""
        rows, columns = (
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(
                (height, width), self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )
        return rows, columns

    @property
    def options(self) -> tuple[Pair, Pair, Pair]:
        """Stride, padding and dilation, in the order of ``F.conv2d``."""
        return self.stride, self.padding, self.dilation


class LiveBlocks(NamedTuple):
    """Which blocks of a weight are live, as index lists on its device; made by :func:`live_blocks`.

    Attributes:
        rows: int32 (L,), the block row (output channels) of each live block, rows ascending.
        columns: int32 (L,), its block column (input channels).
        row_starts: int32 (rows + 1,), where each row's blocks start in ``columns``.
        column_starts: int32 (columns + 1,), where each column's blocks start in ``column_rows``.
        column_rows: int32 (L,), the block rows of each column's live blocks, columns ascending.
        mask: the bool mask itself, (block rows, block columns).
    """

    rows: Tensor
    columns: Tensor
    row_starts: Tensor
    column_starts: Tensor
    column_rows: Tensor
    mask: Tensor

    def block(self, weight_size: Sequence[int]) -> Pair:
        """Output and input channels of a block of a weight (K, C, R, S)."""
        return weight_size[0] // self.mask.shape[0], weight_size[1] // self.mask.shape[1]


_lists: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def live_blocks(mask: Tensor) -> LiveBlocks:
    """The live blocks of a mask as index lists, made once for each mask tensor and again after it is changed in place.

    Args:
        mask: bool (block rows, block columns).

    Raises:
        ValueError: if the mask is anything else.
    """
    if mask.dim() != 2 or mask.dtype != torch.bool or mask.numel() == 0:
        raise ValueError(
            f"block_sparse_conv2d needs a bool mask (blocks of output channels, blocks of input channels); "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    known = _lists.get(mask)
    if known is not None and known[0] == mask._version:
        return known[1]
    # On the host: its length is needed there, and the mask is small.
    host = mask.cpu()
    rows, columns = host.nonzero(as_tuple=True)
    _, column_rows = host.t().nonzero(as_tuple=True)
    made = (rows, columns, _starts(host.sum(1)), _starts(host.sum(0)), column_rows)
    lists = LiveBlocks(*(t.to(mask.device, torch.int32) for t in made), mask.clone())
    _lists[mask] = (mask._version, lists)
    return lists


def _starts(counts: Tensor) -> Tensor:
    return F.pad(counts.cumsum(0), (1, 0))


Parts = tuple[Sequence[Tensor], Sequence[Tensor] | None]  # the weights and biases of T streams, each by itself


def block_diagonal_reference(
    xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, geometry: Geometry, parts: Parts | None = None
) -> tuple[Tensor, ...]:
    """T convolutions, one after another.

    Args:
        xs: T tensors (N, C, H, W).
        weight: (T·K, C, R, S), the T weights one under the other.
        bias: (T·K,), or None.
        geometry: of each convolution.
        parts: the T weights and the T biases, or None; None: cut out here.

    Returns:
        T tensors (N, K, H', W').
    """
    if parts is None:
        parts = weight.chunk(len(xs)), None if bias is None else bias.chunk(len(xs))
    return plain_convolutions(xs, *parts, geometry.options)


def plain_convolutions(
    xs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor] | None, options: Sequence[Any]
) -> tuple[Tensor, ...]:
    """T convolutions of PyTorch with these weights, biases, stride, padding and dilation."""
    each = [None] * len(xs) if biases is None else biases
    return tuple([F.conv2d(x, w, b, *options) for x, w, b in zip(xs, weights, each, strict=True)])


def grouped_reference(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, geometry: Geometry) -> Tensor:
    """``F.conv2d`` with groups: joined input (N, T·C, H, W), weight (T·K, C, R, S), joined output."""
    return F.conv2d(x, weight, bias, *geometry.options, groups)


def block_sparse_reference(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """A dense convolution with the blocks that aren't live replaced by zeros: x (N, C, H, W), weight (K, C, R, S)."""
    return F.conv2d(x, masked_weight(weight, mask), bias, *geometry.options)


def masked_weight(weight: Tensor, mask: Tensor) -> Tensor:
    """The weight with exact zeros where its blocks aren't live, even where it holds infinities."""
    rows, columns = (size // blocks for size, blocks in zip(weight.shape, mask.shape, strict=False))
    live = mask.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return torch.where(live[:, :, None, None], weight, weight.new_zeros(()))


def fetches_boxes(device: torch.device) -> bool:
    """Whether a device runs the Triton kernels: CUDA, compute capability 9.0 or newer, and tensor descriptors in Triton."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and _HAS_DESCRIPTORS
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )


# What torch.compiler.assume_constant_result does; it would import the compiler, a third of the time to import fastmerge.
fetches_boxes._dynamo_marked_constant = True


def refusal(
    tensors: Sequence[Tensor],
    weight: Tensor,
    geometry: Geometry,
    dtype: torch.dtype,
    groups: int,
    blocks: Pair | None = None,
) -> str | None:
    """Why the Triton kernels can't take a convolution, or None if they can.

    Args:
        tensors: the inputs, T tensors (N, C, H, W) or one joined one.
        weight: (T·K, C, R, S).
        geometry: of the convolution.
        dtype: that it computes in, which autocast may have set.
        groups: T.
        blocks: output and input channels of a block, of a block-sparse weight.
    """
    x, stride = tensors[0], geometry.stride[0]
    if not fetches_boxes(x.device):
        return "needs a CUDA device of compute capability 9.0 or newer, and Triton's tensor descriptors"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"needs float32, float16 or bfloat16; got {dtype}"
    if geometry.stride not in ((1, 1), (2, 2)) or (stride == 2 and geometry.dilation != (1, 1)):
        return f"needs stride 1, or stride 2 without dilation; got {geometry.stride} and {geometry.dilation}"
    if min(geometry.padding) < 0 or x.shape[0] == 0 or min(geometry.output_size(x.shape[2], x.shape[3])) < 1:
        return "needs an output that isn't empty"
    if stride == 2 and min(x.shape[2:]) < 2:
        return f"needs two rows and two columns for stride 2; got {tuple(x.shape[2:])}"
    outputs, channels = weight.shape[0] // groups, weight.shape[1]
    per_16_bytes = 16 // dtype.itemsize
    if channels % per_16_bytes or outputs % per_16_bytes:
        return f"needs multiples of {per_16_bytes} channels, 16 bytes; got {channels} and {outputs}"
    if blocks is not None and (blocks[0] % 16 or blocks[1] % 16):
        return f"needs blocks of multiples of 16 channels; got {blocks[0]} × {blocks[1]}"
    channels_last = [lies_channels_last(t) for t in tensors]
    if len(set(channels_last)) > 1:
        return "needs inputs of one layout; got channels-last and others"
    if not channels_last[0] and lies_channels_last(weight):
        return "needs channels-last inputs for a channels-last weight"
    # What is in another order or another dtype is copied.
    if channels_last[0] and not all(boxes_fit(t) for t in tensors if t.dtype == dtype):
        return (
            "needs channels next to each other, and rows and columns multiples of 16 bytes apart, where channels-last"
        )
    return None

"""Tensor descriptors of the block convolution: T streams as one array, its lattices, and how kernels read and write boxes.

One launch serves all streams, so one TMA descriptor must reach all of them. Its five dimensions are (T, N, H, W, C), or
(T, H, W, N, C) where a box holds one position of many samples: dimensions of 1 cost nothing in front, and a copy of the box
through registers in between.

Streams that are slices of one tensor's channels lie C elements apart. Tensors allocated by themselves lie anywhere, but any
two of one layout lie *some* distance apart, and that is all a descriptor needs: it says where boxes are, not that the memory
in between is ours, and no box spans two streams. Three or more tensors that happen to lie at unequal distances take a launch
for each two.

Dims: T streams, N batch, C channels, H W positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from fastmerge.kernels.block_conv.arithmetic import IEEE
from fastmerge.kernels.block_conv.formulas import Geometry
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# TMA holds a distance in 40 bits of bytes.
_FARTHEST = 2**40
# Bits of bfloat16 mean nothing to the interpreter's dot product.
_UPCAST = triton.knobs.runtime.interpret


@triton.jit
def load_box(array, stream, n, h, w, channel, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, SAMPLES: tl.constexpr):
    """A box as a matrix (positions, channels); zeros where it lies outside."""
    box = array.load([stream, h, w, n, channel] if SAMPLES else [stream, n, h, w, channel])
    return box.reshape(POSITIONS, CHANNELS)


@triton.jit
def store_box(
    array,
    matrix,
    stream,
    n,
    h,
    w,
    channel,
    NB: tl.constexpr,
    HB: tl.constexpr,
    WB: tl.constexpr,
    CHANNELS: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """Writes a matrix (positions, channels) as a box; nothing where it lies outside."""
    if SAMPLES:
        array.store([stream, h, w, n, channel], matrix.reshape(1, HB, WB, NB, CHANNELS))
    else:
        array.store([stream, n, h, w, channel], matrix.reshape(1, NB, HB, WB, CHANNELS))


def shared_constants(geometry: Geometry, box: tuple[int, int, int], arithmetic: str) -> dict[str, int | bool | str]:
    """The constexpr arguments that the kernels of all passes take."""
    return {
        "NB": box[0],
        "HB": box[1],
        "WB": box[2],
        "KERNEL_H": geometry.kernel[0],
        "KERNEL_W": geometry.kernel[1],
        "STRIDE": geometry.stride[0],
        "PADDING_H": geometry.padding[0],
        "PADDING_W": geometry.padding[1],
        "DILATION_H": geometry.dilation[0],
        "DILATION_W": geometry.dilation[1],
        "PRECISION": "ieee" if arithmetic == IEEE else "tf32",
        "UPCAST": _UPCAST,
    }


@dataclass(frozen=True)
class Streams:
    """T tensors (N, C, H, W) as an array over T.

    Attributes:
        tensors: those that own the memory.
        first: the stream at the lowest address.
        count: T.
        spacing: elements from one stream to the next address.
        backwards: whether the streams' order is that of falling addresses.
    """

    tensors: tuple[Tensor, ...]
    first: Tensor
    count: int
    spacing: int
    backwards: bool = False

    def boxes(
        self, box: tuple[int, int, int], channels: int, samples: bool, stride: int = 1
    ) -> list[TensorDescriptor | None]:
        """Descriptors of the lattices (row parity, column parity), (0, 0) first; None after the last.

        Args:
            box: N × H × W positions.
            channels: of a box.
            samples: whether N comes after H and W.
            stride: 1, one lattice with everything, or 2, four of them.
        """
        n, c, h, w = self.first.shape
        n_stride, _, h_stride, w_stride = self.first.stride()
        # Where there is one of something its stride means nothing, but must be a legal one.
        n_stride, h_stride, w_stride = (
            spacing if size > 1 else 8 for size, spacing in ((n, n_stride), (h, h_stride), (w, w_stride))
        )

        def order(n: int, h: int, w: int) -> tuple[int, int, int]:
            return (h, w, n) if samples else (n, h, w)

        lattices: list[TensorDescriptor | None] = [
            TensorDescriptor(
                self.first[:, :, row::stride, column::stride],
                [self.count, *order(n, -(-(h - row) // stride), -(-(w - column) // stride)), c],
                [self.spacing, *order(n_stride, h_stride * stride, w_stride * stride), 1],
                [1, *order(*box), channels],
            )
            for row in range(stride)
            for column in range(stride)
        ]
        return lattices + [None] * (4 - len(lattices))


def streams_of(tensors: Sequence[Tensor], count: int) -> Streams | None:
    """The tensors as an array over T, or None where they lie at unequal distances or are laid out differently.

    Args:
        tensors: T tensors (N, C, H, W), or one (N, T·C, H, W).
        count: T.
    """
    if len(tensors) == 1:
        (joined,) = tensors
        channels = joined.shape[1] // count
        return Streams((joined,), joined[:, :channels], count, channels if count > 1 else 8)
    first, size = tensors[0], tensors[0].element_size()
    if any(_layout(t) != _layout(first) for t in tensors):
        return None
    distances = {after.data_ptr() - before.data_ptr() for before, after in itertools.pairwise(tensors)}
    if len(distances) > 1:
        return None
    (distance,) = distances
    if distance == 0 or distance % 16 or abs(distance) * len(tensors) >= _FARTHEST:
        return None
    lowest = tensors[0] if distance > 0 else tensors[-1]
    return Streams(tuple(tensors), lowest, len(tensors), abs(distance) // size, distance < 0)


def _layout(tensor: Tensor) -> list[int]:
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def launches(count: int, *operands: Sequence[Tensor]) -> list[tuple[slice, list[Streams]]]:
    """Which streams share a launch, each with the operands' streams as arrays.

    Args:
        count: T.
        operands: for each operand T tensors, or one that holds all streams.
    """
    waiting, found = [slice(0, count)], []
    while waiting:
        part = waiting.pop(0)
        length = part.stop - part.start
        arrays = [streams_of(tensors if len(tensors) == 1 else tensors[part], length) for tensors in operands]
        whole = [array for array in arrays if array is not None]
        if len(whole) == len(arrays):
            found.append((part, whole))
        else:
            step = 2 if length > 2 else 1
            waiting += [slice(at, min(at + step, part.stop)) for at in range(part.start, part.stop, step)]
    return found


def weight_box(weight: Tensor, count: int, rows: int, columns: int) -> TensorDescriptor:
    """Descriptor of a channels-last weight (T·K, C, R, S) as (T, R·S, K, C), with boxes of one tap.

    Args:
        weight: its memory in the order (T·K, R, S, C).
        count: T.
        rows: output channels of a box.
        columns: input channels of a box.
    """
    outputs, channels, *kernel = weight.shape
    taps, each = kernel[0] * kernel[1], outputs // count
    return TensorDescriptor(
        weight,
        [count, taps, each, channels],
        [each * taps * channels, channels, taps * channels, 1],
        [1, 1, rows, columns],
    )

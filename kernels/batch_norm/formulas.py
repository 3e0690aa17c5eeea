"""BatchNorm with what follows it, in plain PyTorch: the reference of the fused operations, and what they share.

    y = act(batch_norm(x) + residual) * gate            y = max_pool(act(batch_norm(x))) * gate

A gate is at least 0, so gating after the pooling, on the smaller tensor, is gating before it.

Dims: N batch, C channels, P positions of a sample (H·W, or 1 for x of shape (N, C)), T streams.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# By name; all take ``inplace``.
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "identity": lambda y, inplace=False: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
}
# A position in the pooling window is saved as int8.
MAX_WINDOW = 128


class Norm(NamedTuple):
    """What every pass over T streams reads.

    Attributes:
        x: T tensors of one shape (N, C, ...).
        weight, bias: (T·C,), or None.
        mean, var: (T·C,).
        residual: T tensors in the shape of those of x, or None.
        gate: (1 or N, T·C), or None.
        eps: added to the variance.
        activation: one of ``ACTIVATIONS``.
    """

    x: Sequence[Tensor]
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    var: Tensor
    residual: Sequence[Tensor] | None
    gate: Tensor | None
    eps: float
    activation: str

    @property
    def activates(self) -> bool:
        """Whether the activation is another than the identity."""
        return self.activation != "identity"

    def stream(self, t: int) -> Norm:
        """One of the streams, alone."""
        weight, bias, mean, var = (of_stream(v, t, len(self.x)) for v in self[1:5])
        residual = None if self.residual is None else self.residual[t : t + 1]
        gate = of_stream(self.gate, t, len(self.x), 1)
        return Norm(self.x[t : t + 1], weight, bias, mean, var, residual, gate, self.eps, self.activation)


def of_stream(joined: Any, t: int, count: int, dim: int = 0) -> Any:
    """The part of a tensor of all streams that is one stream's, a view; None for None."""
    if joined is None or count == 1:
        return joined
    size = joined.shape[dim] // count
    return joined.narrow(dim, t * size, size)


def batch_norm_act_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str = "relu",
    gate: Tensor | None = None,
) -> Tensor:
    """``batch_norm.batch_norm_act`` in plain PyTorch; arguments, result and errors are its own."""
    check("batch_norm_act", x, training, activation, residual, gate, running_mean, running_var)
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        y = y + residual
    return gated(ACTIVATIONS[activation](y), gate)


def batch_norm_act_pool_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int] = 0,
    gate: Tensor | None = None,
) -> Tensor:
    """``pool.batch_norm_act_pool`` in plain PyTorch; arguments, result and errors are its own."""
    check("batch_norm_act_pool", x, training, activation, None, gate, running_mean, running_var)
    window = pooling_window(x, kernel_size, stride, padding)
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    y = F.max_pool2d(ACTIVATIONS[activation](y), window[:2], window[2:4], window[4:])
    return gated(y, gate)


def gated(y: Tensor, gate: Tensor | None) -> Tensor:
    """A result times its gates, if there are any."""
    if gate is None:
        return y
    # In the activation's dtype: a wider gate would promote the activation and double its traffic.
    return y * gate.to(y.dtype).reshape(*gate.shape, *[1] * (y.dim() - 2))


def check(
    name: str,
    x: Tensor,
    training: bool,
    activation: str,
    residual: Tensor | None,
    gate: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
) -> None:
    """Refuses what neither the fused operation nor its reference takes.

    Raises:
        ValueError: for an activation that isn't one of ``ACTIVATIONS``, a residual or gate of the wrong shape, evaluation
            without running statistics, or one value per channel in training.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name} needs activation to be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"{name} needs floating x of shape (N, C, ...); got {x.dtype} of shape {tuple(x.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"{name} needs residual in the shape of x, {tuple(x.shape)}; got {tuple(residual.shape)}")
    if gate is not None and (gate.dim() != 2 or gate.shape[1] != x.shape[1] or gate.shape[0] not in (1, x.shape[0])):
        raise ValueError(
            f"{name} needs gate of shape (1, {x.shape[1]}) or ({x.shape[0]}, {x.shape[1]}); got {tuple(gate.shape)}"
        )
    if not training and (running_mean is None or running_var is None):
        raise ValueError(f"{name} needs running_mean and running_var when training is False; got None")
    if training and x.shape[0] * math.prod(x.shape[2:]) == 1:
        # In torch's words.
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")


def pooling_window(
    x: Tensor, kernel_size: int | Sequence[int], stride: int | Sequence[int], padding: int | Sequence[int]
) -> tuple[int, int, int, int, int, int]:
    """Kernel size, stride and padding, a height and a width of each.

    Raises:
        ValueError: for a window that max-pooling doesn't take, or ``x`` that isn't of shape (N, C, H, W).
    """
    if x.dim() != 4:
        raise ValueError(f"batch_norm_act_pool needs x of shape (N, C, H, W); got {tuple(x.shape)}")
    (kh, kw), (sh, sw), (ph, pw) = (
        (size, size) if isinstance(size, int) else tuple(size) for size in (kernel_size, stride, padding)
    )
    if min(kh, kw, sh, sw) < 1 or min(ph, pw) < 0 or 2 * ph > kh or 2 * pw > kw:
        raise ValueError(
            "batch_norm_act_pool needs kernel_size and stride of at least 1 and padding of at most half the kernel; "
            f"got kernel_size {(kh, kw)}, stride {(sh, sw)}, padding {(ph, pw)}"
        )
    if x.shape[2] + 2 * ph < kh or x.shape[3] + 2 * pw < kw:
        raise ValueError(f"batch_norm_act_pool needs a padded x of at least {(kh, kw)}; got {tuple(x.shape)}")
    return kh, kw, sh, sw, ph, pw


def pooled_shape(x: Tensor, window: Sequence[int]) -> tuple[int, ...]:
    """The shape that ``x`` has after the pooling."""
    kh, kw, sh, sw, ph, pw = window
    return (*x.shape[:2], (x.shape[2] + 2 * ph - kh) // sh + 1, (x.shape[3] + 2 * pw - kw) // sw + 1)


def empty_in_layout(x: Tensor, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """A new dense tensor, channels-last if ``x`` is so or is a slice of something channels-last, contiguous otherwise."""
    shape = tuple(x.shape if shape is None else shape)
    strides = _dense_strides.__wrapped__(shape, x.dim() > 2 and is_channels_last(x))  # sizes may be symbols
    return x.new_empty_strided(shape, strides, dtype=dtype or x.dtype)


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a position lie side by side, as they do in x of shape (N, C)."""
    return x.stride(1) == 1 and (x.dim() == 2 or not x.is_contiguous())


class Room(NamedTuple):
    """Memory for T streams: one tensor, which is cut into them.

    Attributes:
        shape, strides, dtype: of the whole.
        streams: T.
        dim: the dimension that it is cut along.
        distance: elements from each stream to the next; 0 for one.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    streams: int
    dim: int
    distance: int

    def empty(self, device: torch.device) -> Sequence[Tensor]:
        """The streams, uninitialised."""
        whole = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)
        if self.streams == 1:
            return (whole,)
        # Not views of one another to autograd, which would forbid to change one in place.
        return torch.unsafe_split(whole, self.shape[self.dim] // self.streams, self.dim)


@functools.lru_cache(maxsize=4096)
def room(shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype, streams: int) -> Room:
    """For dense streams of a shape, one behind the other."""
    whole = (streams * shape[0], *shape[1:])
    return Room(whole, _dense_strides(whole, channels_last), dtype, streams, 0, math.prod(shape) if streams > 1 else 0)


def room_like(x: Tensor, streams: int, distance: int | None) -> Room:
    """For the gradients of streams at a distance, ``x`` being the first: slices of one tensor's channels if those are."""
    if streams > 1 and distance is not None and lies_joined(x.shape, x.stride(), streams, distance):
        shape = (x.shape[0], streams * x.shape[1], *x.shape[2:])
        return Room(shape, x.stride(), x.dtype, streams, 1, distance)
    return room(x.shape, is_channels_last(x), x.dtype, streams)


def empty_streams(
    x: Sequence[Tensor], shape: Sequence[int] | None = None, dtype: torch.dtype | None = None
) -> Sequence[Tensor]:
    """New tensors for all streams of ``x``, each as ``empty_in_layout`` makes it, one behind the other in memory."""
    first = x[0]
    shape = first.shape if shape is None else tuple(shape)
    return room(shape, is_channels_last(first), dtype or first.dtype, len(x)).empty(first.device)


def distance_of(streams: Sequence[Tensor]) -> int | None:
    """Elements from each stream to the next, 0 for one, or None where that differs, or their strides do."""
    first, count = streams[0], len(streams)
    if count == 1:
        return 0
    start, strides = first.data_ptr(), first.stride()
    step = streams[1].data_ptr() - start
    for t in range(1, count):
        if streams[t].stride() != strides or (t > 1 and streams[t].data_ptr() != start + t * step):
            return None
    itemsize = first.element_size()
    return None if step % itemsize else step // itemsize


def joined_of(streams: Sequence[Tensor], dim: int) -> Tensor | None:
    """The tensor whose slices along a dimension the streams are, or None where there is none."""
    first = streams[0]
    dim %= first.dim()
    step = first.shape[dim] * first.stride(dim)
    storage = first.untyped_storage()._cdata
    if distance_of(streams) != step or any(t.untyped_storage()._cdata != storage for t in streams):
        return None
    shape = [size * len(streams) if d == dim else size for d, size in enumerate(first.shape)]
    return first.as_strided(shape, first.stride())


@functools.lru_cache(maxsize=4096)
def lies_joined(shape: tuple[int, ...], strides: tuple[int, ...], count: int, distance: int) -> bool:
    """Whether streams at a distance are slices of the channels, dimension 1, of one dense tensor."""
    if distance != shape[1] * strides[1] or distance == 0:
        return False
    sizes = (shape[0], count * shape[1], *shape[2:])
    reach = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    return reach == math.prod(sizes)


@functools.lru_cache(maxsize=4096)
def _dense_strides(shape: tuple[int, ...], channels_last: bool) -> tuple[int, ...]:
    # By hand: torch knows channels-last for four and five dimensions alone.
    strides, step = [0] * len(shape), shape[1] if channels_last else 1
    for dim in reversed(range(2 if channels_last else 0, len(shape))):
        strides[dim] = step
        step *= shape[dim]
    if channels_last:
        strides[0], strides[1] = step, 1
    return tuple(strides)

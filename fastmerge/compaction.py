"""Dropping rows and columns of a tensor inside its own memory.

A weight of the big student holds T·n channels of which n stay. ``index_select`` would need old and new side by side;
``compact_`` moves what stays to the front of the same storage and gives the rest of it back. Sorted indices make that
safe: what stays at position i comes from an index of at least i, so rows only move forward, onto what is already read.

CPU tensors go through the C++ extension (csrc/compact.h), CUDA tensors through a kernel (kernels/compact.py) with 16 MiB of
scratch memory. Without either, and on other devices, the same steps run in PyTorch with that much, or one row if it is larger.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastmerge.kernels.compact import SCRATCH_BYTES, compact, memory_order

_compaction: Any = None
_why_missing = ""
try:
    import fastmerge._compaction as _compaction  # from fastmerge import ... would blame a circular import
except ImportError as error:
    _why_missing = str(error)

_SCRATCH_BYTES = SCRATCH_BYTES
_STAGED_ABOVE = 1 << 26
_warned = False


def compact_(tensor: Tensor, keep_out: Tensor, keep_in: Tensor | None = None) -> None:
    """Keeps the given rows, and optionally columns, of a tensor in place and gives the freed memory back.

    No second copy of the tensor is made. On the CPU, dropping half or more never takes more memory than the tensor had; on a
    CUDA device at most 64 MiB more, and one integer per row and column.
    Afterwards ``tensor`` equals ``tensor[keep_out]`` or ``tensor[keep_out][:, keep_in]`` of before, as the same Python
    object in the same storage (which shrank, so its address may have changed), in the memory format it had: contiguous
    stays contiguous, channels-last stays channels-last, any other order of dimensions in memory stays too. Every check
    comes before the first write: a call that raises has changed nothing. A gradient of the old shape is dropped
    (``tensor.grad`` becomes None).

    Args:
        tensor: Any strided tensor of one dimension or more that alone owns its storage: a weight (out, in, ...), a bias
            or BatchNorm buffer (out,), a parameter's momentum. A leaf may require grad.
        keep_out: (rows that stay,) int64, ascending and unique, on any device: indices into dimension 0.
        keep_in: (columns that stay,) likewise for dimension 1; None keeps all.

    Raises:
        TypeError: ``tensor`` is no plain strided tensor, or a keep is no int64 tensor.
        IndexError: A keep has an index outside its dimension.
        ValueError: A keep is not ascending, unique and of one dimension; ``tensor`` lacks the dimension, is the result
            of recorded operations, overlaps itself (``expand``), or shares its storage with another tensor, with numpy
            or with another process, which would be left with memory that is no longer theirs; or a CUDA graph is being
            captured, whose replays would use memory that was given back. A graph captured before must not be replayed.
    """
    _check_tensor(tensor)
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError("compact_ can't run while a CUDA graph is captured; call it before or after")
    keeps: list[Tensor | None] = [None] * tensor.dim()
    keeps[0] = _checked_keep("keep_out", keep_out, tensor, 0)
    if keep_in is not None:
        keeps[1:2] = [_checked_keep("keep_in", keep_in, tensor, 1)]
    shape = [size if keep is None else len(keep) for size, keep in zip(tensor.shape, keeps, strict=True)]
    strides = dense_strides(tensor, shape)
    with torch.no_grad():
        if tensor.device.type == "cpu" and _has_extension():
            _move_in_cpp(tensor, keeps)
            _release(tensor, math.prod(shape))
        else:
            compact(tensor, keeps, _SCRATCH_BYTES)
        _shrink(tensor, shape, strides)


def set_data(tensor: Tensor, data: Tensor) -> None:
    """Gives a tensor or parameter data of another shape, and drops its gradient.

    As long as anything holds a graph in which the parameter took part, such as a loss that was kept, autograd would go on
    expecting gradients of the old shape. Data of another dtype in between make it forget.
    """
    tensor.grad = None
    if tensor.requires_grad:
        other = torch.float32 if tensor.dtype == torch.float16 else torch.float16
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data


def is_compactable(tensor: Tensor) -> bool:
    """Whether :func:`compact_` takes a tensor: it lies alone in memory of torch's own, among other things."""
    try:
        _check_tensor(tensor)
    except (TypeError, ValueError):
        return False
    return True


def _check_tensor(tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"compact_ needs a tensor; it got {type(tensor).__name__}")
    wrapper: object = tensor
    if tensor.layout != torch.strided or tensor.is_quantized or is_traceable_wrapper_subclass(wrapper):
        kind = f"{type(tensor).__name__} of layout {tensor.layout} and {tensor.dtype}"
        raise TypeError(f"compact_ needs a plain strided tensor; it got {kind}")
    if tensor.dim() == 0:
        raise ValueError("compact_ needs a tensor of one dimension or more; it got a number")
    if not tensor.is_leaf:
        raise ValueError(f"compact_ needs a leaf, not the result of {tensor.grad_fn}; detach() it first")
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError("compact_ needs a tensor that may change; this one was made under torch.inference_mode()")
    if tensor.is_conj() or tensor.is_neg():
        raise ValueError("compact_ needs the values themselves in memory; call resolve_conj() and resolve_neg() first")
    if not _nested(tensor):
        layout = f"shape {tuple(tensor.shape)} has strides {tensor.stride()}"
        raise ValueError(f"compact_ needs a tensor whose elements do not overlap; {layout}")
    _check_storage(tensor)


def _check_storage(tensor: Tensor) -> None:
    storage = tensor.untyped_storage()
    if tensor.storage_offset() != 0:
        offset = tensor.storage_offset()
        raise ValueError(f"compact_ needs a tensor at the start of its storage; this view starts {offset} elements in")
    if not storage.resizable() or (tensor.device.type == "cpu" and storage.is_shared()):
        raise ValueError("compact_ needs memory of torch's own, not numpy's, a file's or another process's; clone() it")
    # One use is the tensor's, one is that of the variable `storage`.
    if torch._C._storage_Use_Count(storage._cdata) > 2:
        raise ValueError(
            "compact_ needs a tensor that alone uses its storage; a view, detach() or .data of it is alive"
        )


def _checked_keep(name: str, keep: Tensor, tensor: Tensor, dim: int) -> Tensor:
    if not isinstance(keep, Tensor) or keep.dtype != torch.int64:
        kind = keep.dtype if isinstance(keep, Tensor) else type(keep).__name__
        raise TypeError(f"compact_ needs an int64 tensor of indices as {name}; it got {kind}")
    if keep.layout != torch.strided or keep.is_meta:
        what = "one on the meta device, without values" if keep.is_meta else f"one of layout {keep.layout}"
        raise TypeError(f"compact_ needs a plain tensor of indices as {name}; it got {what}")
    if keep.dim() != 1:
        raise ValueError(f"compact_ needs {name} of one dimension; it has shape {tuple(keep.shape)}")
    if dim >= tensor.dim():
        raise ValueError(f"compact_ needs a dimension {dim} for {name}; the tensor has shape {tuple(tensor.shape)}")
    keep = keep.detach().cpu()
    size = tensor.shape[dim]
    wrong = ((keep < 0) | (keep >= size)).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise IndexError(f"compact_ needs indices in [0, {size}) as {name}; position {at} has {int(keep[at])}")
    wrong = (keep[1:] <= keep[:-1]).nonzero()
    if len(wrong):
        at = int(wrong[0])
        pair = f"{int(keep[at])} is followed by {int(keep[at + 1])}"
        raise ValueError(f"compact_ needs {name} ascending and unique; {pair}")
    return keep


def _nested(tensor: Tensor) -> bool:
    extent = 1
    for d in reversed(memory_order(tensor.shape, tensor.stride())):
        if tensor.shape[d] != 1 and tensor.numel() > 0:
            if tensor.stride(d) < extent:
                return False
            extent = tensor.stride(d) * tensor.shape[d]
    return True


def dense_strides(tensor: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense tensor of this shape in the memory format of ``tensor``."""
    # Dimensions of size 1 leave the format open and torch tells it by their strides, so a named one is copied whole.
    formats = [torch.contiguous_format]
    formats += [torch.channels_last] if tensor.dim() == 4 else []
    formats += [torch.channels_last_3d] if tensor.dim() == 5 else []
    for memory_format in formats:
        if _empty_strides(tensor.shape, memory_format) == tensor.stride():
            return _empty_strides(shape, memory_format)
    strides, extent = [1] * len(shape), 1
    for d in reversed(memory_order(tensor.shape, tensor.stride())):
        strides[d] = extent
        extent *= max(shape[d], 1)
    return tuple(strides)


def _empty_strides(shape: Sequence[int], memory_format: torch.memory_format) -> tuple[int, ...]:
    return torch.empty(tuple(shape), device="meta", memory_format=memory_format).stride()


def _has_extension() -> bool:
    global _warned
    if _compaction is None and not _warned:
        _warned = True
        warnings.warn(
            f"fastmerge was installed without its C++ extension ({_why_missing}): compaction runs in Python. "
            "To change that, install fastmerge again where there is a C++ compiler.",
            RuntimeWarning,
            stacklevel=3,
        )
    return _compaction is not None


def _move_in_cpp(tensor: Tensor, keeps: Sequence[Tensor | None]) -> None:
    lists = [None if keep is None else keep.tolist() for keep in keeps]
    _compaction.compact(
        tensor.data_ptr(), tensor.element_size(), tensor.shape, tensor.stride(), lists, threads=torch.get_num_threads()
    )


def _release(tensor: Tensor, kept: int) -> None:
    begin, storage = tensor.data_ptr(), tensor.untyped_storage()
    _compaction.release(begin + kept * tensor.element_size(), begin + storage.nbytes())


def _shrink(tensor: Tensor, shape: Sequence[int], strides: Sequence[int]) -> None:
    storage = tensor.untyped_storage()
    set_data(tensor, tensor.new_empty(0).set_(storage, 0, tuple(shape), tuple(strides)))
    torch.autograd.graph.increment_version(tensor)
    _resize(storage, math.prod(shape) * tensor.element_size())


def _resize(storage: torch.UntypedStorage, size: int) -> None:
    if storage.device.type == "cpu" or size <= _STAGED_ABOVE:
        storage.resize_(size)
    else:
        _resize_through_host(storage, size)


def _resize_through_host(storage: torch.UntypedStorage, size: int) -> None:
    """Shrinks a storage without a second one beside it on the device.

    A device's allocator can't cut the end off a block, so torch takes a new one, copies, and lets go of the old one. What
    is too large for that waits on the host meanwhile.
    """
    memory = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (size,), (1,))
    values = memory.to("cpu", copy=True)
    storage.resize_(0)
    storage.resize_(size)
    memory.copy_(values)

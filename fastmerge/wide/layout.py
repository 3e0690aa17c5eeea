"""Channels-last on a CPU, where block-diagonal convolutions run faster on it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_DTYPES = (torch.float32, torch.bfloat16)


def prefers_channels_last(inputs: Iterable[Any]) -> bool:
    """Whether a network with these inputs should run channels-last although they are not."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    return (
        not torch.compiler.is_compiling()
        and any(x.dim() == 4 for x in tensors)
        and all(x.device.type == "cpu" and x.dtype in _DTYPES for x in tensors)
        # batched by torch.func.vmap they have no memory format
        and not any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors)
        and not any(x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) for x in tensors)
    )


def to_channels_last(inputs: Iterable[Any]) -> tuple[Any, ...]:
    """The inputs, four-dimensional ones channels-last."""
    return tuple(
        x.contiguous(memory_format=torch.channels_last) if isinstance(x, Tensor) and x.dim() == 4 else x for x in inputs
    )


def to_contiguous(outputs: Any) -> Any:
    """The outputs as a network of contiguous inputs gives them."""
    return tree_map(lambda y: y.contiguous() if isinstance(y, Tensor) and y.dim() == 4 else y, outputs)

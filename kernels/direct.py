"""Which of two ways to the same kernels a call takes.

torch.compile and other tracers see custom operators. Plain eager calls go through an ``autograd.Function``, which costs the
CPU a fraction of an operator's dispatch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def runs_direct(*tensors: Tensor) -> bool:
    """Whether nothing follows a call of these tensors: no compiler, dispatch mode, tensor subclass or torch.func."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return torch._C._functorch.maybe_current_level() is None and all(type(tensor) in _PLAIN for tensor in tensors)


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply`` of what ``runs_direct``, without its question to each argument whether torch.func made it."""
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]

"""Launches of Triton kernels that are planned once for all tensors that look alike.

Triton finds out at each call what it was called with; here ``looks`` of the tensors lead to a ``Launch`` that is remembered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

# Shape, strides, dtype, device, and whether it begins on a multiple of 16 bytes: all that a call depends on of a tensor.
Look = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device, bool]
Looks = tuple[Look | None, ...]


def looks(*tensors: Tensor | None) -> Looks:
    """How tensors look to what is remembered of a call."""
    return tuple(
        [None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16 == 0) for t in tensors]
    )


Function = TypeVar("Function", bound=Callable[..., Any])
_remembering: list[Any] = []


def remembered(function: Function) -> Function:
    """Keeps what a function finds out about shapes and strides, until all that is remembered is forgotten."""
    cached = functools.lru_cache(maxsize=4096)(function)
    _remembering.append(cached)
    return cached  # type: ignore[return-value]


def forget() -> None:
    """Empties all that is ``remembered``, compiled kernels among it."""
    for function in _remembering:
        function.cache_clear()


class Launch:
    """A kernel with all of its arguments but the tensors, and how far their streams are apart.

    It is made once for all calls whose ``looks`` are the same. Triton looks at the tensors of the first, and what it compiled
    runs all later ones.

    Args:
        function: the kernel. Its parameters come in the order tensors, distances, numbers, integers, constants.
        grid: three sizes.
        numbers: floats.
        integers: sizes and strides.
        constants: constexprs.
        warps: of a program.
    """

    def __init__(
        self,
        function: Any,
        grid: tuple[int, ...],
        numbers: tuple[float, ...],
        integers: tuple[int, ...],
        constants: dict[str, Any],
        warps: int = 4,
    ) -> None:
        self._function, self._grid, self._constants, self._warps = function, grid, constants, warps
        self._numbers = (*numbers, *integers)
        self._rest = (*self._numbers, *constants.values())
        self._compiled: dict[int, Any] = {}

    def __call__(self, tensors: Sequence[Tensor | None], apart: Sequence[int] = ()) -> None:
        """Launches the kernel.

        Args:
            tensors: pointers, the first not None; those that the plan hasn't looked at are new.
            apart: ``distances`` of the tensors of several streams.
        """
        first = tensors[0]
        assert first is not None
        device = first.get_device()
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self(tensors, apart)
            return
        compiled = self._compiled.get(device)
        if compiled is not None:
            compiled(*tensors, *apart, *self._rest)
            return
        compiled = self._function[self._grid](
            *tensors, *apart, *self._numbers, **self._constants, num_warps=self._warps
        )
        if compiled is not None:  # as it is in the interpreter
            self._compiled[device] = compiled[self._grid]

"""Nested state (state dicts, numbers, lists) as named tensors and JSON, and back."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

_PLAIN = (type(None), bool, int, float, str)


def pack(value: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Takes state apart.

    Args:
        value: Tensors, plain values, and dicts (keys str or int), lists, tuples and Counters of such.
        path: What names of tensors begin with.

    Returns:
        (structure, tensors): JSON values in which ``{"tensor": name}`` stands for a tensor, and copies of the tensors by
        name, contiguous and on the CPU.

    Raises:
        TypeError: Something else is in it; the message says where.
    """
    if isinstance(value, Tensor):
        return {"tensor": path}, {path: value.detach().cpu().clone(memory_format=torch.contiguous_format)}
    if type(value) in _PLAIN:
        return value, {}
    tensors: dict[str, Tensor] = {}

    def inner(item: Any, name: Any) -> Any:
        structure, found = pack(item, f"{path}/{name}" if path else str(name))
        tensors.update(found)
        return structure

    if isinstance(value, dict) and all(type(key) in (str, int) for key in value):
        kind = "counter" if isinstance(value, Counter) else "dict"
        return {kind: [[key, inner(item, key)] for key, item in value.items()]}, tensors
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [inner(item, index) for index, item in enumerate(value)]}, tensors
    raise TypeError(
        f"a checkpoint holds tensors, numbers, strings, lists and dicts; {path} is a {type(value).__name__}"
    )


def unpack(structure: Any, tensors: dict[str, Tensor]) -> Any:
    """Puts state together again from what :func:`pack` returned."""
    if not isinstance(structure, dict):
        return structure
    ((kind, content),) = structure.items()
    if kind == "tensor":
        return tensors[content]
    if kind in ("dict", "counter"):
        found = {key: unpack(item, tensors) for key, item in content}
        return Counter(found) if kind == "counter" else found
    items = [unpack(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)

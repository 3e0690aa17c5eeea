"""Short names for tensors' values, to tell whether they are the same elsewhere or later."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def fingerprint(tensors: nn.Module | Mapping[str, Any]) -> str:
    """64 bits of the SHA-256 of names, shapes, dtypes and values.

    Args:
        tensors: By name; what is no tensor is left out. Of a network, its state dict's.
    """
    digest = hashlib.sha256()
    for name, value in (tensors.state_dict() if isinstance(tensors, nn.Module) else tensors).items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def fingerprints(teachers: Sequence[nn.Module]) -> dict[str, str]:
    """Which teachers these are."""
    return {f"teacher {index}": fingerprint(teacher) for index, teacher in enumerate(teachers)}

"""How long a loader is, and where in its random order, its own or another's, on the way to and from checkpoints."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import torch


def length_of(loader: Any) -> int | None:
    """Batches of an epoch, where a loader has a length."""
    return len(loader) if isinstance(loader, Sized) else None


def loader_state(loader: Any) -> dict[str, Any]:
    """The states of a loader's own generators, and what its ``state_dict`` gives, if it has one."""
    state: dict[str, Any] = {"generators": [generator.get_state() for generator in _generators(loader)]}
    if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        state["state"] = loader.state_dict()
    return state


def restore_loader_state(loader: Any, state: dict[str, Any]) -> None:
    """Puts a loader back to where :func:`loader_state` was taken of it or of its like."""
    for generator, saved in zip(_generators(loader), state["generators"], strict=False):
        generator.set_state(saved)
    if "state" in state:
        loader.load_state_dict(state["state"])


def _generators(loader: Any) -> list[torch.Generator]:
    owners = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    owners.append(getattr(owners[-1], "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    unique = {id(generator): generator for generator in found if isinstance(generator, torch.Generator)}
    return list(unique.values())

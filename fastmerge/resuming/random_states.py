"""Random states: a process's (torch's on the CPU and a GPU, Python's, NumPy's), and where a loader is in its random order."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_states(device: torch.device) -> dict[str, Any]:
    """What :func:`restore_random_states` needs, as tensors and plain values."""
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    kind, keys, *rest = np.random.get_state(legacy=True)
    states["numpy"] = (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest)
    return states


def restore_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Goes back to random states; a GPU's stays as it is where the states were taken without one."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))


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

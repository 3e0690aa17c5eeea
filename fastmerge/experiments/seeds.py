"""One seed for every random decision of a run, so that each can be repeated without the others."""

from __future__ import annotations

import hashlib

import torch


def seed_for(*path: int | str) -> int:
    """A seed for what a path names, such as ``(0, "student", "weights", 3)``: 63 bits of its hash."""
    digest = hashlib.sha256(repr(path).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator_for(*path: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator started with :func:`seed_for`."""
    return torch.Generator(device).manual_seed(seed_for(*path))

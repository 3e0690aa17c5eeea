"""Philox4x32-10 in NumPy: the random numbers that the kernels must draw, computed independently of Triton.

Source: J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_LOW = np.uint64(0xFFFFFFFF)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)


def philox(counter: tuple[np.ndarray, ...], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Ten rounds of Philox4x32 on arrays of 32-bit words, kept in uint64."""
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = (np.uint64(word) for word in key)
    for _ in range(10):
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (high >> np.uint64(32)) ^ c1 ^ k0, high & _LOW
        c2, c3 = (low >> np.uint64(32)) ^ c3 ^ k1, low & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def uniforms(seed: int, n: int, channels: int) -> Tensor:
    """The numbers in [0, 1) behind the gates of one seed, float64 of shape (n, channels)."""
    quads = -(-n // 4)
    channel, quad = np.broadcast_arrays(np.arange(channels)[None, :], np.arange(quads)[:, None])
    zero = np.zeros_like(quad)
    words = np.stack(philox((channel, quad, zero, zero), (seed & 0xFFFFFFFF, seed >> 32)), axis=1)
    u = (words >> np.uint64(8)).astype(np.float64) * 2.0**-24
    return torch.from_numpy(u.reshape(4 * quads, channels)[:n].copy())

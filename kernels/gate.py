"""Sampling of all hard concrete gates of a network at once. Formula and reference: ``gate_formulas``.

Dims: N batch, C channels (all channel groups of a network, concatenated).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmerge.kernels.gate_formulas import (
    BETA,
    GAMMA,
    ZETA,
    hard_concrete,
    hard_concrete_mean,
    open_probability,
    sample_gates_reference,
)

__all__ = ["hard_concrete", "hard_concrete_mean", "open_probability", "sample_gates", "sample_gates_reference"]


def sample_gates(
    loc: Tensor,
    n: int,
    *,
    beta: float = BETA,
    gamma: float = GAMMA,
    zeta: float = ZETA,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draws hard concrete gates, one per sample and channel.

    ``u ~ U(0, 1)``, ``s = sigmoid((log u - log(1 - u) + loc) / beta)``, ``z = clamp(s (zeta - gamma) + gamma, 0, 1)``.

    Args:
        loc: location of each gate, shape (C,): all channel groups of a network, concatenated.
        n: number of samples.
        beta: temperature, above 0.
        gamma: lower end of the stretched interval, below 0.
        zeta: upper end of the stretched interval, above 1.
        dtype: dtype of the gates, that of ``loc`` if None. It changes the rounding of the result only: the gates are
            computed in float32, or in float64 for a float64 ``loc``.

    Returns:
        Gates in [0, 1], shape (n, C), differentiable with respect to ``loc``.

    Raises:
        ValueError: if ``loc`` isn't one-dimensional and floating, or ``n`` is negative.
    """
    if loc.dim() != 1 or not loc.is_floating_point():
        raise ValueError(f"sample_gates needs floating loc of shape (C,); got {loc.dtype} of shape {tuple(loc.shape)}")
    if n < 0:
        raise ValueError(f"sample_gates needs a number of samples of at least 0; got {n}")
    return sample_gates_reference(loc, n, beta=beta, gamma=gamma, zeta=zeta, dtype=dtype)

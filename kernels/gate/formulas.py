"""The hard concrete distribution in plain PyTorch: the reference of the fused gate sampling.

    s = sigmoid((log u - log(1 - u) + loc) / beta),   z = clamp(s (zeta - gamma) + gamma, 0, 1),   u ~ U(0, 1)

Everything is computed in float32, or in float64 for a float64 ``loc``, whatever the dtype of ``loc``.

Source: C. Louizos, M. Welling, D. Kingma, "Learning sparse neural networks through L0 regularization"
(arXiv 1712.01312), equations 10 to 12.

Dims: N batch, C channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BETA = 2 / 3
GAMMA = -0.1
ZETA = 1.1

# Uniform draws stay this far from 0 and 1, so that neither logarithm is infinite.
UNIFORM_MARGIN = 1e-6


def hard_concrete(u: Tensor, loc: Tensor, beta: float = BETA, gamma: float = GAMMA, zeta: float = ZETA) -> Tensor:
    """Maps uniform numbers to hard concrete gates.

    ``s = sigmoid((log u - log(1 - u) + loc) / beta)``, ``z = clamp(s (zeta - gamma) + gamma, 0, 1)``.

    Args:
        u: uniform numbers in [0, 1], shape (N, C); clamped to [1e-6, 1 - 1e-6].
        loc: location of each gate, shape (C,), or any shape that broadcasts with ``u``.
        beta: temperature, above 0.
        gamma: lower end of the stretched interval, below 0.
        zeta: upper end of the stretched interval, above 1.

    Returns:
        Gates in [0, 1], shape (N, C), in float32, or in float64 if ``loc`` is float64. Differentiable with respect to
        ``loc``; the gradient is exactly zero where the clamp holds.
    """
    dtype = computing_dtype(loc.dtype)
    u = u.to(dtype).clamp(UNIFORM_MARGIN, 1 - UNIFORM_MARGIN)
    s = torch.sigmoid((u.log() - (-u).log1p() + loc.to(dtype)) / beta)
    return F.hardtanh(s * (zeta - gamma) + gamma, 0.0, 1.0)  # faster than clamp, and NaN stays NaN


def hard_concrete_mean(loc: Tensor, gamma: float = GAMMA, zeta: float = ZETA) -> Tensor:
    """The deterministic gate ``clamp(sigmoid(loc) (zeta - gamma) + gamma, 0, 1)``.

    Args:
        loc: location of each gate, any shape.
        gamma: lower end of the stretched interval, below 0.
        zeta: upper end of the stretched interval, above 1.

    Returns:
        Gates in [0, 1], in the shape and dtype of ``loc``.
    """
    s = torch.sigmoid(loc.to(computing_dtype(loc.dtype)))
    return F.hardtanh(s * (zeta - gamma) + gamma, 0.0, 1.0).to(loc.dtype)


def open_probability(loc: Tensor, beta: float = BETA, gamma: float = GAMMA, zeta: float = ZETA) -> Tensor:
    """The probability that a sampled gate is above 0, ``sigmoid(loc - beta log(-gamma / zeta))``.

    Args:
        loc: location of each gate, any shape.
        beta: temperature, above 0.
        gamma: lower end of the stretched interval, below 0.
        zeta: upper end of the stretched interval, above 1.

    Returns:
        Probabilities, in the shape and dtype of ``loc``.
    """
    return torch.sigmoid(loc.to(computing_dtype(loc.dtype)) - beta * math.log(-gamma / zeta)).to(loc.dtype)


def sample_gates_reference(
    loc: Tensor,
    n: int,
    *,
    beta: float = BETA,
    gamma: float = GAMMA,
    zeta: float = ZETA,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draws hard concrete gates in plain PyTorch; arguments and result as those of ``gate.sample_gates``."""
    u = torch.rand(n, loc.shape[0], device=loc.device, dtype=computing_dtype(loc.dtype))
    return hard_concrete(u, loc, beta, gamma, zeta).to(dtype or loc.dtype)


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64: the dtype in which gates of ``dtype`` are computed."""
    return torch.promote_types(dtype, torch.float32)

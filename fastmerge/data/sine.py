"""Points of a noisy sine curve."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmerge.data.dataset import Dataset

PERIODS = 5
NOISE = 0.2


def sine_dataset(seed: int, points: int = 10_000) -> Dataset:
    """Draws points to train on and as many to test on: ``x ~ U(0, 1)``, ``y = sin(10 π x) + N(0, 0.2²)``.

    A network that knows the curve has a mean squared error of 0.04, the noise.

    Args:
        seed: the same seed gives the same points.
        points: in each of the two sets.

    Returns:
        Inputs and targets of shape (points, 1), float32.

    Source: Pašen & Boža, "Merging of neural networks", section 3.1.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw() -> tuple[Tensor, Tensor]:
        x = torch.rand(points, 1, generator=generator)
        return x, sine_curve(x) + NOISE * torch.randn(points, 1, generator=generator)

    return Dataset(*draw(), *draw())


def sine_curve(x: Tensor) -> Tensor:
    """The curve without noise, ``sin(10 π x)``."""
    return torch.sin(2 * math.pi * PERIODS * x)

"""How strongly the gate loss counts, epoch by epoch."""

from __future__ import annotations

import math
from typing import overload

from torch import Tensor


class QuadraticLambda:
    """The weight λ of the gate loss: ``λ ← λ + step √λ`` at the end of each epoch, so that λ grows quadratically.

    It multiplies like a number: ``loss = criterion(y, target) + lam * big.gate_loss()``.

    Args:
        start: λ in the first epoch, at least 0 (the paper: 0.01 for sine and Imagewoof, 0.05 for CIFAR, 0.3 for ImageNet).
        step: growth per epoch, at least 0 (the paper: 0.05; 0.2 for ImageNet).

    Raises:
        ValueError: if an argument is negative or not finite.

    Source: Pašen & Boža, "Merging of neural networks", section 3.
    """

    def __init__(self, start: float, step: float = 0.05) -> None:
        if not (math.isfinite(start) and start >= 0 and math.isfinite(step) and step >= 0):
            raise ValueError(f"QuadraticLambda needs finite start and step of at least 0; got {start=}, {step=}")
        self.value = float(start)
        self.step_size = float(step)

    def step(self) -> float:
        """Ends an epoch; returns the λ of the next one."""
        self.value += self.step_size * math.sqrt(self.value)
        return self.value

    def state_dict(self) -> dict[str, float]:
        """What :meth:`load_state_dict` needs to continue."""
        return {"value": self.value, "step_size": self.step_size}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continues from a :meth:`state_dict`."""
        self.value = float(state["value"])
        self.step_size = float(state["step_size"])

    def __float__(self) -> float:
        return self.value

    @overload
    def __mul__(self, other: float) -> float: ...
    @overload
    def __mul__(self, other: Tensor) -> Tensor: ...
    def __mul__(self, other: float | Tensor) -> float | Tensor:
        return self.value * other

    __rmul__ = __mul__

    def __repr__(self) -> str:
        return f"QuadraticLambda(value={self.value:.6g}, step={self.step_size:.6g})"

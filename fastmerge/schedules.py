"""How strongly the gate loss counts, epoch by epoch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, overload

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastmerge.big_student import BigStudent

GATE_MOMENTUM = 0.9  # of the gates' SGD
PAPERS_GATE_LR = 0.2
_GATE_PATH = 2000.0
_GATE_LR_MOST = 1.0
_PAPERS_STEP = 0.05
_LAM_LAST = 400.0
_LAM_MOST = 1000.0
_PULL = 100.0


class GateWeight(Protocol):
    """What weighs the gate loss in a merge stage: all that a training loop asks of it.

    Attributes:
        lam: λ in this epoch; None where there is no single number.
    """

    @property
    def lam(self) -> float | None: ...

    def begin(self, big: Any, opened: Tensor) -> None:
        """Looks at the big student, whose P[g > 0] are (..., G), before the first step and after loading a state."""

    def terms(self, device: torch.device) -> tuple[Tensor, ...]:
        """The numbers of this step as tensors: 0-d where all replicates share one, else with a row for each."""

    def weigh(self, big: Any, terms: tuple[Tensor, ...] | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """What to add to the criterion, the gate loss by itself, and P of the groups where :meth:`end_step` needs them.

        Args:
            big: one big student.
            terms: its :meth:`terms`, where they were taken before.
        """

    def end_step(self, opened: Tensor | None) -> None: ...

    def end_epoch(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


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

    @property
    def lam(self) -> float:
        """λ in this epoch."""
        return self.value

    def begin(self, big: Any, opened: Tensor) -> None:
        """Needs nothing of the big student."""

    def terms(self, device: torch.device) -> tuple[Tensor, ...]:
        """λ as a 0-d tensor."""
        return (torch.full((), self.value, dtype=torch.float32, device=device),)

    def weigh(self, big: BigStudent, terms: tuple[Tensor, ...] | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """λ times the gate loss, and the gate loss."""
        gate_loss = big.gate_loss()
        return (self.value if terms is None else terms[0]) * gate_loss, gate_loss, None

    def end_step(self, opened: Tensor | None) -> None:
        """λ is the same in all steps of an epoch."""

    def end_epoch(self) -> None:
        """:meth:`step`."""
        self.step()

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


def scaled_lam_step(start: float, step: float, whole: int, epochs: int) -> float:
    """The growth with which λ is in the last of some epochs what it is, with ``step``, in the last of a whole stage.

    Args:
        start: λ in the first epoch.
        step: growth per epoch in the whole stage.
        whole: length of the whole stage in epochs.
        epochs: length of the other.
    """
    if epochs == whole or start == 0 or step == 0:
        return step
    wanted = _lams(start, step, max(2, whole))[-1]

    def reaches(growth: float) -> bool:
        return _lams(start, growth, max(2, epochs))[-1] >= wanted

    low, high = 0.0, step
    while not reaches(high):
        low, high = high, 2 * high
    return _least(reaches, low, high, 1e-6)


def fitting_gate_lr(steps: int | None) -> float:
    """A learning rate with which the gates of a stage decide, each for itself, and don't just reach 1/T on the average.

    λ moves all gates of a group alike; what tells them apart is the criterion's gradient, and that takes a product of
    learning rate and steps of about 2,000. The paper's stages have more with its 0.2, which is the least. With less, groups
    arrive at 1/T by gates that are open every other time: the big student falls below its teachers, and compression chooses
    by chance. Beyond 1.0, which is the most, groups that many layers add to settle before λ has brought them to 1/T.
    docs/ablations.md compares it with the paper's.

    Args:
        steps: Batches in the stage, or None where that is not known.
    """
    return PAPERS_GATE_LR if steps is None else min(_GATE_LR_MOST, max(PAPERS_GATE_LR, _GATE_PATH / steps))


def fitting_lam_step(epochs: int, steps: int | None, channels: int, lam_start: float, gate_lr: float) -> float:
    """A growth of λ that brings the gates to 1/T within the stage.

    λ ends where the recipe of digits has it, at 400, or higher where the widest group needs it. The paper's sine stage ends
    at 14.8. That is too little for layers of few channels, however long the stage is: at the start, the criterion holds the
    gates of a layer of eight open against a λ of up to 17, and the slope of the gate loss falls on the way to 1/T. With
    14.8, networks of two to four narrow layers on digits and MNIST, with BatchNorm or without, end up to 0.49 above 1/T
    after 180 steps, and no nearer after 1,620; with 400, they end within 0.05 of it after 180.

    The gate loss is a mean over a group's channels, so its pull on each falls with their number. Summed over the stage,
    ``Σ λ · gate_lr / (1 - momentum) / channels`` has to reach about 100 for P[g > 0] to arrive. While λ ended at 14.8, in
    stages of ten epochs, two LeNets on digits and on Imagewoof at 28 x 28, 100 left every group at 0.50, 50 at 0.51 to
    0.64. A stage of too few steps for that gets a λ that ends at 1,000, beside which the criterion still counts, and the
    warning that the gates did not arrive.

    Args:
        epochs: Length of the stage.
        steps: Batches in the stage, or None where that is not known.
        channels: Candidates of the widest group.
        lam_start: λ in the first epoch.
        gate_lr: Learning rate of the gates.
    """
    pull = 0.0 if steps is None else gate_lr / (1 - GATE_MOMENTUM) / channels * steps / epochs
    if epochs == 1 or lam_start == 0:
        return _PAPERS_STEP  # there is nothing to fit: λ does not grow

    def is_enough(growth: float) -> bool:
        values = _lams(lam_start, growth, epochs)
        arrives = values[-1] >= _LAM_LAST and (not pull or pull * sum(values) >= _PULL)
        return arrives or values[-1] >= _LAM_MOST

    return _least(is_enough, 0.0, 1e6, 1e-3)


def _lams(start: float, growth: float, epochs: int) -> list[float]:
    """λ in each epoch."""
    lam = QuadraticLambda(start, growth)
    return [lam.value, *(lam.step() for _ in range(epochs - 1))]


def _least(is_enough: Callable[[float], bool], low: float, high: float, precision: float) -> float:
    """The least number that is enough, by bisection; ``high`` is."""
    while high - low > precision * high:
        middle = (low + high) / 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high

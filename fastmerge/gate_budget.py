"""A weight of the gate loss that steers itself, so that a stage of any length ends with 1/T of the channels open."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmerge.big_student import BigStudent
from fastmerge.schedules import GATE_MOMENTUM

ANNEAL = 0.6
_SWINGS = 30.0  # the control's frequency times the length of the stage
_FASTEST = 0.04  # and its limit, in radians a step, below which the gates' momentum hardly lags
_DAMPING = 1.4
_LEAST_SLOPE = 1e-3  # of (dP/dloc)²: where all gates are settled, the push on them has a limit


class GateBudget:
    """One Lagrange multiplier per channel group, by dual ascent: every group ends the merge stage with P[g > 0] near 1/T.

    P is the mean of a group's P[g > 0], and t its present target. The loss of a step, and the update after it, are

        ``Σ over groups of (m (P - t) + c/2 (P - t)²) / s`` and ``m ← m + k (P - t)``.

    t falls linearly from the first P to 1/T over the first part of the stage (``anneal``), and then stays. s is the present
    mean of the gates' (dP/dloc)²; with it, gates that are nearly settled react like others. Under the gates' own SGD, P then
    moves by ``a m`` a step, with ``a = lr / (1 - momentum) / size``. ``c = 2.8 ω / a`` and ``k = ω² / a`` damp its swings.
    Their frequency ω is 30 / steps, 0.04 at most, so that stages of any length reach the target. Below about 100 steps gates
    with momentum have no time to settle.

    Use: ``loss = criterion(big(x), y) + budget.loss(big)``, and ``budget.step()`` after the optimizers' step.

    Args:
        steps: length of the merge stage in steps, at least 1.
        gate_lr: learning rate of the gates' SGD, above 0.
        momentum: of the gates' SGD, in 0..1, below 1.
        anneal: the fraction of the stage in which t falls, above 0, at most 1.

    Attributes:
        multipliers: m per channel group, (G,), positive where gates are held back; None before the first loss.
        targets: t per channel group, (G,); None before the first loss.

    Raises:
        ValueError: if an argument is out of range.

    Source: our own; the paper weighs one gate loss by a growing λ, see :class:`~fastmerge.QuadraticLambda`.
    """

    def __init__(
        self, steps: int, *, gate_lr: float = 0.2, momentum: float = GATE_MOMENTUM, anneal: float = ANNEAL
    ) -> None:
        if not (steps >= 1 and 0 < gate_lr < float("inf") and 0 <= momentum < 1 and 0 < anneal <= 1):
            raise ValueError(
                "GateBudget needs steps of at least 1, a finite gate_lr above 0, momentum in [0, 1) and anneal in (0, 1]; "
                f"got {steps=}, {gate_lr=}, {momentum=}, {anneal=}"
            )
        self.steps, self.gate_lr, self.momentum, self.anneal = steps, gate_lr, momentum, anneal
        self.done = 0
        self.multipliers: Tensor | None = None
        self.starts: Tensor | None = None
        self.goal: Tensor | float = 0.0
        self._answer: Tensor | None = None  # a, per group
        self._now: Tensor | None = None  # P of the last loss

    def loss(self, big: BigStudent) -> Tensor:
        """What to add to the criterion in this step, a 0-d tensor; it remembers P for :meth:`step`."""
        open_now, slopes = big.open_state()
        self.begin(big, open_now)
        self._now = open_now.detach()
        return penalty(open_now, slopes, *self.terms())

    @property
    def lam(self) -> None:
        """There is no single λ."""

    def weigh(self, big: BigStudent, terms: tuple[Tensor, ...] | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The penalty of this step, the gate loss without a gradient, and P of the groups."""
        open_now, slopes = big.open_state()
        if terms is None:
            self.begin(big, open_now)
            terms = self.terms()
        return penalty(open_now, slopes, *terms), big.gate_loss(open_now.detach()), open_now.detach()

    def end_step(self, opened: Tensor | None) -> None:
        """:meth:`step`."""
        self.step(opened)

    def end_epoch(self) -> None:
        """It goes by steps."""

    def step(self, open_now: Tensor | None = None) -> None:
        """Ends a step of the stage.

        Args:
            open_now: P in the step that ends; None is that of the last :meth:`loss`.

        Raises:
            RuntimeError: There was no loss yet.
        """
        open_now = self._now if open_now is None else open_now
        if open_now is None or self.multipliers is None or self.targets is None or self._answer is None:
            raise RuntimeError("GateBudget.step() needs a call of GateBudget.loss() before it; there was none")
        self.multipliers = self.multipliers + self._frequency**2 / self._answer * (open_now - self.targets)
        self.done += 1

    def begin(self, big: BigStudent, open_now: Tensor) -> None:
        """Takes the groups' sizes from the big student and, at the first step of all, where their gates stand.

        Args:
            big: whose gates they are.
            open_now: P, (..., G): of one big student, or of several of one shape.
        """
        if self._answer is None or self._answer.device != open_now.device:
            sizes = [big.num_teachers * group.size for group in big.groups]
            rate = self.gate_lr / (1 - self.momentum)
            self._answer = rate / torch.tensor(sizes, dtype=torch.float32, device=open_now.device)
            self.goal = big.shares(open_now)
        if self.multipliers is None or self.starts is None:
            self.starts = open_now.detach().float()
            self.multipliers = torch.zeros_like(self.starts)
        elif self.multipliers.device != open_now.device:
            self.starts, self.multipliers = self.starts.to(open_now.device), self.multipliers.to(open_now.device)

    @property
    def targets(self) -> Tensor | None:
        """t per channel group, in the present step."""
        if self.starts is None:
            return None
        return self.starts + (self.goal - self.starts) * min(1.0, self.done / (self.anneal * self.steps))

    def terms(self, device: torch.device | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """m, t and c of the present step, as :func:`penalty` takes them, all of the shape of m."""
        assert self.multipliers is not None
        assert self.targets is not None
        assert self._answer is not None
        return (
            self.multipliers,
            self.targets,
            (2 * _DAMPING * self._frequency / self._answer).expand_as(self.multipliers),
        )

    @property
    def _frequency(self) -> float:
        return min(_SWINGS / self.steps, _FASTEST)

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to continue."""
        return {"steps": self.steps, "done": self.done, "multipliers": self.multipliers, "starts": self.starts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a :meth:`state_dict`."""
        self.steps, self.done = int(state["steps"]), int(state["done"])
        self.multipliers, self.starts = state["multipliers"], state["starts"]

    def __repr__(self) -> str:
        return f"GateBudget(steps={self.steps}, done={self.done}, gate_lr={self.gate_lr:g}, momentum={self.momentum:g})"


def penalty(open_now: Tensor, slopes: Tensor, multipliers: Tensor, targets: Tensor, curvature: Tensor) -> Tensor:
    """``Σ (m (P - t) + c/2 (P - t)²) / s`` over the last dimension; s has no gradient and a least value."""
    over = open_now - targets
    return ((multipliers * over + curvature / 2 * over.square()) / slopes.detach().clamp(min=_LEAST_SLOPE)).sum(-1)

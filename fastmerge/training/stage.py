"""How a stage of stacked networks trains, and what an epoch of it came to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastmerge.training.order import Augment

Criterion = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Stage:
    """How one stage trains.

    Attributes:
        name: what progress and warnings call it.
        epochs: passes over the training data, at least 0.
        lr: learning rate of the weights.
        milestones: epochs after which the learning rate is multiplied by ``lr_decay``, as in torch's MultiStepLR.
        criterion: ``criterion(output, target)`` of one network and batch, a mean over the batch.
        gate_lr: learning rate of the gates, which have the same momentum and no weight decay.
    """

    name: str
    epochs: int
    lr: float
    batch_size: int
    criterion: Criterion
    milestones: tuple[int, ...] = ()
    lr_decay: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    gate_lr: float = 0.0
    augment: Augment | None = None

    def lr_at(self, epoch: int) -> float:
        """The learning rate of the weights in an epoch, counted from 0."""
        return self.lr * self.lr_decay ** sum(epoch >= milestone for milestone in self.milestones)


@dataclass(frozen=True)
class EpochLosses:
    """Means over one epoch, in training mode, as it went.

    Attributes:
        epoch: counts from 1.
        loss: the criterion, (R,), on the CPU.
        gate_loss: the gate loss without λ, (R,), or None where there are no gates.
        lam: λ in this epoch, or None where there are no gates or a budget steers them.
    """

    epoch: int
    loss: Tensor
    gate_loss: Tensor | None
    lam: float | None

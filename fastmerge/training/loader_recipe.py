"""Every choice of an experiment on images that don't fit in memory: its networks train one after another, over loaders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from fastmerge.data.augmentation import Augmentation
from fastmerge.schedules import scaled_lam_step

_WARM_FROM = 1e-4


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one network, or one stage of it, trains.

    Attributes:
        epochs: passes over the training data, at least 1.
        lr: learning rate, after the warm-up.
        milestones: epochs after which it is divided by ten.
        warmup: epochs in which it rises, linearly from 0.0001.
    """

    epochs: int
    lr: float
    milestones: tuple[int, ...] = ()
    warmup: int = 0

    def scaled(self, budget: float) -> Plan:
        """A fraction of it; milestones move along, a warm-up of less than half an epoch goes."""
        epochs = max(1, round(self.epochs * budget))
        factor = epochs / self.epochs
        milestones = tuple(max(1, round(value * factor)) for value in self.milestones)
        return replace(self, epochs=epochs, milestones=milestones, warmup=round(self.warmup * factor))

    def factor(self, epoch: int) -> float:
        """The learning rate in an epoch, counted from 0, over :attr:`lr`."""
        if epoch < self.warmup:
            return (_WARM_FROM + (self.lr - _WARM_FROM) * epoch / self.warmup) / self.lr
        return float(0.1 ** sum(epoch >= milestone for milestone in self.milestones))

    def schedule(self, optimizer: Optimizer) -> LRScheduler:
        """The scheduler of an optimizer that begins with :attr:`lr`, stepped once an epoch."""
        return LambdaLR(optimizer, self.factor)


@dataclass(frozen=True, kw_only=True)
class LoaderRecipe:
    """Every choice of one experiment over loaders; strategies are compared at equal epochs.

    Attributes:
        name: as on the command line.
        make_network: ``make_network(classes, width)``, a network with fresh weights.
        most_classes: that the data may have; the network has as many as the data.
        image_size: height and width of the images that networks read.
        augmentation: how training images are cut and changed, and how validation images are cut.
        batch_size: images per step.
        teacher: each of the two teachers.
        merge: the merge stage.
        finetune: the student after compression.
        long: one network for all epochs.
        third: each of the three of which the best counts.
        momentum, weight_decay: of SGD; gates have a momentum of 0.9 and no weight decay.
        gate_lr: learning rate of the gates; None fits it to the steps of the merge stage, see
            :func:`~fastmerge.schedules.fitting_gate_lr`, which with the paper's steps is the paper's.
        lam_start, lam_step: λ grows as :class:`~fastmerge.QuadraticLambda`.
        gate_schedule: "quadratic" for λ, "budget" for a :class:`~fastmerge.GateBudget`, which needs no λ.
        link_at: fraction of the merge stage before the big student becomes dense.
        compact_at: fraction of the merge stage after which closed channels are dropped, or "settled"; None never.
        recalibrate: whether BatchNorm's statistics are estimated anew after compression.
        test_every: epochs between two looks at the test data; the end of a stage always has one.
        source: where the choices come from.
    """

    name: str
    make_network: Callable[[int, int], nn.Module]
    most_classes: int
    image_size: int
    augmentation: Augmentation
    batch_size: int
    teacher: Plan
    merge: Plan
    finetune: Plan
    long: Plan
    third: Plan
    momentum: float
    weight_decay: float
    gate_lr: float | None
    lam_start: float
    lam_step: float
    link_at: float
    source: str
    gate_schedule: Literal["quadratic", "budget"] = "quadratic"
    metric: Literal["test_accuracy"] = "test_accuracy"
    test_every: int = 1
    compact_at: float | Literal["settled"] | None = None
    recalibrate: bool = True

    def __post_init__(self) -> None:
        student = 2 * self.teacher.epochs + self.merge.epochs + self.finetune.epochs
        if self.long.epochs != student or not student <= 3 * self.third.epochs < student + 3:
            raise ValueError(
                f"a recipe needs strategies of equal epochs: the student has {student}, one has {self.long.epochs}, the "
                f"best of three has 3 x {self.third.epochs}"
            )

    @property
    def epochs(self) -> int:
        """In all, of each strategy."""
        return self.long.epochs

    def scaled(self, budget: float) -> LoaderRecipe:
        """The same experiment with a fraction of the epochs.

        Every stage shrinks by the budget, rounded; the networks that are compared with the student have as many epochs as
        it takes, or a little more. λ grows faster, so that it ends where it would have.

        Raises:
            ValueError: the budget is not above 0.
        """
        if not budget > 0:
            raise ValueError(f"a budget must be above 0; got {budget}")
        teacher, merge, finetune = (plan.scaled(budget) for plan in (self.teacher, self.merge, self.finetune))
        epochs = 2 * teacher.epochs + merge.epochs + finetune.epochs
        return replace(
            self,
            teacher=teacher,
            merge=merge,
            finetune=finetune,
            long=self.long.scaled(epochs / self.long.epochs),
            third=self.third.scaled(-(-epochs // 3) / self.third.epochs),
            lam_step=scaled_lam_step(self.lam_start, self.lam_step, self.merge.epochs, merge.epochs),
            test_every=max(1, round(self.test_every * epochs / self.epochs)),
        )

    def config(self) -> dict[str, Any]:
        """The choices as JSON values; functions by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["make_network"] = f"{self.make_network.__module__}.{self.make_network.__qualname__}"
        for name, value in values.items():
            if isinstance(value, (Plan, Augmentation)):
                values[name] = {field.name: getattr(value, field.name) for field in fields(value)}
        return {"epochs": self.epochs, **values}

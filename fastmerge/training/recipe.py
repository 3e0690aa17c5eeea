"""Every choice of one experiment."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from fastmerge.data.dataset import Dataset
from fastmerge.data.decoding import OnBadImage
from fastmerge.schedules import fitting_gate_lr, scaled_lam_step
from fastmerge.training.order import Augment
from fastmerge.training.stage import Criterion, Stage


class LoadData(Protocol):
    """Gives a data set.

    Args:
        path: where it is; None where it comes from nowhere.
        seed: of what is drawn.
        on_bad_image: what a file that can't be read does, where there are files.
    """

    def __call__(self, path: Path | None, seed: int, on_bad_image: OnBadImage = "raise", /) -> Dataset: ...


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every choice of one experiment; strategies are compared at equal epochs.

    Attributes:
        name: as on the command line.
        metric: what strategies are compared by, and what best-of-three chooses by, on the test data.
        make_network: ``make_network(width)``, a network with fresh weights.
        load_data: ``load_data(path, seed, on_bad_image)``, the data set.
        criterion: of one network and batch, a mean over the batch.
        epochs: in all, of each strategy: teachers take 1/3 each, merge stage and fine-tuning 1/6 each.
        batch_size: samples per step.
        lr: learning rate of the weights at the start of every stage.
        teacher_milestones, long_milestones, merge_milestones, finetune_milestones: epochs of a teacher, of ``one``, of the
            merge stage and of fine-tuning after which the learning rate is divided by ten.
        momentum, weight_decay: of SGD; gates have the same momentum and no weight decay.
        gate_lr: learning rate of the gates; None fits it to the steps of the merge stage, see :meth:`fitted`.
        lam_start, lam_step: λ grows as :class:`~fastmerge.QuadraticLambda`.
        gate_schedule: "quadratic" for λ, "budget" for a :class:`~fastmerge.GateBudget`, which needs no λ.
        link_at: fraction of the merge stage before the big student becomes dense.
        compact_at: fractions of the merge stage, between 0 and 1, after which channels whose gates are closed for good are
            dropped (see :meth:`BigStudent.compact <fastmerge.BigStudent.compact>`); None for none. Replicates that
            differ in size from then on train one after another.
        augment: random changes of training images, or None.
        test_every: epochs between two looks at the test data; the end of a stage always has one.
        stack: replicates trained as one batched network. Results depend on it only by rounding and by gates' draws.
        curve: for a regression of one variable, ``curve()`` gives inputs (points, 1) and the true values to draw.
        source: where the choices come from.
    """

    name: str
    metric: Literal["test_loss", "test_accuracy"]
    make_network: Callable[[int], nn.Module]
    load_data: LoadData
    criterion: Criterion
    epochs: int
    batch_size: int
    lr: float
    teacher_milestones: tuple[int, ...]
    long_milestones: tuple[int, ...]
    finetune_milestones: tuple[int, ...]
    momentum: float
    weight_decay: float
    gate_lr: float | None
    lam_start: float
    lam_step: float
    link_at: float
    augment: Augment | None
    test_every: int
    stack: int
    source: str
    gate_schedule: Literal["quadratic", "budget"] = "quadratic"
    merge_milestones: tuple[int, ...] = ()
    compact_at: tuple[float, ...] | None = None
    curve: Callable[[], tuple[Tensor, Tensor]] | None = None

    def __post_init__(self) -> None:
        if self.epochs < 6 or self.epochs % 6:
            raise ValueError(f"a recipe needs epochs that divide by 6, for its stages to add up; got {self.epochs}")
        if not all(0 < at < 1 for at in self.compact_at or ()):
            raise ValueError(f"compact_at takes fractions of the merge stage, between 0 and 1; got {self.compact_at}")

    @property
    def unit(self) -> int:
        """A sixth of the epochs: the merge stage, fine-tuning, half a teacher."""
        return self.epochs // 6

    def merge_steps(self, samples: int) -> int:
        """Steps of the merge stage, with so many training samples."""
        return self.unit * math.ceil(samples / self.batch_size)

    def fitted(self, samples: int) -> Recipe:
        """The same with a ``gate_lr``: its own, or the one that fits the steps with so many training samples.

        With the paper's steps that is the paper's, see :func:`~fastmerge.schedules.fitting_gate_lr`.
        """
        return self if self.gate_lr is not None else replace(self, gate_lr=fitting_gate_lr(self.merge_steps(samples)))

    def scaled(self, budget: float) -> Recipe:
        """The same experiment with a fraction of the epochs.

        Every stage and milestone shrinks by the budget, rounded so that the strategies stay equal, and λ grows faster,
        so that it ends where it would have.

        Raises:
            ValueError: the budget is not above 0.
        """
        if not budget > 0:
            raise ValueError(f"a budget must be above 0; got {budget}")
        unit = max(1, round(self.unit * budget))
        factor = unit / self.unit

        def milestones(values: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(max(1, round(value * factor)) for value in values)

        return replace(
            self,
            epochs=6 * unit,
            teacher_milestones=milestones(self.teacher_milestones),
            long_milestones=milestones(self.long_milestones),
            merge_milestones=milestones(self.merge_milestones),
            finetune_milestones=milestones(self.finetune_milestones),
            lam_step=scaled_lam_step(self.lam_start, self.lam_step, self.unit, unit),
            test_every=max(1, round(self.test_every * factor)),
        )

    def teacher_stage(self) -> Stage:
        """A teacher, or one of three."""
        return self._stage("teachers", 2 * self.unit, self.teacher_milestones)

    def long_stage(self) -> Stage:
        """One network for all epochs."""
        return self._stage("long run", self.epochs, self.long_milestones)

    @property
    def link_from(self) -> int:
        """The epoch of the merge stage, counted from 0, before which the big student becomes dense."""
        return round(self.link_at * self.unit)

    @property
    def compact_from(self) -> list[int]:
        """The epochs of the merge stage, counted from 0, before which closed channels are dropped."""
        epochs = {round(at * self.unit) for at in self.compact_at or ()}
        return sorted(epochs - {0, self.unit})

    def merge_stage(self) -> Stage:
        """The merge stage as a whole."""
        return self._merge_stage(self.unit, self.merge_milestones)

    def merge_parts(self) -> list[tuple[int, Stage]]:
        """The merge stage where nothing changes the network's shape: where each part begins, and the part."""
        borders = sorted({0, self.link_from, *self.compact_from, self.unit})
        return [
            # milestones at 0 or less are past
            (first, self._merge_stage(end - first, tuple(mark - first for mark in self.merge_milestones)))
            for first, end in pairwise(borders)
        ]

    def finetune_stage(self) -> Stage:
        """The student after compression."""
        return self._stage("fine-tune", self.unit, self.finetune_milestones)

    def config(self) -> dict[str, Any]:
        """The choices as JSON values; functions by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {key: _name(value) if callable(value) else value for key, value in values.items() if value is not None}

    def _stage(self, name: str, epochs: int, milestones: tuple[int, ...]) -> Stage:
        return Stage(
            name=name,
            epochs=epochs,
            lr=self.lr,
            batch_size=self.batch_size,
            criterion=self.criterion,
            milestones=milestones,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            augment=self.augment,
        )

    def _merge_stage(self, epochs: int, milestones: tuple[int, ...]) -> Stage:
        if self.gate_lr is None:
            raise ValueError(f"{self.name}: the merge stage needs a gate_lr, which fitted() finds")
        return replace(self._stage("merge", epochs, milestones), gate_lr=self.gate_lr)


def _name(function: Any) -> str:
    return f"{function.__module__}.{function.__qualname__}"

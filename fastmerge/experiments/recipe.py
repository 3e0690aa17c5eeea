"""Every choice of one experiment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from fastmerge.data.augmentation import Augmentation
from fastmerge.data.dataset import Dataset
from fastmerge.data.decoding import OnBadImage
from fastmerge.evaluation import Criterion
from fastmerge.merging.options import Options, Plan
from fastmerge.schedules import scaled_lam_step


class LoadData(Protocol):
    """Gives a data set.

    Args:
        path: where it is; None where it comes from nowhere.
        seed: for what is drawn.
        on_bad_image: what a file that can't be read does, where there are files.
    """

    def __call__(self, path: Path | None, seed: int, on_bad_image: OnBadImage = "raise", /) -> Dataset: ...


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every choice of one experiment; strategies are compared at equal epochs or at equal cost.

    A recipe either loads a data set that stays in memory, and trains its replicates as stacks, or it reads images by
    loaders, and trains one network after another.

    Attributes:
        name: as on the command line.
        make_network: ``make_network(classes, width)``, a network with fresh weights.
        merge: the options of the merge, as :func:`fastmerge.merge` takes them; momentum and weight decay are those of all
            networks.
        teacher: each of the teachers.
        long: one network for all epochs.
        third: each of the three of which the best counts; None is ``teacher``.
        batch_size: samples per step.
        teachers: how many the student has.
        metric: what strategies are compared by, on the test data.
        held_out: fraction of the training data that no network trains on, for strategies that choose among networks.
        test_every: epochs between two looks at the test data; the end of a stage always has one.
        load_data: ``load_data(path, seed, on_bad_image)``, for data in memory; None for images by loaders.
        augment: random changes of images in memory.
        stack: replicates in memory that train as one. Results depend on it only by rounding and by gates' draws.
        curve: for a regression of one variable, ``curve()`` gives inputs (points, 1) and the true values to draw.
        image_size, augmentation, most_classes: of images by loaders.
        source: where the choices come from.
    """

    name: str
    make_network: Callable[[int, int], nn.Module]
    merge: Options
    teacher: Plan
    long: Plan
    batch_size: int
    source: str
    third: Plan | None = None
    teachers: int = 2
    metric: Literal["test_loss", "test_accuracy"] = "test_accuracy"
    held_out: float = 0.1
    test_every: int = 1
    load_data: LoadData | None = None
    augment: Callable[[Tensor, Any], Tensor] | None = None
    stack: int = 1
    curve: Callable[[], tuple[Tensor, Tensor]] | None = None
    image_size: int = 0
    augmentation: Augmentation | None = None
    most_classes: int = 0

    def __post_init__(self) -> None:
        student = self.teachers * self.teacher.epochs + self.merge.merge_epochs + self.merge.finetune_epochs
        if self.long.epochs != student or not student <= 3 * self.best_of.epochs < student + 3:
            raise ValueError(
                f"a recipe needs strategies of equal epochs: the student has {student}, one has {self.long.epochs}, the "
                f"best of three has 3 x {self.best_of.epochs}"
            )
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is a fraction of the training data, above 0 and below 1; got {self.held_out}")
        if self.batch_size < 1:
            raise ValueError(f"a recipe needs a batch_size of at least 1; got {self.batch_size}")

    @property
    def in_memory(self) -> bool:
        """Whether its data is loaded as a whole, and its replicates train as stacks."""
        return self.load_data is not None

    @property
    def best_of(self) -> Plan:
        """Each of three networks of which the best counts."""
        return self.teacher if self.third is None else self.third

    @property
    def criterion(self) -> Criterion:
        """The loss of all networks."""
        return self.merge.criterion

    @property
    def epochs(self) -> int:
        """In all, of each strategy."""
        return self.long.epochs

    def scaled(self, budget: float) -> Recipe:
        """The same experiment with a fraction of the epochs.

        Every stage and milestone shrinks by the budget, rounded so that the strategies stay equal, and λ grows faster, so
        that it ends where it would have.

        Raises:
            ValueError: the budget is not above 0.
        """
        if not budget > 0:
            raise ValueError(f"a budget must be above 0; got {budget}")
        merge, finetune = self.merge.merge_plan.scaled(budget), self.merge.finetune_plan
        # Where stages are multiples of the merge stage, they stay so.
        even = all(
            plan.epochs % self.merge.merge_epochs == 0 for plan in (self.teacher, finetune, self.long, self.best_of)
        )
        factor = merge.epochs / self.merge.merge_epochs if even else budget
        finetune, teacher = finetune.scaled(factor), self.teacher.scaled(factor)
        epochs = self.teachers * teacher.epochs + merge.epochs + finetune.epochs
        step = self.merge.lam_step
        if step is not None:
            step = scaled_lam_step(self.merge.lam_start, step, self.merge.merge_epochs, merge.epochs)
        return replace(
            self,
            teacher=teacher,
            long=self.long.scaled(epochs / self.long.epochs),
            third=None if self.third is None else self.third.scaled(-(-epochs // 3) / self.third.epochs),
            merge=replace(
                self.merge,
                merge_epochs=merge.epochs,
                merge_milestones=merge.milestones or None,
                finetune_epochs=finetune.epochs,
                milestones=finetune.milestones,
                warmup=finetune.warmup,
                lam_step=step,
            ),
            test_every=max(1, round(self.test_every * epochs / self.epochs)),
        )

    def varied(self, paper: bool = False, batch_size: int | None = None, **options: Any) -> Recipe:
        """The same with other options of the merge, or another batch size in all stages.

        Args:
            paper: takes the paper's, see :meth:`Options.as_in_the_paper`.
            batch_size: samples per step; of all processes together where they share a network. Learning rates stay.
            options: of :class:`Options`; None is the recipe's own.

        Raises:
            ValueError: the paper's choices and others are asked for, or one is out of range.
        """
        changes = {name: value for name, value in options.items() if value is not None}
        if paper and changes:
            raise ValueError(f"--paper sets {', '.join(options)} itself; leave them out, or leave out --paper")
        merge = self.merge.as_in_the_paper() if paper else replace(self.merge, **changes)
        size = self.batch_size if batch_size is None else batch_size
        return replace(self, merge=merge, batch_size=size)

    def training(self, plan: Plan) -> Options:
        """How a network trains by itself: the fine-tuning of a merge of this plan.

        What concerns gates and students alone is left at its default: checkpoints of such networks don't depend on it.
        """
        defaults: dict[str, Any] = {each.name: each.default for each in fields(Options) if each.metadata["merging"]}
        return replace(
            self.merge,
            **defaults,
            finetune_epochs=plan.epochs,
            finetune_lr=plan.lr,
            milestones=tuple(plan.milestones),
            warmup=plan.warmup,
        )

    def config(self) -> dict[str, Any]:
        """The choices as JSON values; functions by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = {name: _plain(value) for name, value in values.items() if value is not None}
        return {"epochs": self.epochs, **plain, "merge": self.merge.compared()}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return f"{value.__module__}.{value.__qualname__}" if callable(value) else value

"""The numbers of a merge: how long its stages are and how they train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from fastmerge.big_student import BigStudent
from fastmerge.gate_budget import GateBudget
from fastmerge.merging.checks import check_compact_at, check_epochs, check_numbers
from fastmerge.schedules import GateWeight, QuadraticLambda, fitting_gate_lr, fitting_lam_step

GateSchedule = Literal["quadratic", "budget"]
CompactAt = float | Literal["settled"] | None


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """The choices of a merge that are numbers, under the names that :func:`fastmerge.merge` explains.

    Raises:
        ValueError: One is out of range; the message names it.
    """

    merge_epochs: int
    finetune_epochs: int
    link_at: float
    lr: float
    momentum: float
    weight_decay: float
    gate_lr: float | None
    lam_start: float
    lam_step: float | None
    finetune_lr: float | None
    milestones: Sequence[int] | None
    gate_schedule: GateSchedule = "quadratic"
    compact_at: CompactAt = None
    merge_milestones: Sequence[int] | None = None
    recalibrate: bool = True

    def __post_init__(self) -> None:
        check_epochs(self.merge_epochs, self.finetune_epochs)
        if self.gate_schedule not in (names := get_args(GateSchedule)):
            raise ValueError(f"merge needs a gate_schedule of {' or '.join(names)}; got {self.gate_schedule!r}")
        check_compact_at(self.compact_at)
        positive = {"lr": self.lr, "finetune_lr": self.first_finetune_lr}
        positive |= {} if self.gate_lr is None else {"gate_lr": self.gate_lr}
        names = ("momentum", "weight_decay", "lam_start", "lam_step")
        check_numbers(positive, {name: getattr(self, name) or 0 for name in names}, self.link_at)

    def compacts_after(self, epochs: int) -> bool:
        """Whether candidates are dropped when so many epochs of the merge stage are over."""
        if self.compact_at is None or epochs == self.merge_epochs:  # then everything is compressed anyway
            return False
        return self.compact_at == "settled" or epochs >= self.compact_at * self.merge_epochs

    @property
    def first_finetune_lr(self) -> float:
        """The learning rate at the start of the fine-tuning."""
        return self.lr if self.finetune_lr is None else self.finetune_lr

    @property
    def finetune_milestones(self) -> list[int]:
        """Epochs of the fine-tuning after which the learning rate is divided by ten."""
        if self.milestones is None:
            return [max(1, round(self.finetune_epochs * 2 / 3))]
        return list(self.milestones)

    def merge_lr(self, epoch: int) -> float:
        """The weights' learning rate in an epoch of the merge stage, counted from 0."""
        return float(self.lr * 0.1 ** sum(epoch >= milestone for milestone in self.merge_milestones or ()))

    def options(self) -> dict[str, Any]:
        """All of it as JSON values."""
        values = asdict(self)
        lists = ("milestones", "merge_milestones")
        return values | {name: None if values[name] is None else list(values[name]) for name in lists}

    def fitted(self, big: BigStudent, steps: int | None) -> MergePlan:
        """The same plan with a ``gate_lr`` and a ``lam_step``: those chosen, or those that fit this network and stage.

        Args:
            big: The network.
            steps: Of an epoch, or None where that is not known.
        """
        in_all = None if steps is None else self.merge_epochs * steps
        gate_lr = fitting_gate_lr(in_all) if self.gate_lr is None else self.gate_lr
        lam_step = self.lam_step
        if lam_step is None and self.gate_schedule == "quadratic":
            widest = big.num_teachers * max(group.size for group in big.groups)
            lam_step = fitting_lam_step(self.merge_epochs, in_all, widest, self.lam_start, gate_lr)
        return replace(self, gate_lr=gate_lr, lam_step=lam_step)


def gate_schedule(plan: MergePlan, steps: int | None) -> GateWeight:
    """What weighs the gates in the merge stage of a fitted plan.

    Raises:
        ValueError: A budget has to know how many steps there are, and the loader has no length.
    """
    if plan.gate_schedule == "quadratic":
        assert plan.lam_step is not None
        return QuadraticLambda(plan.lam_start, plan.lam_step)
    if steps is None:
        raise ValueError(
            "gate_schedule='budget' needs a train_loader with a length, to arrive in time; this one has none"
        )
    assert plan.gate_lr is not None
    return GateBudget(plan.merge_epochs * steps, gate_lr=plan.gate_lr)


def describe_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options that are no JSON values by their names."""
    return {
        name: value if isinstance(value, (type(None), bool, int, float)) else getattr(value, "__qualname__", str(value))
        for name, value in options.items()
    }

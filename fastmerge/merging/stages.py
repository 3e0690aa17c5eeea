"""The paper's loop: the big student learns which channels matter, is compressed, and the student is fine-tuned."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

from fastmerge.big_student import BigStudent
from fastmerge.channels.groups import choice_warning
from fastmerge.isolation import quietly
from fastmerge.merging.checks import Schedule
from fastmerge.merging.gate_report import gate_warnings, open_probabilities, origins, undecided_warnings
from fastmerge.merging.plan import MergePlan, gate_schedule
from fastmerge.merging.trainer import Trainer
from fastmerge.narrowing.closing import UnsettledGatesWarning
from fastmerge.resuming.fingerprint import fingerprint
from fastmerge.schedules import GATE_MOMENTUM


def train_student(
    teachers: Sequence[nn.Module], examples: Any, plan: MergePlan, schedule: Schedule | None, trainer: Trainer
) -> nn.Module:
    """Merges teachers: both stages, and the scores at their borders.

    Args:
        teachers: Networks of one architecture; they are not changed.
        examples: What their forward takes.
        plan: The numbers.
        schedule: Makes the fine-tuning's learning rate scheduler, in place of the plan's milestones.
        trainer: Trains an epoch, scores, and keeps the record.
    """
    place = trainer.setting.place
    if trainer.state.stage == "finetune":  # a checkpoint has the weights; of the teacher only the network is needed
        student = place(copy.deepcopy(teachers[0])).requires_grad_(True)
    else:
        student = place(_merged(teachers, examples, plan, trainer))
        if plan.recalibrate:
            trainer.recalibrate(student)
        trainer.score("compressed", student)
    trainer.processes.check_same("student after compression", fingerprint(student))
    finetune(student, plan, schedule, trainer)
    history = trainer.history
    known = history.stage("finetune")[-1].val if plan.finetune_epochs else history.borders.get("compressed")
    trainer.score("student", student, known)
    return student.eval()


def _merged(teachers: Sequence[nn.Module], examples: Any, plan: MergePlan, trainer: Trainer) -> nn.Module:
    """Everything up to the compressed student."""
    place = trainer.setting.place
    if trainer.val_loader is not None and trainer.state.stage is None:
        for index, teacher in enumerate(teachers):
            trainer.score(f"teacher {index}", place(copy.deepcopy(teacher)))
    big = place(BigStudent(*teachers, example_inputs=examples))
    trainer.own_random_numbers()
    if trainer.state.stage is None:
        with big.open_gates():
            trainer.score("big student, gates open", big)
    learn_importance(big, plan.fitted(big, trainer.steps), trainer)
    trainer.score("big student", big, trainer.history.stage("merge")[-1].val)
    trainer.history.kept = origins(big)
    with quietly(category=UnsettledGatesWarning):  # said already, with what to change
        return big.compress(in_place=True)  # the memory of both is worth more to the fine-tuning


def learn_importance(big: BigStudent, plan: MergePlan, trainer: Trainer) -> None:
    """The merge stage: trains weights and gates with the loss ``criterion + λ · gate_loss``, or as the budget says."""
    optimizer = SGD(big.weight_parameters(), plan.lr, plan.momentum, weight_decay=plan.weight_decay)
    assert plan.gate_lr is not None
    gate_optimizer = SGD(big.gate_parameters(), plan.gate_lr, GATE_MOMENTUM)
    few = choice_warning(big.groups)
    trainer.history.warnings = [few] if few else []
    _warn(trainer.history.warnings, trainer)
    lam = gate_schedule(plan, trainer.steps)
    before = open_probabilities(big)
    lam_step = plan.lam_step if plan.gate_schedule == "quadratic" else None
    parts = {"optimizer": optimizer, "gate optimizer": gate_optimizer, "lambda": lam}
    for epoch in trainer.epochs("merge", plan.merge_epochs, big, parts):
        if not big.linked and epoch >= plan.link_at * plan.merge_epochs:
            big.link(optimizer=optimizer)
        for group in optimizer.param_groups:
            group["lr"] = plan.merge_lr(epoch)
        trainer.epoch("merge", big, [optimizer, gate_optimizer], lam)
        lam.end_epoch()
        if plan.compacts_after(epoch + 1):
            done = big.compact(optimizer, gate_optimizer, settled=plan.compact_at == "settled")
            trainer.history.compactions.append({"epoch": epoch + 1, **asdict(done)})
    found = gate_warnings(before, open_probabilities(big), 1 / big.num_teachers, lam_step) + undecided_warnings(big)
    trainer.history.warnings += found
    _warn(found, trainer)


def _warn(found: Sequence[str], trainer: Trainer) -> None:
    for warning in found if trainer.processes.is_first else ():
        warnings.warn(warning, stacklevel=6)


def finetune(student: nn.Module, plan: MergePlan, schedule: Schedule | None, trainer: Trainer) -> None:
    """Trains the student as usual."""
    optimizer = SGD(student.parameters(), plan.first_finetune_lr, plan.momentum, weight_decay=plan.weight_decay)
    scheduler = MultiStepLR(optimizer, plan.finetune_milestones) if schedule is None else schedule(optimizer)
    parts = {"optimizer": optimizer, "scheduler": scheduler}
    for _ in trainer.epochs("finetune", plan.finetune_epochs, student, parts):
        trainer.epoch("finetune", student, [optimizer], None)
        with quietly(
            "Detected call of .lr_scheduler.step"
        ):  # an epoch that a checkpoint goes on with may have no step left
            scheduler.step()

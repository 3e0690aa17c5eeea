"""The paper's loop: the big student learns which channels matter, is compressed, and the student is fine-tuned."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastmerge.big_student import BigStudent
from fastmerge.channels.groups import choice_warning
from fastmerge.checkpoints import fingerprint
from fastmerge.history import mean_of
from fastmerge.isolation import quietly
from fastmerge.merging.label_sets import PartCriterion, Reached
from fastmerge.merging.layerwise import Parts
from fastmerge.merging.options import Options
from fastmerge.merging.trainer import Trainer, open_probabilities
from fastmerge.narrowing.closing import UnsettledGatesWarning, listed, unsettled
from fastmerge.stack import BigStack, Stack

_MOVED = 0.01


def train_student(teachers: Sequence[nn.Module], examples: Any, options: Options, trainer: Trainer) -> nn.Module:
    """Merges teachers: both stages, and the scores at their borders.

    Args:
        teachers: Networks of one architecture; they are not changed.
        examples: What their forward takes.
        options: Of the merge.
        trainer: Trains an epoch, scores, and keeps the record.
    """
    place = trainer.setting.place
    if trainer.state.stage == "finetune":  # a checkpoint has the weights; of the teacher only the network is needed
        student = place(blank_student(teachers, examples, options)).requires_grad_(True)
    else:
        student = place(_merged(teachers, examples, options, trainer))
        if options.recalibrate:
            trainer.recalibrate(student)
        trainer.score("compressed", student)
    trainer.processes.check_same("student after compression", fingerprint(student))
    finetune(student, options, trainer, teachers)
    history = trainer.history
    known = history.stage("finetune")[-1].val if options.finetune_epochs else history.borders.get("compressed")
    trainer.score("student", student, known)
    return student.eval()


def _merged(teachers: Sequence[nn.Module], examples: Any, options: Options, trainer: Trainer) -> nn.Module:
    """Everything up to the compressed student."""
    place = trainer.setting.place
    if trainer.val_loader is not None and trainer.state.stage is None and options.heads == "average":
        for index, teacher in enumerate(teachers):
            trainer.score(f"teacher {index}", place(copy.deepcopy(teacher)))
    if options.layerwise > 1:
        big = _learned_in_parts(Parts(teachers, examples, options), trainer)
    else:
        big = place(widened(teachers, examples, options))
        trainer.own_random_numbers()
        if trainer.state.stage is None:
            with big.open_gates():
                trainer.score("big student, gates open", big)
        learn_importance(big, options.fitted(big, trainer.steps), trainer)
    trainer.score("big student", big, trainer.history.stage("merge")[-1].val)
    trainer.history.kept = origins(big)
    with quietly(category=UnsettledGatesWarning):  # said already, with what to change
        return big.compress(in_place=True)  # the memory of both is worth more to the fine-tuning


def widened(teachers: Sequence[nn.Module], examples: Any, options: Options) -> Any:
    """The big student of some teachers; of stacks of teachers, the stack of their big students."""
    if not isinstance(teachers[0], Stack):
        return BigStudent(*teachers, example_inputs=examples, **options.of_big)
    return BigStack([BigStudent(*each, example_inputs=examples, **options.of_big) for each in _columns(teachers)])


def _columns(stacks: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, ...]]:
    """The teachers of each replicate."""
    return zip(*[stack.networks() for stack in stacks if isinstance(stack, Stack)], strict=True)


def blank_student(teachers: Sequence[nn.Module], examples: Any, options: Options) -> nn.Module:
    """A network of the student's shapes, whose weights are still to come."""
    if options.keep is None:
        return copy.deepcopy(teachers[0])
    students = []
    for each in _columns(teachers) if isinstance(teachers[0], Stack) else [teachers]:
        big = BigStudent(*each, example_inputs=examples, **options.of_big, verify=False)
        students.append(big.compress(in_place=True, keep={name: range(width) for name, width in big.widths.items()}))
    return Stack(students) if isinstance(teachers[0], Stack) else students[0]


def _learned_in_parts(parts: Parts, trainer: Trainer) -> Any:
    """The merge stage in parts of the depth: the big student of the last one, whose other gates are fixed."""
    first, state = trainer.state.saved("merge")
    start = parts.beginning_with(first)
    chosen = parts.chosen(state, start)
    big: Any = None
    trainer.own_random_numbers()
    for number in range(start, len(parts)):
        before, big = big, parts.build(number, chosen)
        if before is not None:
            big.adopt(before)
        big = trainer.setting.place(big)
        del before
        options, names = parts.options_of(number).fitted(big, trainer.steps), parts.groups[number]
        learn_importance(big, options, trainer, parts.first(number), names)
        if not big.linked:
            big.link()
        chosen |= {name: kept for name, kept in big.keep().items() if name in names}
    return big


def learn_importance(
    big: BigStudent | BigStack, options: Options, trainer: Trainer, first: int = 0, names: Collection[str] | None = None
) -> None:
    """The merge stage: trains weights and gates with the loss ``criterion + λ · gate_loss``, or as the budget says.

    Args:
        big: is trained.
        options: fitted to it.
        trainer: trains.
        first: the epoch of the stage, counted from 0, with which this part of it begins.
        names: of the channel groups whose gates are learned; None: all.
    """
    plan = options.merge_plan
    optimizer, gate_optimizer = options.weight_optimizer(big, options.lr), options.gate_optimizer(big)
    few = choice_warning(big.groups)
    if few and not first:
        _warn([few], trainer)
    lam, rates = options.gate_weight(trainer.steps), [group["lr"] for group in optimizer.param_groups]
    before = open_probabilities(big)
    lam_step = options.lam_step if options.gate_schedule == "quadratic" else None
    parts = {"optimizer": optimizer, "gate optimizer": gate_optimizer, "lambda": lam}
    for now in trainer.epochs("merge", first + plan.epochs, big, parts, first):
        epoch = now - first
        if not big.linked and options.is_linked_in(epoch):
            big.link(optimizer=optimizer)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * plan.factor(epoch)
        if not now and trainer.state.stage is None and isinstance(options.criterion, PartCriterion):  # a whole epoch
            reached = Reached(options.criterion.sets)
            trainer.watch = reached.note
        trainer.epoch("merge", big, [optimizer, gate_optimizer], lam)
        if trainer.watch is not None:
            trainer.watch = None
            _warn(reached.warnings(trainer.processes), trainer)
        lam.end_epoch()
        if options.compacts_after(epoch + 1):
            done = big.compact(optimizer, gate_optimizer, settled=options.compact_at == "settled")
            trainer.history.compactions.append({"epoch": now + 1, **asdict(done)})
    after = {name: value for name, value in open_probabilities(big).items() if names is None or name in names}
    found = gate_warnings(before, after, big.target, lam_step, options.merge_epochs) + undecided_warnings(big)
    _warn(found, trainer)


def _warn(found: Sequence[str], trainer: Trainer) -> None:
    known = trainer.history.warnings  # where a merge goes on, with those before
    known += [warning for warning in found if warning not in known]
    for warning in found if trainer.processes.is_first else ():
        warnings.warn(warning, stacklevel=7)


def gate_warnings(
    before: dict[str, Any],
    after: dict[str, Any],
    target: float | Mapping[str, float],
    lam_step: float | None,
    epochs: int,
) -> list[str]:
    """Says which channel groups' mean P[g > 0] did not move in the merge stage, or did not arrive where they should.

    Args:
        before, after: Mean P[g > 0] by group, before and after the stage.
        target: 1/T, or by group the part of the candidates that is kept.
        lam_step: What there is to change; None for a budget that steers itself.
        epochs: Length of the stage. λ does not grow within a single one.
    """
    sizes = {len(value) for value in after.values() if isinstance(value, list)}
    before, after = ({name: mean_of(value) for name, value in each.items()} for each in (before, after))
    still = [name for name in after if abs(after[name] - before[name]) < _MOVED]
    found = unsettled(after, {}, target, still)
    if still:
        found = {"still": f"P[g>0] did not move in {listed(still, after)}; chance decides which channels stay"} | found
    raised = "gate_lr or merge_epochs" if lam_step is None else f"lam_step (now {lam_step:g}), gate_lr or merge_epochs"
    if lam_step is not None and epochs == 1:
        raised = "merge_epochs, since λ only grows between epochs, or take gate_schedule='budget'"
    lowered = "" if lam_step is None else f"lower lam_step (now {lam_step:g}) or "
    remedies = {"still": f"raise {raised}", "above": f"raise {raised}", "below": f"{lowered}raise merge_epochs"}
    if {"above", "below"} <= found.keys():  # λ is too small for some groups and too large for others
        remedies = dict.fromkeys(remedies, "raise merge_epochs")
    whose = f"mean of {max(sizes)} replicates: " if sizes else ""
    return [f"{whose}{problem}: {remedies[kind]}" for kind, problem in found.items()]


@torch.no_grad()
def undecided_warnings(big: BigStudent | BigStack) -> list[str]:
    """Says which channel groups consist of gates that are open every other time, where each should be open or closed."""
    opened = big.open_candidates()
    spreads = big.group_means(4 * opened * (1 - opened))  # what was dropped is decided
    spreads = (spreads.mean(0) if isinstance(big, BigStack) else spreads).tolist()
    found = unsettled({}, dict(zip(big.gates, spreads, strict=True)), 1 / big.num_teachers)
    return [f"{problem}: raise gate_lr or merge_epochs" for problem in found.values()]


def origins(big: BigStudent | BigStack) -> Any:
    """Counts, for each channel group, how many of the kept channels came from each teacher; for a stack, of each in a list."""
    if isinstance(big, BigStack):
        return [origins(network) for network in big.networks()]
    kept = big.keep()
    return {
        group.name: torch.bincount(kept[group.name].cpu() // group.size, minlength=big.num_teachers).tolist()
        for group in big.groups
    }


def finetune(student: nn.Module, options: Options, trainer: Trainer, teachers: Sequence[nn.Module] = ()) -> None:
    """Trains the student as usual, or with teachers beside the labels."""
    plan = options.finetune_plan
    if teachers and options.distill:
        trainer.teach(teachers)
    optimizer = options.weight_optimizer(student, plan.lr)
    plan = replace(plan, lr=float(optimizer.param_groups[0]["lr"]))
    scheduler = (plan.schedule if options.schedule is None else options.schedule)(optimizer)
    parts: dict[str, Any] = {"optimizer": optimizer, "scheduler": scheduler}
    average = None
    if options.ema is not None:
        parts["average"] = average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(options.ema))
        trainer.after_step = partial(average.update_parameters, student)
    for _ in trainer.epochs("finetune", plan.epochs, student, parts):
        trainer.epoch("finetune", student, [optimizer], None, None if average is None else average.module)
        # an epoch that a checkpoint goes on with may have no step left
        with quietly("Detected call of .lr_scheduler.step"):
            scheduler.step()
    trainer.after_step = None
    optimizer.zero_grad()
    if average is not None and average.n_averaged:
        with torch.no_grad():
            for own, mean in zip(student.parameters(), average.module.parameters(), strict=True):
                own.copy_(mean)

"""From trained teachers to one student: the merge stage, compression and fine-tuning."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR

from fastmerge.big_student import BigStudent
from fastmerge.evaluation import Criterion, Setting
from fastmerge.history import EpochRecord, History
from fastmerge.merge_checks import check_device, check_epochs, check_loader, check_numbers, check_teachers
from fastmerge.merge_progress import Progress
from fastmerge.merge_trainer import Trainer, open_probabilities
from fastmerge.schedules import QuadraticLambda

_GATE_MOMENTUM = 0.9
_PAPERS_STEP = 0.05
_LAM_LAST = 14.8
_LAM_MOST = 1000.0
_PULL = 100.0
_NEAR = 0.1
_MOVED = 0.01
_LISTED = 4


def merge(
    teachers: Sequence[nn.Module],
    train_loader: Iterable[Any],
    *,
    val_loader: Iterable[Any] | None = None,
    merge_epochs: int = 30,
    finetune_epochs: int = 30,
    link_at: float = 0.0,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    gate_lr: float = 0.2,
    lam_start: float = 0.01,
    lam_step: float | None = None,
    finetune_lr: float | None = None,
    milestones: Sequence[int] | None = None,
    schedule: Callable[[Optimizer], LRScheduler] | None = None,
    criterion: Criterion = cross_entropy,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    channels_last: bool = False,
    seed: int | None = None,
    progress: bool | None = None,
    callback: Callable[[EpochRecord], object] | None = None,
) -> tuple[nn.Module, History]:
    """Merges trained teachers of one architecture into a student of that architecture.

    The merge stage trains the big student with the loss ``criterion + λ · gate_loss``; compression keeps the best 1/T
    of its channels; fine-tuning trains the student as usual. The teachers are never changed. Ctrl-C stops at once and
    leaves nothing behind.

    Args:
        teachers: Two or more trained networks of one architecture.
        train_loader: Yields (input, target) batches, once over the data per ``iter``. A tuple of tensors in place of
            the input goes to a network of several inputs.
        val_loader: The same for validation: scored after every epoch and at the borders of the stages.
        merge_epochs: Length of the merge stage, at least 1.
        finetune_epochs: Length of the fine-tuning, at least 0.
        link_at: Fraction of the merge stage in which the big student is block-diagonal, which costs less compute; the
            off-diagonal weights are trained after it. It becomes dense at the first epoch that starts at or after this
            fraction; 0 is the paper, 1 is never.
        lr, momentum, weight_decay: Of the weights' SGD, in both stages. Gates get no weight decay.
        gate_lr: Of the gates' own SGD, whose momentum is 0.9.
        lam_start: λ in the first epoch.
        lam_step: λ grows by ``lam_step · √λ`` per epoch; the paper's is 0.05. None fits it to this stage's length, so
            that a short stage too brings the gates to 1/T; see :func:`fitting_lam_step`.
        finetune_lr: Learning rate at the start of the fine-tuning; None is ``lr``.
        milestones: Epochs of the fine-tuning after which the learning rate is divided by ten; None is at two thirds.
        schedule: Makes a learning rate scheduler for the fine-tuning, stepped once an epoch, in place of milestones.
        criterion: ``criterion(output, target)``, the mean over a batch.
        device: Where to train; None is where the first teacher is.
        autocast: Dtype for ``torch.autocast``; None for none. float16 uses a gradient scaler.
        channels_last: Trains in the channels-last layout, which convolutions on a GPU prefer.
        seed: Makes the merge repeatable; the caller's random state is restored. None draws from the caller's.
        progress: Whether to show a progress bar on stderr; None shows it on a terminal.
        callback: Called with the record of each epoch. What it raises ends the merge.

    Returns:
        (student, history): the student is on ``device``, in eval mode.

    Raises:
        TypeError, ValueError: Teachers, data or options can't work. All that can be found out is found out before the
            first epoch.
        FloatingPointError: A loss became NaN or Inf.

    Source: M. Pašen, V. Boža, "Merging of neural networks" (arXiv 2204.09973), section 2.
    """
    teachers = check_teachers(teachers)
    check_epochs(merge_epochs, finetune_epochs)
    finetune_lr = lr if finetune_lr is None else finetune_lr
    positive = {"lr": lr, "gate_lr": gate_lr, "finetune_lr": finetune_lr}
    not_negative = {
        "momentum": momentum,
        "weight_decay": weight_decay,
        "lam_start": lam_start,
        "lam_step": lam_step or 0,
    }
    check_numbers(positive, not_negative, link_at)
    setting = Setting(check_device(device, teachers[0]), criterion, autocast, channels_last)
    cuda = [setting.device] if setting.device.type == "cuda" else []
    with torch.random.fork_rng(cuda, enabled=seed is not None), Progress(progress) as bar:
        if seed is not None:
            torch.manual_seed(seed)
        inputs = check_loader("train_loader", train_loader, teachers[0], setting)
        if val_loader is not None:
            check_loader("val_loader", val_loader, teachers[0], setting)
        history = History(len(teachers))
        trainer = Trainer(train_loader, val_loader, setting, history, bar, callback)
        if val_loader is not None:
            for index, teacher in enumerate(teachers):
                trainer.score(f"teacher {index}", setting.place(copy.deepcopy(teacher)))

        big = setting.place(BigStudent(*teachers, example_inputs=_examples(inputs, teachers[0])))
        with big.open_gates():
            trainer.score("big student, gates open", big)
        optimizer = SGD(big.weight_parameters(), lr, momentum, weight_decay=weight_decay)
        gate_optimizer = SGD(big.gate_parameters(), gate_lr, _GATE_MOMENTUM)
        if lam_step is None:
            steps = merge_epochs * len(train_loader) if isinstance(train_loader, Sized) else None
            widest = len(teachers) * max(group.size for group in big.groups)
            lam_step = fitting_lam_step(merge_epochs, steps, widest, lam_start, gate_lr)
        lam = QuadraticLambda(lam_start, lam_step)
        before = open_probabilities(big)
        bar.start("merge", merge_epochs, train_loader)
        for epoch in range(merge_epochs):
            if not big.linked and epoch >= link_at * merge_epochs:
                big.link(optimizer=optimizer)
            trainer.epoch("merge", big, [optimizer, gate_optimizer], lam)
            lam.step()
        trainer.score("big student", big)
        history.warnings = gate_warnings(before, open_probabilities(big), 1 / len(teachers), lam_step)
        for warning in history.warnings:
            warnings.warn(warning, stacklevel=2)

        history.kept = origins(big)
        student = setting.place(big.compress())
        trainer.score("compressed", student)
        del big, optimizer, gate_optimizer  # their memory is worth more to the student

        optimizer = SGD(student.parameters(), finetune_lr, momentum, weight_decay=weight_decay)
        milestones = [max(1, round(finetune_epochs * 2 / 3))] if milestones is None else list(milestones)
        scheduler = MultiStepLR(optimizer, milestones, gamma=0.1) if schedule is None else schedule(optimizer)
        bar.start("fine-tune", finetune_epochs, train_loader)
        for _ in range(finetune_epochs):
            trainer.epoch("finetune", student, [optimizer], None)
            scheduler.step()
        trainer.score("student", student)
    return student.eval(), history


def fitting_lam_step(epochs: int, steps: int | None, channels: int, lam_start: float, gate_lr: float) -> float:
    """A growth of λ that brings the gates to 1/T within the stage.

    λ ends where the paper's sine stage has it after 150 epochs, at 14.8, or higher where the widest group needs it: the
    gate loss is a mean over a group's channels, so its pull on each falls with their number. Summed over the stage,
    ``Σ λ · gate_lr / (1 - momentum) / channels`` has to reach about 100 for P[g > 0] to arrive against the criterion's
    own pull. In stages of ten epochs, two LeNets on digits and on Imagewoof at 28 x 28, 100 left every group at 0.50,
    50 at 0.51 to 0.64. A stage of too few steps for that gets a λ that ends at 1,000, beside which the criterion still
    counts, and the warning that the gates did not arrive.

    Args:
        epochs: Length of the stage.
        steps: Batches in the stage, or None where that is not known.
        channels: Candidates of the widest group.
        lam_start: λ in the first epoch.
        gate_lr: Learning rate of the gates.
    """
    pull = 0.0 if steps is None else gate_lr / (1 - _GATE_MOMENTUM) / channels * steps / epochs
    if epochs == 1 or lam_start == 0:
        return _PAPERS_STEP  # there is nothing to fit: λ does not grow
    low, high = 0.0, 1e6
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        lam = QuadraticLambda(lam_start, middle)
        values = [lam.value, *(lam.step() for _ in range(epochs - 1))]
        enough = values[-1] >= _LAM_LAST and (not pull or pull * sum(values) >= _PULL)
        if not enough and values[-1] < _LAM_MOST:
            low = middle
        else:
            high = middle
    return high


def gate_warnings(before: dict[str, float], after: dict[str, float], target: float, lam_step: float) -> list[str]:
    """Says which channel groups' mean P[g > 0] did not move in the merge stage, or did not arrive near 1/T.

    Args:
        before, after: Mean P[g > 0] by group, before and after the stage.
        target: 1/T.
        lam_step: What there is to change.
    """
    still = [name for name in after if abs(after[name] - before[name]) < _MOVED]
    above = [name for name in after if name not in still and after[name] > target + _NEAR]
    below = [name for name in after if name not in still and after[name] < target - _NEAR]
    found = []
    if still:
        found.append(f"P[g>0] did not move in {_listed(still, after)}; chance decides which channels stay")
    if above:
        found.append(f"P[g>0] is above 1/T = {target:.2f} in {_listed(above, after)}; compression cuts channels in use")
    if below:
        found.append(
            f"P[g>0] is below 1/T = {target:.2f} in {_listed(below, after)}; compression keeps closed channels"
        )
    remedies = [f"raise lam_step (now {lam_step:g}), gate_lr or merge_epochs"] * (bool(still) + bool(above))
    remedies += [f"lower lam_step (now {lam_step:g}) or raise merge_epochs"] * bool(below)
    return [f"{problem}: {remedy}" for problem, remedy in zip(found, remedies, strict=True)]


def origins(big: BigStudent) -> dict[str, list[int]]:
    """Counts, for each channel group, how many of the kept channels came from each teacher."""
    return {
        name: torch.bincount(keep.cpu() // len(keep), minlength=big.num_teachers).tolist()
        for name, keep in big.keep().items()
    }


def _listed(names: list[str], after: dict[str, float]) -> str:
    listed = ", ".join(f"{name} ({after[name]:.2f})" for name in names[:_LISTED])
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} of {len(after)} channel groups, {listed}{more}"


def _examples(inputs: tuple[Tensor, ...], teacher: nn.Module) -> Tensor | tuple[Tensor, ...]:
    # Tracing runs where the teachers are, and two samples are as good as a batch.
    device = check_device(None, teacher)
    examples = tuple(value[:2].to(device) for value in inputs)
    return examples[0] if len(examples) == 1 else examples

"""Knowledge distillation: one network learns what the teachers say together. Without teachers it is plain training."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastmerge.evaluation import Criterion
from fastmerge.history import History
from fastmerge.merging.api import train_by
from fastmerge.merging.options import Options
from fastmerge.methods.cost import unwatched
from fastmerge.methods.registry import register
from fastmerge.methods.samples import check_batches

DISTILL = 0.5  # weight of what teachers say, where they are asked


def train(
    network: nn.Module,
    batches: Iterable[Any],
    *,
    epochs: int,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    milestones: Sequence[int] | None = None,
    warmup: int = 0,
    criterion: Criterion = cross_entropy,
    teachers: Sequence[nn.Module] = (),
    distill: float = DISTILL,
    temperature: float = 2.0,
    how: Mapping[str, Any] | None = None,
) -> History:
    """Trains a network in place, as merges fine-tune their students.

    Args:
        network: on the device where it is to be trained; left in eval mode.
        batches: yields (input, target), once over the data per ``iter``.
        epochs: how many.
        lr: learning rate of SGD.
        momentum: of SGD.
        weight_decay: of SGD.
        milestones: epochs after which the learning rate is divided by ten; None is at two thirds.
        warmup: epochs in which the learning rate rises to its value.
        criterion: ``criterion(output, target)``, a mean over the batch.
        teachers: to learn from, too; none by default.
        distill: weight of the teachers' logits in the loss; the criterion has 1 - distill.
        temperature: of the teachers' and of the network's softmax.
        how: options of :func:`fastmerge.merge` that do not change what comes out: ``progress``, ``checkpoint_dir`` and so on.

    Raises:
        TypeError, ValueError: the batches can't be iterated again and again, or do not fit the network or the criterion.
    """
    options = Options(
        finetune_epochs=epochs,
        finetune_lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        milestones=milestones,
        warmup=warmup,
        criterion=criterion,
        distill=distill,
        temperature=temperature,
        **{"progress": False, **(how or {})},
    )
    check_batches("the loader", batches, network, criterion, trained=True, distilled=bool(teachers))
    with unwatched() as meter, torch.enable_grad():
        history = train_by(options, network.requires_grad_(True), batches, teachers=teachers)
        if meter is not None:
            meter.add_training(network, batches, epochs)
            for teacher in teachers:
                meter.add_forward(teacher, batches, epochs)
    return history


@register(
    "distill",
    needs="training",
    source="G. Hinton et al., Distilling the knowledge in a neural network (arXiv 1503.02531)",
)
def distill(
    teachers: Sequence[nn.Module],
    batches: Iterable[Any],
    *,
    epochs: int = 30,
    start: int | None = 0,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    temperature: float = 2.0,
    weight: float = DISTILL,
    criterion: Criterion = cross_entropy,
    how: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Trains one network on the mean of the teachers' logits and on the labels.

    Args:
        teachers: classifiers of one output (N, K).
        batches: of the training data.
        epochs: of training.
        start: the teacher to begin with; None: a fresh network, of a class whose modules have ``reset_parameters``.
        lr: learning rate of SGD; it falls to a tenth at two thirds.
        momentum: of SGD.
        weight_decay: of SGD.
        temperature: of the softmax, of teachers and student.
        weight: of the teachers' logits in the loss; the labels have 1 - weight.
        criterion: of labels.
        how: options of :func:`fastmerge.merge` that do not change what comes out: ``progress``, ``checkpoint_dir`` and so on.

    Raises:
        ValueError: ``start`` is no teacher, a number is out of range, or a fresh network can't be made.

    Source: G. Hinton et al., Distilling the knowledge in a neural network (arXiv 1503.02531).
    """
    if start is not None and not 0 <= start < len(teachers):
        raise ValueError(
            f"distill needs start to be the number of a teacher, 0 to {len(teachers) - 1}, or None; got {start}"
        )
    student = copy.deepcopy(teachers[start or 0])
    if start is None:
        reset(student)
    train(
        student,
        batches,
        epochs=epochs,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        criterion=criterion,
        teachers=teachers,
        distill=weight,
        temperature=temperature,
        how=how,
    )
    return student


def reset(network: nn.Module) -> None:
    """Draws all weights anew, as the modules of PyTorch do when they are made.

    Raises:
        ValueError: a parameter is held by a module that can't.
    """
    for path, module in network.named_modules():
        again: Any = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if again is not None:
            again()
        elif next(module.parameters(recurse=False), None) is not None:
            raise ValueError(
                f"'{path or type(network).__name__}' ({type(module).__name__}) has parameters and no reset_parameters(), so "
                "that no fresh network can be made of a teacher; start from a teacher, start=0"
            )

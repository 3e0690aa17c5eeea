"""Training of one network, plainly or by what teachers say, with the trainer that merges have."""

from __future__ import annotations

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
    with unwatched() as meter, torch.enable_grad():
        history = train_by(options, network.requires_grad_(True), batches, teachers=teachers)
        if meter is not None:
            meter.add_training(network, batches, epochs)
            for teacher in teachers:
                meter.add_forward(teacher, batches, epochs)
    return history

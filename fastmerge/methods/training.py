"""Training of one network, plainly or by soft targets, with the trainer that merges have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastmerge.evaluation import Criterion
from fastmerge.history import History
from fastmerge.merging.api import train_by
from fastmerge.merging.options import Options
from fastmerge.methods.cost import unwatched


def train(
    network: nn.Module,
    batches: Iterable[Any],
    *,
    epochs: int,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    milestones: Sequence[int] | None = None,
    criterion: Criterion = cross_entropy,
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
        criterion: ``criterion(output, target)``, a mean over the batch.
    """
    options = Options(
        finetune_epochs=epochs,
        finetune_lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        milestones=milestones,
        criterion=criterion,
        progress=False,
    )
    with unwatched() as meter, torch.enable_grad():
        history = train_by(options, network.requires_grad_(True), batches)
        if meter is not None:
            meter.add_training(network, batches, epochs)
    return history


class SoftTargets:
    """A loader whose targets have the mean of several networks' outputs beside them.

    Args:
        batches: yields (input, target).
        teachers: are run on each batch, so that augmentation is seen by teachers and student alike.
    """

    def __init__(self, batches: Iterable[Any], teachers: Sequence[nn.Module]) -> None:
        self.batches, self.teachers = batches, teachers

    def __iter__(self) -> Iterator[Any]:
        device = next(self.teachers[0].parameters()).device
        for inputs, target in self.batches:
            several = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
            with torch.no_grad():
                outputs = [teacher(*(x.to(device) for x in several)) for teacher in self.teachers]
            yield inputs, (torch.stack(outputs).mean(0), target)

    def __len__(self) -> int:
        if not isinstance(self.batches, Sized):
            raise TypeError("the loader of the data has no length")
        return len(self.batches)


class Distillation:
    """The criterion of (logits, (teachers' logits, labels)): ``w τ² KL(teachers ‖ student) + (1 − w) · criterion``.

    Args:
        temperature: τ.
        weight: w, in 0..1.
        criterion: of labels.
    """

    def __init__(self, temperature: float, weight: float, criterion: Criterion = cross_entropy) -> None:
        if not (temperature > 0 and 0 <= weight <= 1):
            raise ValueError(
                f"distillation needs a temperature above 0 and a weight in 0..1; got {temperature} and {weight}"
            )
        self.temperature, self.weight, self.criterion = temperature, weight, criterion

    def __call__(self, output: Tensor, target: Any) -> Tensor:
        soft, labels = target
        heat = self.temperature
        wanted, given = (soft / heat).log_softmax(1), (output / heat).log_softmax(1)
        divergence = nn.functional.kl_div(given, wanted, log_target=True, reduction="none").sum(1).mean() * heat**2
        return self.weight * divergence + (1 - self.weight) * self.criterion(output, labels)

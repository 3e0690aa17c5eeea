"""Knowledge distillation: one network learns what the teachers say together."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.functional import cross_entropy

from fastmerge.evaluation import Criterion
from fastmerge.methods.registry import register
from fastmerge.methods.training import train


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
    weight: float = 0.5,
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

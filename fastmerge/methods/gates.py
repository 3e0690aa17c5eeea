"""Merging by learned gates: what this library is for, as one method among the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.functional import cross_entropy

from fastmerge.big_student import BigStudent
from fastmerge.evaluation import Criterion
from fastmerge.merging import merge
from fastmerge.merging.options import Options
from fastmerge.methods.cost import Meter, unwatched
from fastmerge.methods.registry import register
from fastmerge.methods.samples import family_of


@register("gates", needs="training", source="M. Pašen & V. Boža, Merging of neural networks (arXiv 2204.09973)")
def gates(
    teachers: Sequence[nn.Module],
    batches: Iterable[Any],
    *,
    epochs: int = 10,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    link_at: float = 0.25,
    criterion: Criterion = cross_entropy,
    how: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Trains all teachers side by side with a gate on each channel, and keeps the channels whose gates stay open.

    Args:
        teachers: two or more.
        batches: of the training data.
        epochs: of the merge stage; :func:`fastmerge.merge` has the fine-tuning, too.
        lr: learning rate of the weights; see :func:`fastmerge.merge`.
        momentum: of the weights' SGD.
        weight_decay: of the weights' SGD.
        link_at: fraction of the merge stage after which the big student is linked.
        criterion: of the output and the target.
        how: options of :func:`fastmerge.merge` that do not change what comes out: ``progress``, ``checkpoint_dir`` and so on.

    Source: M. Pašen & V. Boža, Merging of neural networks (arXiv 2204.09973).
    """
    with unwatched() as meter:
        student, _ = merge(
            teachers,
            batches,
            merge_epochs=epochs,
            finetune_epochs=0,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            link_at=link_at,
            criterion=criterion,
            **{"progress": False, **(how or {})},
        )
        if meter is not None:
            _add(meter, teachers, batches, epochs, link_at)
    return student


def _add(meter: Meter, teachers: Sequence[nn.Module], batches: Iterable[Any], epochs: int, link_at: float) -> None:
    inputs = family_of(teachers, batches).inputs
    big = BigStudent(*teachers, example_inputs=inputs, verify=False)
    linked = Options(merge_epochs=epochs, link_at=link_at).linked_epochs
    meter.add_training(big, batches, epochs - linked)
    big.link()
    meter.add_training(big, batches, linked)

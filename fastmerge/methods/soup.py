"""Model soups: the mean of those teachers of one origin that are better together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.nn.functional import cross_entropy

from fastmerge.evaluation import Criterion, NotFiniteError, Setting, evaluate
from fastmerge.methods.average import mean_of
from fastmerge.methods.cost import unwatched
from fastmerge.methods.registry import register
from fastmerge.methods.samples import check_batches


@register("soup", needs="samples", source="M. Wortsman et al., Model soups (arXiv 2203.05482)")
def soup(
    teachers: Sequence[nn.Module],
    batches: Iterable[Any],
    *,
    held_out: Iterable[Any] | None = None,
    criterion: Criterion = cross_entropy,
) -> nn.Module:
    """The greedy soup: from the best teacher on, each other is taken into the mean if that does not raise the loss.

    Args:
        teachers: fine-tuned from one network; of others the best one alone remains.
        batches: of the data.
        held_out: what the loss is taken on, (input, target) batches that are not trained on; None: ``batches``.
        criterion: the loss.

    Raises:
        TypeError, ValueError: the data can't be iterated again and again, or does not fit the teachers or the criterion.

    Source: M. Wortsman et al., Model soups (arXiv 2203.05482).
    """
    setting = Setting(next(teachers[0].parameters()).device, criterion)
    name, chosen_on = ("the loader", batches) if held_out is None else ("held_out", held_out)
    check_batches(name, chosen_on, teachers[0], criterion)

    def loss(network: nn.Module) -> float:
        return evaluate(network, chosen_on, setting).loss

    with unwatched() as meter:
        losses = [loss(teacher) for teacher in teachers]
        first, *others = sorted(range(len(teachers)), key=losses.__getitem__)
        taken, best = [teachers[first]], losses[first]
        for teacher in (teachers[number] for number in others):
            try:
                reached = loss(mean_of([*taken, teacher]))
            except NotFiniteError:  # of networks with nothing in common
                continue
            if reached <= best:
                taken, best = [*taken, teacher], reached
        if meter is not None:
            meter.add_forward(teachers[0], chosen_on, len(losses) + len(others))
    return mean_of(taken)

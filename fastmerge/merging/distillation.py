"""Knowledge distillation: a network learns what its teachers say together, beside the labels.

Source: G. Hinton et al., "Distilling the knowledge in a neural network" (arXiv 1503.02531).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from fastmerge.evaluation import Setting, class_dimension, logits_of
from fastmerge.merging.label_sets import LabelSets, PartCriterion
from fastmerge.stack import Stack


def divergence(output: Tensor, wanted: Tensor, temperature: float, dim: int = 1) -> Tensor:
    """``τ² KL(softmax(wanted / τ) ‖ softmax(output / τ))`` of logits, a mean over all samples and positions.

    Args:
        output: logits of the network.
        wanted: what it is to learn, of the same shape.
        temperature: τ.
        dim: the dimension of the classes.
    """
    target, given = (wanted / temperature).log_softmax(dim), (output / temperature).log_softmax(dim)
    each = (target.exp() * (target - given)).sum(dim)
    return each.mean() * temperature**2


def foreign_divergence(output: Tensor, wanted: Tensor, target: Tensor, sets: LabelSets, temperature: float) -> Tensor:
    """:func:`divergence` of each teacher's part of the logits, a mean over the parts that are not the sample's own."""
    owner, total = sets.owner_of(target), output.new_zeros(())
    for number, part in enumerate(sets.slices):
        said, given = (wanted[:, part] / temperature).log_softmax(1), (output[:, part] / temperature).log_softmax(1)
        total = total + ((said.exp() * (said - given)).sum(1) * (owner != number)).mean()
    return total * temperature**2 / (len(sets.sizes) - 1)


@dataclass(frozen=True)
class TaughtSetting(Setting):
    """A setting in which networks in training mode learn from teachers: ``(1 − w) · criterion + w · divergence``.

    Attributes:
        teachers: In eval mode; the mean of their logits is what they say.
        weight: w, in 0..1.
        temperature: τ.
        told: Whether batches bring what the teachers say: their targets are [target, logits] in training.
    """

    teachers: tuple[nn.Module, ...] = ()
    weight: float = 0.5
    temperature: float = 2.0
    told: bool = False

    @classmethod
    def of(cls, setting: Setting, teachers: Sequence[nn.Module], weight: float, temperature: float) -> TaughtSetting:
        """A setting with teachers, which are copied."""
        fixed = [setting.place(copy.deepcopy(teacher)).eval().requires_grad_(False) for teacher in teachers]
        return cls(**vars(setting), teachers=tuple(fixed), weight=weight, temperature=temperature)

    @torch.no_grad()
    def answers(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The mean of the teachers' logits.

        Raises:
            ValueError: Their output is not one tensor of logits.
        """
        with self.precision():
            said = [teacher(*inputs) for teacher in self.teachers]
        return torch.stack([logits_of(output) for output in said]).mean(0)

    def heard(self, inputs: tuple[Tensor, ...], target: Any) -> tuple[Any, Tensor]:
        """A training batch's own target, and what the teachers say of it."""
        if self.told:
            target, said = target
            return target, said
        return target, self.answers(inputs)

    def blended(self, output: Tensor, loss: Tensor, answers: Tensor, target: Any) -> Tensor:
        """The criterion's loss of one network and what the teachers say, as one loss.

        Raises:
            ValueError: The outputs are no logits, or it can't be told where their classes lie.
        """
        dim = class_dimension(output, target, self.criterion)
        return (1 - self.weight) * loss + self.weight * divergence(output, answers, self.temperature, dim)

    def apply(self, network: nn.Module, inputs: tuple[Tensor, ...], target: Any) -> tuple[Any, Tensor]:
        """Runs network and criterion; in training mode the loss is that of the teachers, too."""
        if not network.training:
            return super().apply(network, inputs, target)
        target, said = self.heard(inputs, target)
        output, loss = super().apply(network, inputs, target)
        with self.precision():
            if isinstance(self.criterion, PartCriterion):
                foreign = foreign_divergence(output, said, target, self.criterion.sets, self.temperature)
                return output, (1 - self.weight) * loss + self.weight * foreign
            blended = vmap(self.blended) if isinstance(network, Stack) else self.blended
            return output, blended(output, loss, said, target)

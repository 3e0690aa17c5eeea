"""What the ablations vary: one choice at a time, against the paper's setting."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastmerge.batch_statistics import has_statistics, recalibrate
from fastmerge.big_student import BigStudent
from fastmerge.channels.groups import OUTPUT

BASE = "paper"
DRAWS = 4  # of the base, for what chance does

Edit = Callable[[nn.Module, BigStudent, Iterable[Any]], None]


class OneDrawPerBatch(BigStudent):
    """A big student whose gates are drawn once for a whole batch."""

    def _draw_gates(self, inputs: Sequence[Any], *how: Any) -> Tensor:
        return super()._draw_gates([inputs[0][:1], *inputs[1:]], *how)


@dataclass(frozen=True)
class Variant:
    """One choice.

    Attributes:
        name: in the table.
        what: what differs from the paper's setting.
        changes: options of the merge.
        big: the class of the big student.
        draws: another number, other random draws in the merge stage and fine-tuning.
        edit: ``edit(student, big, batches)`` changes the student straight after compression; the batches are of training
            data. Such a variant shares the base's merge stage.
    """

    name: str
    what: str
    changes: dict[str, Any] = field(default_factory=dict)
    big: type[BigStudent] = BigStudent
    draws: int = 0
    edit: Edit | None = None

    @property
    def merges(self) -> bool:
        """Whether it needs a merge stage of its own."""
        return self.edit is None


def head_layers(big: BigStudent) -> list[str]:
    """Names of the weights whose layers make the network's output."""
    return [name for name, units in big.groups.outputs.items() if (units.group == OUTPUT).any()]


@torch.no_grad()
def rescale_head(student: nn.Module, big: BigStudent, batches: Iterable[Any]) -> None:
    """Multiplies the last layer's weights by T, which the mean over T teachers had divided them by."""
    parameters = dict(student.named_parameters())
    for name in head_layers(big):
        parameters[name].mul_(big.num_teachers)


def foldable_groups(big: BigStudent) -> set[int]:
    """Groups that one layer alone writes: no sum carries their gated channels on, so that only layers read them."""
    writers = [number for units in big.groups.outputs.values() for number in set(units.group.tolist()) if number >= 0]
    return {number for number in writers if writers.count(number) == 1}


@torch.no_grad()
def fold_gates(student: nn.Module, big: BigStudent, batches: Iterable[Any]) -> None:
    """Multiplies what each layer does with a kept channel by the channel's gate.

    Exact: a layer reads ``f · g``, and ``W (f · g) = (W · g) f``. In a residual stream the gated channels go on through sums
    as well, where nothing can be multiplied; its gates become 1.
    """
    parameters = dict(student.named_parameters())
    kept = big.keep()
    gates: Any = big.gates
    for name, units in big.groups.inputs.items():
        factors = torch.ones(len(units.group), dtype=parameters[name].dtype)
        for number in foldable_groups(big) & set(units.group.tolist()):
            group = big.groups[number]
            values = gates[group.name].mean()[kept[group.name]].cpu()
            where = torch.from_numpy(units.group == number)
            factors[where] = values[torch.from_numpy(units.place)[where]]
        weight = parameters[name]
        weight.mul_(factors.to(weight).view(1, -1, *[1] * (weight.dim() - 2)))


def recalibrate_norms(student: nn.Module, big: BigStudent, batches: Iterable[Any]) -> None:
    """Estimates the statistics of BatchNorm anew on training data."""
    recalibrate(student, batches)


def variants(network: nn.Module, link_at: tuple[float, ...], gate_lr: float | None = None) -> list[Variant]:
    """The base and every choice beside it that says something for a recipe's network.

    Args:
        network: a teacher's, fresh.
        link_at: fractions of the merge stage.
        gate_lr: another learning rate of the gates, if any.
    """
    setting = "the paper's setting: linked from the start, quadratic λ, a draw per sample"
    found = [Variant(BASE, setting)]
    found += [Variant(f"{BASE} ({n + 1})", "the same with other random draws", draws=n) for n in range(1, DRAWS)]
    found += [
        Variant(
            f"link_at {at:g}",
            f"linked after {at:.0%} of the merge stage" if at < 1 else "never linked",
            {"link_at": at},
        )
        for at in link_at
        if at
    ]
    if gate_lr is not None:
        found.append(
            Variant(f"gate_lr {gate_lr:.2g}", "gates learn faster, as fits so few steps", {"gate_lr": gate_lr})
        )
    found += [
        Variant(
            "compacted",
            "closed channels dropped after every epoch from 1/2 of the merge stage on",
            {"compact_at": 0.5},
        ),
        Variant("draw per batch", "one draw of the gates for a whole batch", big=OneDrawPerBatch),
        Variant("budget", "multipliers by dual ascent in place of λ", {"gate_schedule": "budget"}),
        Variant("head × T", "the head's weights times T at compression", edit=rescale_head),
        Variant("gates folded", "kept gates' means folded into the next layers at compression", edit=fold_gates),
    ]
    if has_statistics(network):
        recalibrated = Variant(
            "recalibrated", "BatchNorm's statistics estimated anew at compression", edit=recalibrate_norms
        )
        found.append(recalibrated)
    return found

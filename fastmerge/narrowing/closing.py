"""Which gates are closed for good, which candidates may be dropped for it, and which groups' gates have not settled."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastmerge.gates import HardConcrete
from fastmerge.narrowing.shrinking import Shrinkable
from fastmerge.wide.population import Population

_NEAR = 0.1
_UNDECIDED = 0.8
_LISTED = 4


class UnsettledGatesWarning(UserWarning):
    """Gates by which ``compress()`` chooses do not tell which channels are needed."""


def unsettled(
    means: Mapping[str, float],
    spreads: Mapping[str, float],
    target: float | Mapping[str, float],
    still: Collection[str] = (),
) -> dict[str, str]:
    """Says which channel groups' gates do not tell which 1/T of the channels are needed.

    P of a group whose gates are open every other time may have a mean of 1/T all the same; 4 P (1 - P), 0 for a gate that is
    always or never open and 1 for one that is open every other time, has not a small one.

    Args:
        means: mean P[g > 0] by group.
        spreads: mean 4 P (1 - P) by group.
        target: 1/T, or by group the part of the candidates that is kept.
        still: groups whose means are left alone, as something else is said of them.

    Returns:
        A sentence for each of "above", "below" (1/T) and "undecided" that there is.
    """
    targets = target if isinstance(target, Mapping) else dict.fromkeys(means, target)
    above = [name for name in means if name not in still and means[name] > targets[name] + _NEAR]
    below = [name for name in means if name not in still and means[name] < targets[name] - _NEAR]
    aim = "the share that is kept" if isinstance(target, Mapping) else f"1/T = {target:.2f}"
    undecided = [name for name in spreads if spreads[name] > _UNDECIDED]
    found = {}
    if above:
        found["above"] = f"P[g>0] is above {aim} in {listed(above, means)}; compression cuts channels in use"
    if below:
        found["below"] = f"P[g>0] is below {aim} in {listed(below, means)}; compression keeps closed channels"
    if undecided:
        found["undecided"] = (
            f"P[g>0] is neither 0 nor 1, with a mean 4 P (1 - P) above {_UNDECIDED:g}, in {listed(undecided, spreads)}; "
            "compression chooses between channels that hardly differ"
        )
    return found


def listed(names: Sequence[str], values: Mapping[str, float]) -> str:
    """How many of the channel groups these are, and the first of them with their values."""
    first = ", ".join(f"{name} ({values[name]:.2f})" for name in names[:_LISTED])
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} of {len(values)} channel groups, {first}{more}"


@dataclass(frozen=True)
class Compaction:
    """What :meth:`BigStudent.compact` did.

    Attributes:
        dropped: per group how many candidates it lost.
        left: per group how many it has now.
        whole: groups left as they were although candidates were closed, and why.
    """

    dropped: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """How many candidates were dropped in all."""
        return sum(self.dropped.values())

    def __str__(self) -> str:
        lines = [f"{name}: {count} dropped, {self.left[name]} left" for name, count in self.dropped.items() if count]
        lines += [f"{name}: left whole, {why}" for name, why in self.whole.items()]
        return "\n".join(lines) or "nothing to drop"


def fitting_multiple(device: torch.device) -> int:
    """Of which the candidates that stay should be a multiple for steps to be fast: on a CPU each channel less saves time."""
    return 8 if device.type == "cuda" else 1


def choose(
    population: Population,
    gates: nn.ModuleDict,
    shrinkable: Shrinkable,
    linked: bool,
    threshold: float,
    settled: bool,
    multiple: int,
    widths: Mapping[str, int],
) -> tuple[Population, Compaction]:
    """Who stays.

    A candidate is closed for good if its deterministic gate is 0 and ``P[g > 0] < threshold``. Of those, the most open ones
    stay where fewer than the student has would be left, where each teacher must keep as many as any other, and up to a round
    number.

    Args:
        population: who is there.
        gates: one per group.
        shrinkable: what may be dropped from.
        linked: whether streams of different widths will do.
        threshold: see above.
        settled: leave groups alone of which a candidate is neither closed nor at ``P[g > 0] > 1 - threshold``.
        multiple: of which the number of those who stay, or of each teacher's, is a multiple where there are so many.
        widths: channels of the student, by name of the group.

    Raises:
        ValueError: a number is out of range.
    """
    if not 0 < threshold < 0.5:
        raise ValueError(f"compact needs a threshold of P[g > 0] in (0, 0.5); got {threshold}")
    if multiple < 1:
        raise ValueError(f"compact needs a multiple of at least 1; got {multiple}")
    done = Compaction()
    left: dict[str, Tensor] = {}
    for number, group in enumerate(population.groups):
        gate = gates[group.name]
        assert isinstance(gate, HardConcrete)
        loc, opened = gate.loc.detach().cpu(), gate.open_probability().detach().cpu()
        closed = (gate.mean().detach().cpu() == 0) & (opened < threshold)
        candidates = population.candidates[group.name]
        stays = torch.ones_like(closed)
        if bool(closed.any()):
            if number in shrinkable.whole:
                done.whole[group.name] = shrinkable.whole[number]
            elif settled and bool((~closed & (opened <= 1 - threshold)).any()):
                done.whole[group.name] = "not settled: some gates are neither closed nor surely open"
            else:
                even = number in shrinkable.even or not linked
                teacher = candidates // group.size if even else torch.zeros_like(candidates)
                least = -(-widths[group.name] // (population.num_teachers if even else 1))
                count = max(least, int(torch.bincount(teacher[~closed], minlength=1).max()))
                stays = _top_of_each(loc, teacher, -(-count // multiple) * multiple)
        left[group.name] = candidates[stays]
        done.dropped[group.name], done.left[group.name] = int((~stays).sum()), int(stays.sum())
    return Population(population.groups, population.num_teachers, left), done


def checked_choice(
    before: Population,
    candidates: Mapping[str, Tensor],
    shrinkable: Shrinkable,
    linked: bool,
    widths: Mapping[str, int],
) -> Population:
    """A population of candidates that :func:`choose` could have chosen.

    Raises:
        ValueError: naming the group, if it could not.
    """
    for number, group in enumerate(before.groups):
        old = before.candidates[group.name]
        new = candidates.get(group.name, old).cpu()
        if (
            new.dtype != torch.int64
            or new.dim() != 1
            or not bool(torch.isin(new, old).all() and (new.diff() > 0).all())
        ):
            raise ValueError(
                f"group '{group.name}' needs candidates that are left, int64 and ascending; got {new.tolist()}"
            )
        if number in shrinkable.whole and len(new) < len(old):
            raise ValueError(f"group '{group.name}' can't lose channels: it {shrinkable.whole[number]}")
        counts = torch.bincount(new // group.size, minlength=before.num_teachers)
        even = number in shrinkable.even or not linked
        if len(new) < widths[group.name] or (even and bool((counts != counts[0]).any())):
            needed = f"{widths[group.name]} or more{' and as many of each teacher' if even else ''}"
            raise ValueError(f"group '{group.name}' needs {needed}; got {counts.tolist()} candidates of each teacher")
    if unknown := candidates.keys() - before.candidates.keys():
        raise ValueError(f"there is no channel group of the name {sorted(unknown)}")
    return Population(before.groups, before.num_teachers, {**before.candidates, **candidates})


def _top_of_each(loc: Tensor, teacher: Tensor, count: int) -> Tensor:
    """A mask of the given number of largest ``loc`` of each teacher; ties go to the lower index."""
    mask = torch.zeros(len(loc), dtype=torch.bool, device="cpu")
    for t in teacher.unique():
        own = (teacher == t).nonzero().flatten()
        mask[own[torch.sort(loc[own], descending=True, stable=True).indices[:count]]] = True
    return mask

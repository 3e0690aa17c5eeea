"""What the gates of a merge stage came to: how open each channel group is, whether it arrived, whose channels stay."""

from __future__ import annotations

import torch

from fastmerge.big_student import BigStudent

_NEAR = 0.1
_MOVED = 0.01
_UNDECIDED = 0.8
_LISTED = 4


@torch.no_grad()
def open_probabilities(big: BigStudent) -> dict[str, float]:
    """Mean P[g > 0] of each channel group; candidates that were dropped count as closed."""
    return {name: mean.item() for name, mean in big.open_probabilities().items()}


def gate_warnings(
    before: dict[str, float], after: dict[str, float], target: float, lam_step: float | None
) -> list[str]:
    """Says which channel groups' mean P[g > 0] did not move in the merge stage, or did not arrive near 1/T.

    Args:
        before, after: Mean P[g > 0] by group, before and after the stage.
        target: 1/T.
        lam_step: What there is to change; None for a budget that steers itself.
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
    raised = "gate_lr or merge_epochs" if lam_step is None else f"lam_step (now {lam_step:g}), gate_lr or merge_epochs"
    lowered = "" if lam_step is None else f"lower lam_step (now {lam_step:g}) or "
    remedies = [f"raise {raised}"] * (bool(still) + bool(above)) + [f"{lowered}raise merge_epochs"] * bool(below)
    return [f"{problem}: {remedy}" for problem, remedy in zip(found, remedies, strict=True)]


@torch.no_grad()
def undecided_warnings(big: BigStudent) -> list[str]:
    """Says which channel groups consist of gates that are open every other time, where each should be open or closed.

    P of such a group may have a mean of 1/T all the same; 4 P (1 - P), 0 for a gate that is always or never open and 1 for one
    that is open every other time, has not a small one.
    """
    opened = big.open_candidates()
    mean_of_each = big.group_means(4 * opened * (1 - opened)).tolist()  # what was dropped is decided
    means = {group.name: mean for group, mean in zip(big.groups, mean_of_each, strict=True)}
    found = [name for name, mean in means.items() if mean > _UNDECIDED]
    if not found:
        return []
    return [
        f"P[g>0] is neither 0 nor 1, with a mean 4 P (1 - P) above {_UNDECIDED:g}, in {_listed(found, means)}; compression "
        "chooses between channels that hardly differ: raise gate_lr or merge_epochs"
    ]


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

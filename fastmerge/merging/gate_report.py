"""What the gates of a merge stage came to: how open each channel group is, whether it arrived, whose channels stay."""

from __future__ import annotations

import torch

from fastmerge.big_student import BigStudent

_NEAR = 0.1
_MOVED = 0.01
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

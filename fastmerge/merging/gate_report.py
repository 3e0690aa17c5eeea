"""What the gates of a merge stage came to: how open each channel group is, whether it arrived, whose channels stay."""

from __future__ import annotations

import torch

from fastmerge.big_student import BigStudent
from fastmerge.narrowing.closing import listed, unsettled

_MOVED = 0.01


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
    found = unsettled(after, {}, target, still)
    if still:
        found = {"still": f"P[g>0] did not move in {listed(still, after)}; chance decides which channels stay"} | found
    raised = "gate_lr or merge_epochs" if lam_step is None else f"lam_step (now {lam_step:g}), gate_lr or merge_epochs"
    lowered = "" if lam_step is None else f"lower lam_step (now {lam_step:g}) or "
    remedies = {"still": f"raise {raised}", "above": f"raise {raised}", "below": f"{lowered}raise merge_epochs"}
    return [f"{problem}: {remedies[kind]}" for kind, problem in found.items()]


@torch.no_grad()
def undecided_warnings(big: BigStudent) -> list[str]:
    """Says which channel groups consist of gates that are open every other time, where each should be open or closed."""
    opened = big.open_candidates()
    spreads = big.group_means(4 * opened * (1 - opened)).tolist()  # what was dropped is decided
    found = unsettled({}, dict(zip(big.gates, spreads, strict=True)), 1 / big.num_teachers)
    return [f"{problem}: raise gate_lr or merge_epochs" for problem in found.values()]


def origins(big: BigStudent) -> dict[str, list[int]]:
    """Counts, for each channel group, how many of the kept channels came from each teacher."""
    return {
        name: torch.bincount(keep.cpu() // len(keep), minlength=big.num_teachers).tolist()
        for name, keep in big.keep().items()
    }

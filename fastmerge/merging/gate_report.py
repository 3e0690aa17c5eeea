"""What the gates of a merge stage came to: how open each channel group is, whether it arrived, whose channels stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastmerge.big_student import BigStudent
from fastmerge.history import mean_of
from fastmerge.narrowing.closing import listed, unsettled
from fastmerge.stack import BigStack

_MOVED = 0.01


@torch.no_grad()
def open_probabilities(big: BigStudent | BigStack) -> dict[str, Any]:
    """Mean P[g > 0] of each channel group, a list for a stack; candidates that were dropped count as closed."""
    return {name: mean.tolist() for name, mean in big.open_probabilities().items()}


def gate_warnings(
    before: dict[str, Any], after: dict[str, Any], target: float | Mapping[str, float], lam_step: float | None
) -> list[str]:
    """Says which channel groups' mean P[g > 0] did not move in the merge stage, or did not arrive where they should.

    Args:
        before, after: Mean P[g > 0] by group, before and after the stage.
        target: 1/T, or by group the part of the candidates that is kept.
        lam_step: What there is to change; None for a budget that steers itself.
    """
    sizes = {len(value) for value in after.values() if isinstance(value, list)}
    before, after = ({name: mean_of(value) for name, value in each.items()} for each in (before, after))
    still = [name for name in after if abs(after[name] - before[name]) < _MOVED]
    found = unsettled(after, {}, target, still)
    if still:
        found = {"still": f"P[g>0] did not move in {listed(still, after)}; chance decides which channels stay"} | found
    raised = "gate_lr or merge_epochs" if lam_step is None else f"lam_step (now {lam_step:g}), gate_lr or merge_epochs"
    lowered = "" if lam_step is None else f"lower lam_step (now {lam_step:g}) or "
    remedies = {"still": f"raise {raised}", "above": f"raise {raised}", "below": f"{lowered}raise merge_epochs"}
    whose = f"mean of {max(sizes)} replicates: " if sizes else ""
    return [f"{whose}{problem}: {remedies[kind]}" for kind, problem in found.items()]


@torch.no_grad()
def undecided_warnings(big: BigStudent | BigStack) -> list[str]:
    """Says which channel groups consist of gates that are open every other time, where each should be open or closed."""
    opened = big.open_candidates()
    spreads = big.group_means(4 * opened * (1 - opened))  # what was dropped is decided
    spreads = (spreads.mean(0) if isinstance(big, BigStack) else spreads).tolist()
    found = unsettled({}, dict(zip(big.gates, spreads, strict=True)), 1 / big.num_teachers)
    return [f"{problem}: raise gate_lr or merge_epochs" for problem in found.values()]


def origins(big: BigStudent | BigStack) -> Any:
    """Counts, for each channel group, how many of the kept channels came from each teacher; for a stack, of each in a list."""
    if isinstance(big, BigStack):
        return [origins(network) for network in big.networks()]
    kept = big.keep()
    return {
        group.name: torch.bincount(kept[group.name].cpu() // group.size, minlength=big.num_teachers).tolist()
        for group in big.groups
    }

"""The gates of all channel groups together: made, drawn side by side, and asked which candidates they keep."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastmerge.channels.groups import ChannelGroups
from fastmerge.gates import HardConcrete
from fastmerge.kernels.gate import hard_concrete_mean, sample_gates


def make_gates(groups: ChannelGroups, num_teachers: int, like: Tensor) -> nn.ModuleDict:
    """T·n gates for each group of n places, on the device and of the dtype of a parameter."""
    return nn.ModuleDict(
        {group.name: HardConcrete(num_teachers * group.size, device=like.device, dtype=like.dtype) for group in groups}
    )


def draw_gates(gates: Sequence[HardConcrete], samples: int | None, with_ones: bool) -> Tensor:
    """The matrix of gates, one group's columns after another's.

    Args:
        gates: of all groups.
        samples: how many to draw for, or None for the deterministic gates.
        with_ones: whether a last column of ones follows, for channels without a gate.

    Returns:
        (N, columns), or (1, columns) deterministic.
    """
    first, loc = gates[0], torch.cat([gate.loc for gate in gates])
    if samples is None:
        drawn = hard_concrete_mean(loc, gamma=first.gamma, zeta=first.zeta).unsqueeze(0)
    else:
        drawn = sample_gates(loc, samples, beta=first.beta, gamma=first.gamma, zeta=first.zeta)
    return torch.cat([drawn, drawn.new_ones(drawn.shape[0], 1)], dim=1) if with_ones else drawn


def kept_candidates(groups: ChannelGroups, gates: nn.ModuleDict) -> dict[str, Tensor]:
    """Per group the n candidates whose gates are the most open, ascending; ties go to the lower index.

    Returns:
        int64 (n,) per group name; candidate t·n + j is channel j of teacher t.
    """
    kept = {}
    for group in groups:
        gate = gates[group.name]
        assert isinstance(gate, HardConcrete)
        order = torch.sort(gate.loc.detach(), descending=True, stable=True).indices
        top = order[: group.size].sort().values
        kept[group.name] = top if gate.candidates is None else gate.candidates[top]
    return kept

"""Hard concrete gates as a user writes them: elementwise PyTorch, one group at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


class PlainGate(nn.Module):
    """The gates of one channel group, ``g = clamp(sigmoid((log u - log(1 - u) + loc) / β) (ζ - γ) + γ, 0, 1)``.

    Args:
        channels: gates of the group.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.empty(channels).normal_(1, 0.01))

    def draw(self, n: int) -> Tensor:
        """Gates (n, channels), one draw for each sample and channel; (1, channels) without chance in eval mode."""
        if not self.training:
            return (self.loc.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1).unsqueeze(0)
        u = torch.rand(n, len(self.loc), device=self.loc.device, dtype=self.loc.dtype).clamp(1e-6, 1 - 1e-6)
        s = ((u.log() - (1 - u).log() + self.loc) / BETA).sigmoid()
        return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def open_probability(self) -> Tensor:
        """``P[g > 0]`` of each gate, (channels,)."""
        return (self.loc - BETA * math.log(-GAMMA / ZETA)).sigmoid()


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """``x`` (N, C, ...) times its gates (N or 1, C), which are cast to its dtype: fp32 gates would double the traffic."""
    return x * gate.to(x.dtype).reshape(*gate.shape, *[1] * (x.dim() - 2))

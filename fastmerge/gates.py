"""Hard concrete gates: stochastic switches in [0, 1] that learn which channels to keep.

Source: C. Louizos, M. Welling, D. Kingma, "Learning sparse neural networks through L0 regularization"
(arXiv 1712.01312), with the constants of M. Pašen, V. Boža, "Merging of neural networks" (arXiv 2204.09973).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmerge.kernels.gate import hard_concrete_mean, open_probability, sample_gates

BETA = 2 / 3
GAMMA = -0.1
ZETA = 1.1


class HardConcrete(nn.Module):
    """One hard concrete gate per channel.

    ``u ~ U(0, 1)``, ``s = sigmoid((log u - log(1 - u) + loc) / beta)``, ``g = clamp(s (zeta - gamma) + gamma, 0, 1)``.

    In training mode :meth:`forward` draws one gate per sample and channel; in eval mode it uses the deterministic
    gate of :meth:`mean`.

    Args:
        channels: number of gates, at least 1.
        beta: temperature, above 0.
        gamma: lower end of the stretched interval, below 0.
        zeta: upper end of the stretched interval, above 1.
        device: where ``loc`` lives.
        dtype: dtype of ``loc``; gates are computed in float32 or better whatever it is.

    Attributes:
        loc: parameter of shape (channels,), initialised from N(1, 0.01²). The larger, the more often open.
        candidates: int64 (channels,), the first numbers of the gates that are left; None while all are left. See
            :meth:`BigStudent.compact`.
        fixed: whether they are fixed for good, by :meth:`BigStudent.fix`: ``loc`` may not be changed by hand any more.

    Raises:
        ValueError: if an argument is outside its range.
    """

    candidates: Tensor | None

    def __init__(
        self,
        channels: int,
        beta: float = BETA,
        gamma: float = GAMMA,
        zeta: float = ZETA,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"HardConcrete needs at least one channel; got {channels}")
        if not (beta > 0 and gamma < 0 and zeta > 1):
            raise ValueError(f"HardConcrete needs beta > 0, gamma < 0 and zeta > 1; got {beta=}, {gamma=}, {zeta=}")
        self.channels, self.fixed = channels, False
        self.beta, self.gamma, self.zeta = beta, gamma, zeta
        self.loc = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.register_buffer("candidates", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws ``loc`` from N(1, 0.01²), the paper's start: most gates open."""
        nn.init.normal_(self.loc, mean=1.0, std=0.01)

    def sample(self, n: int) -> Tensor:
        """Draws gates for n samples.

        Returns:
            Gates in [0, 1], shape (n, channels), differentiable with respect to ``loc``.
        """
        return sample_gates(self.loc, n, beta=self.beta, gamma=self.gamma, zeta=self.zeta)

    def mean(self) -> Tensor:
        """The deterministic gate ``clamp(sigmoid(loc) (zeta - gamma) + gamma, 0, 1)``, shape (channels,)."""
        return hard_concrete_mean(self.loc, gamma=self.gamma, zeta=self.zeta)

    def open_probability(self) -> Tensor:
        """``P[g > 0] = sigmoid(loc - beta log(-gamma / zeta))``, shape (channels,)."""
        return open_probability(self.loc, beta=self.beta, gamma=self.gamma, zeta=self.zeta)

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies the channels of ``x``, shape (N, channels, ...), by their gates."""
        gate = self.sample(x.shape[0]) if self.training else self.mean().unsqueeze(0)
        return x * gate.to(x.dtype).reshape(*gate.shape, *[1] * (x.dim() - 2))

    def extra_repr(self) -> str:
        return f"{self.channels}, beta={self.beta:.4g}, gamma={self.gamma}, zeta={self.zeta}"

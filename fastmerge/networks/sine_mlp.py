"""The network of the sine regression."""

from __future__ import annotations

from torch import Tensor, nn


class SineMLP(nn.Module):
    """One hidden layer of ReLU units between one input and one output: 1-100-1.

    Args:
        width: multiplies the hidden units.

    Source: Pašen & Boža, "Merging of neural networks", section 3.1.
    """

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.hidden = nn.Linear(1, 100 * width)
        self.activation = nn.ReLU()
        self.output = nn.Linear(100 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, 1) to (N, 1)."""
        return self.output(self.activation(self.hidden(x)))

"""Networks in which channels meet other than by convolution: means over channels, comparisons, products, recurrence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Recurrent(nn.Module):
    """Recurrent layers between linear ones: fastmerge knows no rule for them, so they are kept from one teacher as a whole."""

    def __init__(self, *kinds: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 6)
        self.recurrent = nn.ModuleList(kind(6 - k, 5 - k, batch_first=True) for k, kind in enumerate(kinds))
        self.hidden = nn.Linear(6 - len(kinds), 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.embed(x))
        for recurrent in self.recurrent:
            x, _ = recurrent(x)
        return self.head(F.relu(self.hidden(x[:, -1])))


class Attention(nn.Module):
    """Multi-head attention between tokens, with a residual; kept from one teacher as a whole, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 4)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(x, x, x)[0]
        return self.head(F.gelu(self.hidden(x))).mean(1)


class SpatialAttention(nn.Module):
    """A mask from the mean over all channels, which no subset of them could give."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.mask = nn.Conv2d(2, 1, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 5, 3, padding=1)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        x = x * torch.sigmoid(self.mask(pooled))
        return self.fc(F.relu(self.conv2(x)).mean((2, 3)))


class Modulated(nn.Module):
    """A linear layer of the input scales and shifts another branch's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3)
        self.modulation = nn.Linear(3, 12)
        self.conv2 = nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.modulation(x.mean((2, 3)))[:, :, None, None].chunk(2, 1)
        return self.conv2(F.relu(self.conv1(x) * (1 + scale) + shift)).mean((2, 3))


class Maxout(nn.Module):
    """The larger of two channels, by view and amax and by max_pool1d over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        n, _, height, width = x.shape
        x = self.conv2(x.view(n, 6, 2, height, width).amax(2))
        x = F.max_pool1d(x.flatten(2).transpose(1, 2), 2).transpose(1, 2).reshape(n, 4, height, width)
        return self.conv3(x).mean((2, 3))


class InputAdded(nn.Module):
    """The input is added to features, whose channels therefore can't change places."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 3, 3, padding=1)
        self.conv2 = nn.Conv2d(3, 5, 3, padding=1)
        self.conv3 = nn.Conv2d(5, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x) + x)
        return self.conv3(F.relu(self.conv2(x))).mean((2, 3))


class Masked(nn.Module):
    """Comparisons, torch.where, a constant that differs by channel, and a local response norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.conv3 = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.LocalResponseNorm(3, alpha=0.5)
        self.conv4 = nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.conv2(x * (x > 0.1))
        x = self.conv3(torch.where(x > 0, x, 0.2 * x))
        x = x + torch.linspace(-1, 1, 6, dtype=x.dtype).view(6, 1, 1)
        return self.conv4(self.norm(F.relu(x))).mean((2, 3))

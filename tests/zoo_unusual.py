"""Networks that do something few do, each within its rights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter


class LayerUsedTwice(nn.Module):
    """A recurrent convolution: it reads its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.shared = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for _ in range(2):
            x = F.relu(self.shared(x))
        return self.fc(x.mean((2, 3)))


class NormUsedTwice(nn.Module):
    """One BatchNorm and one ReLU module serve two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(6, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.conv1(x)))
        x = self.act(self.bn(self.conv2(x)))
        return self.conv3(x).mean((2, 3))


class FunctionalParameters(nn.Module):
    """Parameters of its own, given to F.conv2d, F.batch_norm and F.linear."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = Parameter(torch.randn(6, 3, 3, 3))
        self.offset = Parameter(torch.zeros(6))
        self.norm_weight = Parameter(torch.ones(6))
        self.norm_bias = Parameter(torch.zeros(6))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("variance", torch.ones(6))
        self.matrix = Parameter(torch.randn(5, 6))
        self.readout = Parameter(torch.randn(4, 5))
        self.readout_bias = Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel, self.offset, padding=1)
        x = F.batch_norm(x, self.mean, self.variance, self.norm_weight, self.norm_bias, self.training)
        x = F.relu(x).mean((2, 3))
        x = F.relu(F.linear(x, self.matrix))
        return F.linear(x, self.readout, self.readout_bias)


class ChannelScale(nn.Module):
    """Learned scales and offsets per channel between layers, of several shapes, and buffers that do the same."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.scale = Parameter(torch.ones(1, 6, 1, 1))
        self.offset = Parameter(torch.zeros(6, 1, 1))
        self.conv2 = nn.Conv2d(6, 5, 3, padding=1)
        self.register_buffer("whiten", torch.ones(5))
        self.temperature = Parameter(torch.ones(()))
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x) * self.scale + self.offset)
        x = F.relu(self.conv2(x * self.temperature)) * self.whiten[None, :, None, None]
        return self.fc(x.mean((2, 3)))


class NormalisedInput(nn.Module):
    """BatchNorm on the network's input, which all teachers share."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(self.norm(x)))
        return self.conv2(x).mean((2, 3))


class ConvolutionToTokens(nn.Module):
    """A convolutional stem, then channels last: (N, C, H, W) to (N, H·W, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 2, stride=2)
        self.mix = nn.Linear(6, 7)
        self.back = nn.Conv2d(7, 5, 1)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.patches(x))
        n, _, height, width = x.shape
        tokens = F.relu(self.mix(x.flatten(2).transpose(1, 2)))
        x = tokens.permute(0, 2, 1).reshape(n, -1, height, width)
        return self.fc(F.relu(self.back(x)).mean((2, 3)))


class FlattenInTwoParts(nn.Module):
    """Two flattened tensors side by side before one linear layer; channels span different numbers of features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 3, 3, padding=1)
        self.fc1 = nn.Linear(4 * 4 + 3 * 16, 8)
        self.fc2 = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        y = F.relu(self.conv2(F.max_pool2d(x, 2)))
        joined = torch.cat([F.adaptive_max_pool2d(x, 2).flatten(1), y.flatten(1)], 1)
        return self.fc2(F.relu(self.fc1(joined)))


class PermutedChannels(nn.Module):
    """Channels put in another order by a buffer of indices, flipped and rolled before they are added to themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.register_buffer("order", torch.tensor([3, 0, 5, 1, 4, 2]))
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x[:, self.order]))
        return self.fc(x.flip(1).mean((2, 3)))


class MovedInPlace(nn.Module):
    """Dimensions are moved by operations in place, which have other names for their overloads than those out of place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 5, 3, padding=1)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x).transpose_(2, 3))
        x = F.relu(self.conv2(x).swapaxes_(2, 3)).mean((2, 3))
        return self.fc(x.unsqueeze_(1).squeeze_(1))


class TiedWeights(nn.Module):
    """Two layers with one weight matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 6)
        self.first = nn.Linear(6, 6, bias=False)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(torch.relu(self.stem(x))))
        return self.head(torch.relu(self.second(x)))


class LayerUsedOnInput(nn.Module):
    """The layer that reads the network's input reads its own output next."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(3, 3, 3, padding=1)
        self.last = nn.Conv2d(3, 5, 3, padding=1)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.shared(F.relu(self.shared(x))))
        return self.fc(F.relu(self.last(x)).mean((2, 3)))

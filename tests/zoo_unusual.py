"""Networks that do something few do, each within its rights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils.parametrizations import weight_norm


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


class StandardisedConv(nn.Conv2d):
    """Weight standardisation as timm writes it, with or without a gain."""

    def __init__(self, *args: int, gain: bool = False, **options: int) -> None:
        super().__init__(*args, padding=1, **options)
        self.gain = Parameter(torch.ones(self.out_channels, 1, 1, 1)) if gain else None

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        gain = None if self.gain is None else (self.gain * self.weight[0].numel() ** -0.5).view(-1)
        weight = F.batch_norm(rows, None, None, gain, training=True, momentum=0.0, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class StandardisedByVariance(nn.Conv2d):
    """As Big Transfer's code writes it."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        return F.conv2d(x, (self.weight - mean) / torch.sqrt(variance + 1e-10), self.bias)


class StandardisedInSteps(nn.Conv2d):
    """As the paper's code writes it: means one dimension after another, an unbiased deviation."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean(dim=1, keepdim=True).mean(dim=2, keepdim=True).mean(dim=3, keepdim=True)
        weight = self.weight - mean
        deviation = weight.reshape(weight.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        return F.conv2d(x, weight / deviation.expand_as(weight), self.bias)


class WeightStandardised(nn.Module):
    """Dense, grouped and depthwise convolutions of standardised weights, a linear layer of rows of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = StandardisedConv(3, 6, 3), nn.BatchNorm2d(6)
        self.widen = StandardisedConv(6, 8, 3, gain=True)
        self.grouped = StandardisedConv(8, 8, 3, groups=4)
        self.depthwise = StandardisedConv(8, 8, 3, groups=8, gain=True)
        self.back, self.last = StandardisedByVariance(8, 6, 1), StandardisedInSteps(6, 5, 3)
        self.hidden, self.fc = nn.Linear(5, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.depthwise(self.grouped(self.widen(x).relu()).relu())
        x = self.last(self.norm(x + self.back(y.relu())).relu()).mean((2, 3))
        return self.fc(F.linear(x, F.normalize(self.hidden.weight, dim=1), self.hidden.bias).relu())


class WeightNormed(nn.Module):
    """Weight normalisation of every kind of layer, over every kind of dimension, of the last layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = weight_norm(nn.Conv1d(3, 6, 3, padding=1))
        self.positions = weight_norm(nn.Conv1d(6, 6, 4, padding=2, groups=3), dim=2)
        self.up = weight_norm(nn.ConvTranspose1d(6, 4, 4, stride=2, padding=1))
        self.hidden, self.fc = weight_norm(nn.Linear(4, 7), dim=None), weight_norm(nn.Linear(7, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.positions(x)[..., :-1].relu()
        return self.fc(self.hidden(self.up(x).mean(-1)).relu())

"""Feed-forward networks: one layer after another, in the many ways people write that."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(5, 9)
        self.fc2 = nn.Linear(9, 7, bias=False)
        self.norm = nn.BatchNorm1d(7)
        self.fc3 = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x))
        return self.fc3(torch.sigmoid(self.norm(self.fc2(x))))


def sine_mlp() -> nn.Sequential:
    """The paper's 1-100-1 network, smaller."""
    return nn.Sequential(nn.Linear(1, 20), nn.ReLU(), nn.Linear(20, 1))


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 8, 5)
        self.fc1 = nn.Linear(8 * 2 * 2, 12)
        self.fc2 = nn.Linear(12, 10)
        self.fc3 = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), (2, 2))
        x = x.view(-1, 8 * 2 * 2)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class VGG(nn.Module):
    """Built in a loop; adaptive pooling to 2×2 and a flattened classifier."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in (4, "pool", 6, 6, "pool"):
            if width == "pool":
                layers.append(nn.MaxPool2d(2, 2))
                continue
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            before = width
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(nn.Linear(24, 10), nn.ReLU(True), nn.Linear(10, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def sequential() -> nn.Sequential:
    """No class of its own, nested, with nn.Flatten."""
    body = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.LeakyReLU(0.1))
    head = nn.Sequential(nn.Conv2d(6, 5, 3), nn.ELU(), nn.Flatten(), nn.Linear(20, 4))
    return nn.Sequential(body, head)


class DropoutModules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.drop1 = nn.Dropout2d(0.3)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.drop2 = nn.Dropout(0.5)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop1(F.relu(self.conv1(x)))
        x = F.relu(self.conv2(x)).mean((2, 3))
        return self.fc(self.drop2(x))


class DropoutFunctional(DropoutModules):
    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout2d(F.relu(self.conv1(x)), 0.3, training=self.training)
        x = F.relu(self.conv2(x)).mean((2, 3))
        return self.fc(F.dropout(x, p=0.5, training=self.training))


class InplaceReLU(nn.Module):
    """The convolution's output is overwritten by the activation, then read by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.conv3 = nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        self.relu(x)
        y = self.conv2(x)
        y += x
        return self.conv3(self.relu(y)).mean((2, 3))


class ReLUStatement(InplaceReLU):
    """In-place functions called as statements, their results dropped."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        F.relu_(x)
        y = self.conv2(x)
        y.mul_(0.5).add_(x)
        torch.relu_(y)
        return self.conv3(y).mean((2, 3))


def prelu() -> nn.Sequential:
    """One slope per channel, one for all, and a Softplus."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.PReLU(6),
        nn.Conv2d(6, 5, 3, padding=1),
        nn.PReLU(),
        nn.Conv2d(5, 5, 3, padding=1),
        nn.Softplus(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 4),
    )


class OneValueForAll(nn.Module):
    """Parameters and a buffer of one element, each for all channels: a slope, ReZero's weight, a pooling's power, a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.reduce, self.head = nn.Conv2d(6, 5, 3), nn.Linear(5, 4)
        self.slope = nn.PReLU()
        self.weight = nn.Parameter(torch.tensor(0.3))
        self.power = nn.Parameter(torch.full((1, 1, 1, 1), 3.0))
        self.temperature = nn.Parameter(torch.ones(1))
        self.register_buffer("scale", torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        x = self.slope(self.stem(x))
        x = x + self.weight * self.slope(self.inner(x))
        x = self.reduce(x) * self.scale
        power = 1 + F.softplus(self.power)
        x = x.abs().clamp(min=1e-4).pow(power).mean((2, 3), keepdim=True).pow(1 / power)
        return self.head(x.flatten(1)) * self.temperature


def convolution_1d() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(2, 6, 5, padding=2, bias=False),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(6, 5, 3, dilation=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(2),
        nn.Flatten(),
        nn.Linear(10, 4),
    )


def convolution_3d() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm3d(4),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(4, 5, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    )


def transposed() -> nn.Sequential:
    """A small generator: transposed convolutions, one of them grouped, Tanh at the end."""
    return nn.Sequential(
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"),
    )


def mixed_biases() -> nn.Sequential:
    """Odd widths, biases here and there, a BatchNorm without affine and one without running statistics."""
    return nn.Sequential(
        nn.Conv2d(3, 7, 3, padding=1, bias=True),
        nn.BatchNorm2d(7),
        nn.ReLU(),
        nn.Conv2d(7, 5, (3, 1), padding=(1, 0), bias=False),
        nn.BatchNorm2d(5, affine=False),
        nn.ReLU(),
        nn.Conv2d(5, 3, 1, bias=True),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.Sigmoid(),
        nn.Conv2d(3, 11, 3, bias=False),
        nn.SiLU(),
        nn.Flatten(1),
        nn.Linear(11 * 36, 5, bias=False),
    )


class TokenMLP(nn.Module):
    """Linear layers on (N, L, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(5, 8)
        self.fc2 = nn.Linear(8, 7)
        self.fc3 = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x))
        x = F.gelu(self.fc2(x), approximate="tanh")
        return self.fc3(x.mean(dim=1))

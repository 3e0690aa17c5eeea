"""Networks that join and split tensors along the channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DenseLayer(nn.Module):
    def __init__(self, before: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(before)
        self.conv = nn.Conv2d(before, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.conv(F.relu(self.norm(torch.cat(features, 1))))


class DenseNet(nn.Module):
    """Each layer reads everything before it; a transition with pooling between two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.block1 = nn.ModuleList(DenseLayer(4 + 3 * i, 3) for i in range(2))
        self.norm = nn.BatchNorm2d(10)
        self.transition = nn.Conv2d(10, 5, 1, bias=False)
        self.block2 = nn.ModuleList(DenseLayer(5 + 3 * i, 3) for i in range(2))
        self.last = nn.BatchNorm2d(11)
        self.fc = nn.Linear(11, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.block1:
            features.append(layer(features))
        x = self.transition(F.relu(self.norm(torch.cat(features, 1))))
        features = [F.avg_pool2d(x, 2)]
        for layer in self.block2:
            features.append(layer(features))
        x = F.relu(self.last(torch.cat(features, 1)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class DoubleConvolution(nn.Sequential):
    def __init__(self, before: int, after: int) -> None:
        super().__init__(
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
            nn.Conv2d(after, after, 3, padding=1),
            nn.ReLU(inplace=True),
        )


class UNet(nn.Module):
    """Transposed convolution up, skip concatenation across, one output per pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = DoubleConvolution(3, 4)
        self.down2 = DoubleConvolution(4, 6)
        self.bottom = DoubleConvolution(6, 8)
        self.up2 = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.conv2 = DoubleConvolution(12, 6)
        self.up1 = nn.ConvTranspose2d(6, 3, 4, stride=2, padding=1, bias=False)
        self.conv1 = DoubleConvolution(7, 5)
        self.out = nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        x = self.up2(self.bottom(F.max_pool2d(second, 2)))
        x = self.up1(self.conv2(torch.cat([second, x], dim=1)))
        return self.out(self.conv1(torch.cat([first, x], dim=1)))


class Fire(nn.Module):
    def __init__(self, before: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(before, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)


class SqueezeNet(nn.Module):
    """Ends in convolution, ReLU, global pooling: something not linear stands after the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), Fire(6, 3, 4), Fire(8, 3, 5)
        )
        self.classifier = nn.Sequential(nn.Dropout(0.0), nn.Conv2d(10, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.classifier(self.features(x)), 1)


class Inception(nn.Module):
    """Four branches of different depth over one tensor, one of them pooling it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.branch1 = nn.Conv2d(6, 3, 1)
        self.branch2 = nn.Sequential(nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, (1, 3), padding=(0, 1)))
        self.branch3 = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), nn.Conv2d(6, 2, 1))
        self.norm = nn.BatchNorm2d(14, eps=0.001)
        self.last = nn.Conv2d(14, 7, 3, stride=2)
        self.fc = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), F.avg_pool2d(x, 3, 1, 1)], 1)
        x = F.relu(self.last(F.relu(self.norm(x))), inplace=True)
        return self.fc(F.adaptive_avg_pool2d(x, (1, 1)).view(x.size(0), -1))


class InputConcatenated(nn.Module):
    """The input joins the features, so one layer reads channels that have a gate and channels that have none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(6)
        self.conv3 = nn.Conv2d(9, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.conv1(x))
        hidden = F.relu(self.norm2(self.conv2(torch.cat([x, hidden], 1))))
        return self.conv3(torch.cat([hidden, x], 1)).mean((2, 3))


class TwoPoolings(nn.Module):
    """The first half of a layer's channels is max-pooled, the second average-pooled: halves may not trade places."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        first, second = F.relu(self.conv1(x)).chunk(2, dim=1)
        x = torch.cat([F.max_pool2d(first, 2), F.avg_pool2d(second, 2)], dim=1)
        return self.fc(F.relu(self.conv2(x)).mean((2, 3)))


class TwoActivations(nn.Module):
    """As TwoPoolings, with activations, unequal parts and slices instead of chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 7, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(7)
        self.conv2 = nn.Conv2d(7, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x))
        x = torch.cat([torch.tanh(x[:, 3:]), F.relu(x[:, :3])], dim=1)
        return self.conv2(x).mean((2, 3))


class ZeroChannels(nn.Module):
    """Channels of zeros, which nobody makes: read, normalised, added to, halves of a gated unit, members of a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(10)
        self.conv3 = nn.Conv2d(10, 6, 3, padding=1)
        self.conv4 = nn.Conv2d(4, 6, 3, padding=1)
        self.conv5 = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(F.relu(self.conv1(x)), (0, 0, 0, 0, 1, 1))
        x = F.pad(x + self.conv2(x), (0, 0, 0, 0, 2, 0))
        x = F.glu(F.pad(self.conv3(F.relu(self.norm2(x))), (0, 0, 0, 0, 1, 1), value=0.5), dim=1)
        return self.conv5(F.pad(self.conv4(x), (0, 0, 0, 0, 1, 1)).softmax(1)).mean((2, 3))

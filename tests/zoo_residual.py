"""Networks with residual streams: every block writes to, and reads from, the same channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter


class SqueezeExcitation(nn.Module):
    """Scales each channel by a number computed from all channels' means."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(scale))))


class Block(nn.Module):
    """Post-activation basic block; ``shortcut`` is "pad" (option A) or "project" (option B)."""

    def __init__(self, before: int, after: int, shortcut: str, excite: bool) -> None:
        super().__init__()
        self.stride = 1 if before == after else 2
        self.conv1 = nn.Conv2d(before, after, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.excitation = SqueezeExcitation(after, 3) if excite else nn.Identity()
        self.padding = after - before
        self.shortcut: nn.Module = nn.Identity()
        if shortcut == "project" and before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, 2, bias=False), nn.BatchNorm2d(after))
            self.padding = 0

    def forward(self, x: Tensor) -> Tensor:
        identity = self.shortcut(x)
        if self.padding:
            left = self.padding // 2
            identity = F.pad(identity[:, :, ::2, ::2], (0, 0, 0, 0, left, self.padding - left))
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.excitation(self.bn2(self.conv2(out)))
        out += identity
        return F.relu(out)


class ResNet(nn.Module):
    """Stem, two blocks of the first width, two of the second, pooled head."""

    def __init__(self, shortcut: str, excite: bool = False, widths: tuple[int, int] = (4, 8)) -> None:
        super().__init__()
        first, second = widths
        self.conv1 = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = nn.Sequential(*(Block(first, first, shortcut, excite) for _ in range(2)))
        self.layer2 = nn.Sequential(Block(first, second, shortcut, excite), Block(second, second, shortcut, excite))
        self.fc = nn.Linear(second, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class PreActivationBlock(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        stride = 1 if before == after else 2
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False) if before != after else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        identity = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        return out + identity


class PreActivationResNet(nn.Module):
    """BatchNorm and ReLU come before each convolution, so the stream itself is never normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(PreActivationBlock(4, 4), PreActivationBlock(4, 6), PreActivationBlock(6, 6))
        self.bn = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.blocks(self.stem(x))))
        return self.head(x.mean((2, 3)))


class ResNeXtBlock(nn.Module):
    def __init__(self, channels: int, width: int, groups: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


class ResNeXt(nn.Module):
    """Grouped convolutions inside residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.block1 = ResNeXtBlock(6, 8, groups=4)
        self.block2 = ResNeXtBlock(6, 6, groups=2)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(F.relu(self.stem(x))))
        return self.fc(x.amax((2, 3)))


class ScaledResidual(nn.Module):
    """No normalisation; one learned scale per channel on each branch, and a scalar one on the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.branch1 = nn.Conv2d(5, 5, 3, padding=1)
        self.branch2 = nn.Conv2d(5, 5, 3, padding=1)
        self.scale1 = Parameter(torch.ones(5, 1, 1))
        self.scale2 = Parameter(torch.ones(1, 5, 1, 1))
        self.head = nn.Conv2d(5, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.scale1 * self.branch1(F.relu(x))
        x = 0.7 * (x + self.branch2(F.relu(x)) * self.scale2)
        return self.head(F.gelu(x)).mean(dim=(-2, -1))


class ResidualMLP(nn.Module):
    """A residual stream through linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 6)
        self.hidden = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        for layer in self.hidden:
            x = x + F.silu(layer(x))
        return self.head(x)


class Denoiser(nn.Module):
    """Subtracts what it computes from its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.conv3 = nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        noise = F.relu(self.conv1(x))
        noise = F.relu(self.bn2(self.conv2(noise)))
        return x - self.conv3(noise)


class MixedNorms(nn.Module):
    """BatchNorms of torch.nn added to what other normalisations give: GroupNorm, and a BatchNorm with a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.grouped = nn.BatchNorm2d(6), nn.GroupNorm(2, 6)
        self.own, self.projected = _OwnBatchNorm(6), nn.BatchNorm2d(6)
        self.projection, self.fc = nn.Conv2d(6, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.norm(x) + self.grouped(x))
        x = F.relu(self.own(self.conv(x)) + self.projected(self.projection(x)))
        return self.fc(x.mean((2, 3)))


class _OwnBatchNorm(nn.BatchNorm2d):
    """With a forward of its own, as timm's BatchNormAct2d."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.training, eps=self.eps)

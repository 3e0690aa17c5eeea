"""The residual networks for 32×32 images, ResNet-20 among them."""

from __future__ import annotations

from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut, each sum followed by a ReLU.

    Where the number of channels or the size of the image changes, the shortcut is a 1×1 convolution with BatchNorm.

    Args:
        in_channels: channels of the input.
        channels: channels of the output.
        stride: of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != channels:
            shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, in_channels, H, W) to (N, channels, H / stride, W / stride)."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNetCifar(nn.Module):
    """A residual network of 6n + 2 layers: a 3×3 convolution, three stages of n blocks, and a linear layer.

    The stages have 16, 32 and 64 channels and read images of 32, 16 and 8 pixels a side. The paper of the architecture
    pads the shortcuts with zeros at CIFAR's size (its option A); here they are projections (its option B), as in the
    code behind "Merging of neural networks". Weights start from He's normal distribution of the fan out.

    Args:
        blocks: n, blocks of each stage.
        num_classes: outputs.
        width: multiplies the channels of every hidden layer.
        channels: of the first stage, before ``width``; the others have twice and four times as many.

    Raises:
        ValueError: if one of them is below 1.

    Source: K. He et al., "Deep residual learning for image recognition" (2016), section 4.2; Pašen & Boža, "Merging of
    neural networks", section 3.3.
    """

    def __init__(self, blocks: int = 3, num_classes: int = 100, width: int = 1, channels: int = 16) -> None:
        super().__init__()
        if min(blocks, num_classes, width, channels) < 1:
            raise ValueError(
                f"ResNetCifar needs positive numbers; got {blocks=}, {num_classes=}, {width=}, {channels=}"
            )
        first, second, third = (factor * channels * width for factor in (1, 2, 4))
        self.conv1 = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = residual_stage(blocks, first, first, stride=1)
        self.layer2 = residual_stage(blocks, first, second, stride=2)
        self.layer3 = residual_stage(blocks, second, third, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(third, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, 3, H, W) to logits (N, num_classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


def resnet20(num_classes: int = 100, width: int = 1) -> ResNetCifar:
    """The ResNet-20 for CIFAR: 20 layers, 0.28 million parameters with 100 classes."""
    return ResNetCifar(3, num_classes, width)


def residual_stage(blocks: int, in_channels: int, channels: int, stride: int) -> nn.Sequential:
    """Blocks in a row, the first of which changes channels and size."""
    first = ResidualBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(ResidualBlock(channels, channels) for _ in range(blocks - 1)))

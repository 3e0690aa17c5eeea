"""The networks of the recipes, in any width: an MLP for the sine, LeNet, ResNet-20 and ResNet-18."""

from __future__ import annotations

import torch.nn.functional as F
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


class LeNet(nn.Module):
    """LeNet-5 with today's nonlinearities: two convolutions with ReLU and 2×2 max-pooling, three linear layers.

    Args:
        in_channels: channels of the image.
        image_size: its height and width.
        classes: outputs.
        width: multiplies the channels and units of every hidden layer.
        kernel_size: of both convolutions, odd; the first is padded to keep the image's size, the second is not.
        channels: of the two convolutions, before ``width``.
        units: of the two hidden linear layers, before ``width``.

    Raises:
        ValueError: if nothing is left of the image after the second pooling.

    Source: Y. LeCun et al., "Gradient-based learning applied to document recognition" (1998); Pašen & Boža, "Merging of
    neural networks", section 3.2.
    """

    def __init__(
        self,
        in_channels: int = 3,
        image_size: int = 28,
        classes: int = 10,
        width: int = 1,
        kernel_size: int = 5,
        channels: tuple[int, int] = (6, 16),
        units: tuple[int, int] = (120, 84),
    ) -> None:
        super().__init__()
        side = (image_size // 2 - kernel_size + 1) // 2
        if side < 1:
            raise ValueError(f"LeNet with {kernel_size=} needs larger images; got {image_size=}")
        first, second, third, fourth = (size * width for size in (*channels, *units))
        self.conv1 = nn.Conv2d(in_channels, first, kernel_size, padding=kernel_size // 2)
        self.conv2 = nn.Conv2d(first, second, kernel_size)
        self.fc1 = nn.Linear(second * side * side, third)
        self.fc2 = nn.Linear(third, fourth)
        self.fc3 = nn.Linear(fourth, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, in_channels, image_size, image_size) to logits (N, classes)."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


def small_lenet(classes: int = 10, width: int = 1) -> LeNet:
    """A LeNet for grey 8×8 images, such as scikit-learn's digits: 3×3 kernels, 3 and 6 channels, 12 and 12 units."""
    return LeNet(1, 8, classes, width, kernel_size=3, channels=(3, 6), units=(12, 12))


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


class ResNet18(nn.Module):
    """The residual network of 18 layers: a 7×7 stem with pooling, four stages of two blocks, and a linear layer.

    With ``width`` 1 it is torchvision's ``resnet18``: same names, shapes and initial distributions, so that either's
    weights load into the other.

    Args:
        num_classes: outputs.
        width: multiplies the channels of every hidden layer.

    Raises:
        ValueError: if ``num_classes`` or ``width`` is below 1.

    Source: K. He et al., "Deep residual learning for image recognition" (2016), table 1.
    """

    def __init__(self, num_classes: int = 1000, width: int = 1) -> None:
        super().__init__()
        if min(num_classes, width) < 1:
            raise ValueError(f"ResNet18 needs positive numbers; got {num_classes=}, {width=}")
        first, second, third, fourth = (channels * width for channels in (64, 128, 256, 512))
        self.conv1 = nn.Conv2d(3, first, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = residual_stage(2, first, first, stride=1)
        self.layer2 = residual_stage(2, first, second, stride=2)
        self.layer3 = residual_stage(2, second, third, stride=2)
        self.layer4 = residual_stage(2, third, fourth, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(fourth, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, 3, H, W) to logits (N, num_classes)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))

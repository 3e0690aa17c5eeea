"""LeNet, in the two sizes of the recipes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


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

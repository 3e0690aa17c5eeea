"""ResNet-18 for photographs, in any width."""

from __future__ import annotations

from torch import Tensor, nn

from fastmerge.networks.resnet_cifar import residual_stage


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

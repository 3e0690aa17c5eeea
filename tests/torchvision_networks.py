"""torchvision's classification networks, at a size that tests can afford."""

from __future__ import annotations

from torch import nn
from torchvision import models

REFUSED = ("convnext", "maxvit", "swin", "vit")  # layer normalisation and attention
LEAST_SIZE = {"inception": 299, "squeezenet": 32, "alexnet": 64, "vgg": 32}
"""Smallest image side that a family's strides leave something of; 64 where none is given."""

FAMILIES = [
    "alexnet",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
]
"""One network of each family, small enough for every run."""

LARGE = ["efficientnet_v2_s", "inception_v3", "resnext50_32x4d", "vgg11_bn"]
"""Families whose smallest network takes a while."""


def names() -> list[str]:
    """Every classification network, quantised ones left out."""
    return [name for name in models.list_models(module=models) if not name.startswith("quantized")]


def is_refused(name: str) -> bool:
    return name.startswith(REFUSED)


def size(name: str) -> int:
    """The side of a small image that the network takes."""
    return next((side for family, side in LEAST_SIZE.items() if name.startswith(family)), 64)


def make(name: str, num_classes: int = 10) -> nn.Module:
    """A network without trained weights, quick to initialise, without dropout of whole branches."""
    options: dict[str, object] = {"num_classes": num_classes}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    if name.startswith("vgg"):
        options["init_weights"] = False
    return models.get_model(name, weights=None, **options)


def make_with_small_classifier(name: str) -> nn.Module:
    """As :func:`make`; VGG's and AlexNet's classifiers, most of their weights, are narrowed from 4096 to 64."""
    model = make(name)
    if name.startswith(("vgg", "alexnet")):
        before = 4096
        for index, layer in enumerate(model.classifier):
            if isinstance(layer, nn.Linear):
                after = 10 if layer.out_features == 10 else 64
                reads = layer.in_features if layer.in_features != before else 64
                model.classifier[index] = nn.Linear(reads, after)
    return model

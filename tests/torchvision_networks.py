"""torchvision's classification networks, at a size that tests can afford."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn
from torchvision import models
from torchvision.models import convnext, swin_transformer

LEAST_SIZE = {"inception": 299, "squeezenet": 32, "alexnet": 64, "vgg": 32, "maxvit": 224, "vit": 224}
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

LARGE = [
    *("convnext_tiny", "efficientnet_v2_s", "inception_v3", "maxvit_t", "resnext50_32x4d"),
    *("swin_t", "swin_v2_t", "vgg11_bn", "vit_b_32"),
]
"""Families whose smallest network takes a while."""


def names() -> list[str]:
    """Every classification network, quantised ones left out."""
    return [name for name in models.list_models(module=models) if not name.startswith("quantized")]


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


def small_transformers() -> dict[str, Callable[[], nn.Module]]:
    """torchvision's transformers at sizes for every run, all of images of 32 pixels."""
    swin = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": [4, 4], "num_classes": 5}
    blocks = [convnext.CNBlockConfig(8, 16, 1), convnext.CNBlockConfig(16, None, 1)]
    v2 = {"block": swin_transformer.SwinTransformerBlockV2, "downsample_layer": swin_transformer.PatchMergingV2}
    still = {"stochastic_depth_prob": 0.0}
    return {
        "vit": partial(models.VisionTransformer, 32, 8, 1, 2, 16, 24, num_classes=5),
        "convnext": partial(models.ConvNeXt, blocks, num_classes=5, **still),
        "swin": partial(models.SwinTransformer, [4, 4], **swin, **still),
        "swin_v2": partial(models.SwinTransformer, [4, 4], **swin, **v2, **still),
    }


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

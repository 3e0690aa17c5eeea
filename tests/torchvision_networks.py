"""torchvision's classification networks, at a size that tests can afford."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn
from torchvision import models
from torchvision.models import convnext, efficientnet, mobilenetv3, regnet, resnet, swin_transformer

LEAST_SIZE = {"inception": 299, "squeezenet": 32, "alexnet": 64, "vgg": 32, "maxvit": 224, "vit": 224}
"""Smallest image side that a family's strides leave something of; 64 where none is given."""

FAMILIES = ["googlenet", "mobilenet_v2", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1"]
"""Families of which one network is small enough for every run."""

LARGE = [
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "inception_v3", "maxvit_t"),
    *("mnasnet0_5", "mobilenet_v3_small", "regnet_y_400mf", "resnext50_32x4d", "swin_t", "swin_v2_t"),
    *("vgg11_bn", "vit_b_32"),
]
"""Families whose smallest network takes a while; of most, every run takes one of the same code and fewer layers."""


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


def small_convolutional() -> dict[str, Callable[[], nn.Module]]:
    """Networks of torchvision's code with fewer and narrower layers than any that it names."""
    squeezed = [efficientnet.MBConvConfig(1, 3, 1, 8, 8, 1), efficientnet.MBConvConfig(4, 5, 2, 8, 16, 2)]
    fused = [efficientnet.FusedMBConvConfig(1, 3, 1, 8, 8, 1), efficientnet.FusedMBConvConfig(4, 3, 2, 8, 16, 2)]
    v3 = mobilenetv3.InvertedResidualConfig
    bottlenecks = [
        v3(8, 3, 8, 8, True, "RE", 2, 1, 1),
        v3(8, 5, 16, 16, True, "HS", 1, 1, 1),
        v3(16, 3, 32, 16, False, "HS", 1, 1, 1),
    ]
    regular = regnet.BlockParams.from_init_params(depth=5, w_0=8, w_a=8.0, w_m=2.0, group_width=8, se_ratio=0.25)
    return {
        "densenet": partial(models.DenseNet, 8, (2, 3), 16, num_classes=5),
        "efficientnet": partial(models.EfficientNet, squeezed, 0.2, num_classes=5),
        "efficientnet_v2": partial(models.EfficientNet, fused, 0.2, num_classes=5, last_channel=24),
        "mobilenet_v2": partial(models.MobileNetV2, 5, 0.25, [[1, 16, 1, 1], [6, 32, 2, 2]]),
        "mobilenet_v3": partial(models.MobileNetV3, bottlenecks, 24, num_classes=5),
        "regnet": partial(models.RegNet, regular, num_classes=5, stem_width=8),
        "resnet": partial(models.ResNet, resnet.BasicBlock, [1, 2, 1, 1], num_classes=5),
        "shufflenet_v2": partial(models.ShuffleNetV2, [2, 2, 2], [8, 16, 16, 32, 32], num_classes=5),
    }


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

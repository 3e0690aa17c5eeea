"""ResNet-20 on CIFAR-100."""

from __future__ import annotations

from torch import nn

from fastmerge.data.augmentation import AUGMENTATIONS
from fastmerge.networks.resnet_cifar import resnet20
from fastmerge.training.loader_recipe import LoaderRecipe, Plan


def resnet20_cifar100() -> LoaderRecipe:
    """The paper's experiment with residual networks of 0.28 million parameters.

    Its authors' scripts train for two thirds as long as the paper says; their milestones are kept as fractions of each
    stage, the merge stage's too. The images stay on the device, normalised by CIFAR's own statistics.
    """
    third = Plan(epochs=300, lr=0.1, milestones=(150, 225))
    return LoaderRecipe(
        name="resnet20-cifar100",
        make_network=_network,
        most_classes=100,
        image_size=32,
        augmentation=AUGMENTATIONS["cifar"],
        batch_size=128,
        teacher=third,
        merge=Plan(epochs=150, lr=0.1, milestones=(75, 105)),
        finetune=Plan(epochs=150, lr=0.1, milestones=(75, 113)),
        long=Plan(epochs=900, lr=0.1, milestones=(450, 675)),
        third=third,
        momentum=0.9,
        weight_decay=1e-4,
        gate_lr=None,
        lam_start=0.05,
        lam_step=0.05,
        link_at=0.0,
        test_every=10,
        source="Pašen & Boža, Merging of neural networks, section 3.3 (5 replicates), and its code, cifar100/",
    )


def _network(classes: int, width: int) -> nn.Module:
    return resnet20(classes, width)

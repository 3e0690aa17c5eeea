"""ResNet-18 on ImageNet-1k."""

from __future__ import annotations

from fastmerge.data.augmentation import Augmentation
from fastmerge.networks.resnet18 import ResNet18
from fastmerge.training.loader_recipe import LoaderRecipe, Plan


def resnet18_imagenet() -> LoaderRecipe:
    """The paper's last experiment: teachers of 20 epochs each, 20 of merging, 90 of fine-tuning.

    ``one`` trains for the same 150 epochs, ``bo3`` for 50 each; the paper's figure beside ``bo3`` is that of a network
    trained for 90. The authors trained with timm: random crops, mirroring and a colour jitter of 0.4, as here. Its SGD has
    Nesterov's momentum, and their gates were in the weights' optimizer; here gates have an optimizer of their own, without
    decay, as everywhere.
    """
    return LoaderRecipe(
        name="resnet18-imagenet",
        make_network=ResNet18,
        most_classes=1000,
        image_size=224,
        augmentation=Augmentation(
            scale=(0.08, 1.0), brightness=0.4, contrast=0.4, saturation=0.4, shorter_side=1 / 0.95
        ),
        batch_size=256,
        teacher=Plan(epochs=20, lr=0.1, milestones=(9, 18)),
        merge=Plan(epochs=20, lr=0.1),
        finetune=Plan(epochs=90, lr=0.07, milestones=(30, 60), warmup=2),
        long=Plan(epochs=150, lr=0.1, milestones=(50, 100)),
        third=Plan(epochs=50, lr=0.1, milestones=(17, 34)),
        momentum=0.9,
        weight_decay=1e-4,
        gate_lr=None,
        lam_start=0.3,
        lam_step=0.2,
        link_at=0.0,
        source="Pašen & Boža, Merging of neural networks, section 3.4, and its code, imagenet/ (1 replicate)",
    )

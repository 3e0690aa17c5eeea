"""ResNet-18 on Imagewoof, ten breeds of dogs, at 224×224 pixels."""

from __future__ import annotations

from fastmerge.data.augmentation import AUGMENTATIONS
from fastmerge.networks.resnet18 import ResNet18
from fastmerge.training.loader_recipe import LoaderRecipe, Plan


def resnet18_imagewoof() -> LoaderRecipe:
    """The paper's third experiment; images of 160 pixels a side are what its authors used, cut and enlarged to 224."""
    return LoaderRecipe(
        name="resnet18-imagewoof",
        make_network=ResNet18,
        most_classes=10,
        image_size=224,
        augmentation=AUGMENTATIONS["imagewoof"],
        batch_size=32,
        teacher=Plan(epochs=200, lr=0.01, milestones=(100, 150)),
        merge=Plan(epochs=100, lr=0.01),
        finetune=Plan(epochs=100, lr=0.01, milestones=(50, 75)),
        long=Plan(epochs=600, lr=0.01, milestones=(300, 450)),
        third=Plan(epochs=200, lr=0.01, milestones=(100, 150)),
        momentum=0.9,
        weight_decay=0.0,
        gate_lr=None,
        lam_start=0.01,
        lam_step=0.05,
        link_at=0.0,
        test_every=10,  # there are nearly half as many images to test on as to train on
        source="Pašen & Boža, Merging of neural networks, section 3.2 (5 replicates), and its code, imagewoof/",
    )

"""ResNet-20 on CIFAR-100."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmerge.data.arrays import load_npz
from fastmerge.data.augmentation import flip_and_shift
from fastmerge.data.cifar import find_cifar, load_cifar
from fastmerge.data.dataset import Dataset, image_dataset
from fastmerge.networks.resnet_cifar import resnet20
from fastmerge.training.recipe import Recipe

IMAGE_SIZE = 32
CLASSES = 100
SHIFT = 4


def resnet20_cifar100() -> Recipe:
    """The paper's experiment with residual networks of 0.28 million parameters.

    Its authors' scripts train for two thirds as long as the paper says; their milestones are kept as fractions of each
    stage, the merge stage's too. Images are normalised by CIFAR's own statistics. Networks are stacked two at a time, the
    teachers of one replicate: on a CPU more gain nothing.
    """
    return Recipe(
        name="resnet20-cifar100",
        metric="test_accuracy",
        make_network=_network,
        load_data=_load,
        criterion=F.cross_entropy,
        epochs=900,
        batch_size=128,
        lr=0.1,
        teacher_milestones=(150, 225),
        long_milestones=(450, 675),
        merge_milestones=(75, 105),
        finetune_milestones=(75, 113),
        momentum=0.9,
        weight_decay=1e-4,
        gate_lr=0.2,
        lam_start=0.05,
        lam_step=0.05,
        link_at=0.0,
        augment=_augment,
        test_every=10,
        stack=1,
        source="Pašen & Boža, Merging of neural networks, section 3.3 (5 replicates), and its code, cifar100/",
    )


def _network(width: int) -> nn.Module:
    return resnet20(CLASSES, width)


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    return flip_and_shift(images, generator, SHIFT)


def _load(path: Path | None, seed: int) -> Dataset:
    if path is None:
        raise ValueError("resnet20-cifar100 needs data: a directory with cifar-100-python/, or an .npz of uint8 arrays")
    arrays = load_cifar(path) if find_cifar(path) else load_npz(path)
    shape = arrays.train_images.shape[1:]
    if shape != (IMAGE_SIZE, IMAGE_SIZE, 3) or arrays.classes > CLASSES:
        raise ValueError(
            f"resnet20-cifar100 needs {IMAGE_SIZE}x{IMAGE_SIZE} images with 3 channels of at most {CLASSES} classes; "
            f"{path} has {shape[0]}x{shape[1]} with {shape[2]}, and {arrays.classes} classes"
        )
    return image_dataset(arrays)

"""LeNet on Imagewoof, ten breeds of dogs, at 28×28 pixels."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from torch.nn import functional as F

from fastmerge.data.arrays import load_npz
from fastmerge.data.augmentation import flip_and_shift
from fastmerge.data.dataset import Dataset, image_dataset
from fastmerge.data.decoding import OnBadImage
from fastmerge.data.folders import load_folder
from fastmerge.networks.lenet import LeNet
from fastmerge.training.recipe import Recipe

IMAGE_SIZE = 28
CLASSES = 10


def lenet_imagewoof() -> Recipe:
    """The paper's second experiment; on a CPU take a budget of a few percent."""
    return Recipe(
        name="lenet-imagewoof",
        metric="test_accuracy",
        make_network=_network,
        load_data=_load,
        criterion=F.cross_entropy,
        epochs=6000,
        batch_size=32,
        lr=0.01,
        teacher_milestones=(1000, 1500),
        long_milestones=(3000, 4500),
        finetune_milestones=(500, 750),
        momentum=0.9,
        weight_decay=0.0,
        gate_lr=None,
        lam_start=0.01,
        lam_step=0.05,
        link_at=0.0,
        augment=flip_and_shift,
        test_every=100,
        stack=5,
        source="Pašen & Boža, Merging of neural networks, section 3.2 (10 replicates)",
    )


def _network(width: int) -> nn.Module:
    return LeNet(3, IMAGE_SIZE, CLASSES, width)


def _load(path: Path | None, seed: int, on_bad_image: OnBadImage = "raise") -> Dataset:
    if path is None:
        raise ValueError(
            "lenet-imagewoof needs data: an .npz of uint8 arrays, or a tree train/<class>/<image>, val/<class>/<image>"
        )
    arrays = load_folder(path, IMAGE_SIZE, on_bad_image) if path.is_dir() else load_npz(path)
    shape = arrays.train_images.shape[1:]
    if shape != (IMAGE_SIZE, IMAGE_SIZE, 3) or arrays.classes > CLASSES:
        raise ValueError(
            f"lenet-imagewoof needs {IMAGE_SIZE}x{IMAGE_SIZE} images with 3 channels of at most {CLASSES} classes; "
            f"{path} has {shape[0]}x{shape[1]} with {shape[2]}, and {arrays.classes} classes"
        )
    return image_dataset(arrays)

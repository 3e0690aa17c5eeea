"""Batches of images and their classes for merging one's own networks, from a tree of images or an .npz of arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastmerge.data.arrays import load_npz
from fastmerge.data.dataset import Dataset, image_dataset
from fastmerge.data.folders import TEST_FOLDERS

# Mean and standard deviation of ImageNet's channels; torchvision's networks are trained with them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageLoaders:
    """Batches of images (N, C, H, W), float32 and normalised, and classes (N,), int64.

    Attributes:
        train: Shuffled; a tree's are cropped and flipped at random too.
        val: In order, as they are.
        classes: How many classes there are.
    """

    train: Iterable[tuple[Tensor, Tensor]]
    val: Iterable[tuple[Tensor, Tensor]]
    classes: int


def image_loaders(path: str | Path, batch_size: int, image_size: int | None = None, workers: int = 0) -> ImageLoaders:
    """Makes loaders for a data set.

    Args:
        path: A directory with ``train/<class>/<image>`` and ``val/<class>/<image>`` (or ``test``), which needs
            torchvision, or an .npz file with ``train_images, train_labels, test_images, test_labels``, images uint8.
        batch_size: Images per batch.
        image_size: Height and width of a tree's images, 224 by default. Arrays keep their own.
        workers: Processes that decode a tree's images.

    Raises:
        FileNotFoundError: There is nothing at path, or a folder is missing.
        ValueError: The data is not of that form.
    """
    path = Path(path)
    if path.is_dir():
        return _tree_loaders(path, batch_size, 224 if image_size is None else image_size, workers)
    arrays = load_npz(path)
    if image_size not in (None, arrays.train_images.shape[1]):
        raise ValueError(f"the images of {path} are {arrays.train_images.shape[1]} high; another size is for a tree")
    dataset = image_dataset(arrays)
    return ImageLoaders(
        ArrayLoader(dataset.train_inputs, dataset.train_targets, dataset, batch_size, shuffle=True),
        ArrayLoader(dataset.test_inputs, dataset.test_targets, dataset, batch_size, shuffle=False),
        arrays.classes,
    )


class ArrayLoader:
    """Batches of a data set in memory, normalised batch by batch, so that the images can stay uint8.

    Args:
        inputs, targets: (N, ...) each.
        dataset: How to normalise.
        batch_size: Samples per batch.
        shuffle: Whether each pass draws a new order, from torch's random state, and leaves out a last batch of one.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, dataset: Dataset, batch_size: int, *, shuffle: bool) -> None:
        self.inputs, self.targets, self.dataset = inputs, targets, dataset
        self.batch_size, self.shuffle = batch_size, shuffle

    def __len__(self) -> int:
        full, rest = divmod(len(self.inputs), self.batch_size)
        return full + (rest > 0 and not (self.shuffle and _lonely(len(self.inputs), self.batch_size)))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.inputs)) if self.shuffle else torch.arange(len(self.inputs))
        for batch in order.split(self.batch_size)[: len(self)]:
            yield self.dataset.normalise(self.inputs[batch]), self.targets[batch]


def _lonely(samples: int, batch_size: int) -> bool:
    """Whether the last batch of several would be of one sample, which BatchNorm can't train on."""
    return samples > batch_size and samples % batch_size == 1


def _tree_loaders(path: Path, batch_size: int, image_size: int, workers: int) -> ImageLoaders:
    try:
        from torchvision import transforms
        from torchvision.datasets import ImageFolder
    except ImportError as error:
        raise ValueError(f"{path} is a tree of images, which needs torchvision; install it or give an .npz") from error
    folders = [path / "train", next((path / name for name in TEST_FOLDERS if (path / name).is_dir()), path / "val")]
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no {folder}; a tree needs train/<class>/<image> and val/<class>/<image>")
    finish = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    train_transform = transforms.Compose(
        [transforms.RandomResizedCrop(image_size), transforms.RandomHorizontalFlip(), *finish]
    )
    # As torchvision evaluates its networks: the centre 7/8 of the image.
    val_transform = transforms.Compose(
        [transforms.Resize(round(image_size * 8 / 7)), transforms.CenterCrop(image_size), *finish]
    )
    try:
        train, val = ImageFolder(folders[0], train_transform), ImageFolder(folders[1], val_transform)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is no tree of images: {error}") from error
    if train.classes != val.classes:
        differing = sorted(set(train.classes) ^ set(val.classes))
        raise ValueError(f"the classes of {folders[0]} and {folders[1]} differ: {', '.join(differing[:5])}")
    shared: dict[str, Any] = {
        "batch_size": batch_size,
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": torch.cuda.is_available(),
    }
    lonely = _lonely(len(train), batch_size)
    return ImageLoaders(
        DataLoader(train, shuffle=True, drop_last=lonely, **shared), DataLoader(val, **shared), len(train.classes)
    )

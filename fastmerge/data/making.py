"""Loaders of the kind that was chosen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastmerge.data.arrays import ImageArrays, channel_statistics, evenly_held_out
from fastmerge.data.choosing import Choice, Data, Loader
from fastmerge.data.dali_graph import Graph
from fastmerge.data.dali_loader import DaliLoader
from fastmerge.data.device_loader import DeviceLoader, Finish
from fastmerge.data.epochs import EpochLoader
from fastmerge.data.folders import read_tree
from fastmerge.data.torch_loader import ArrayBatches, TorchLoader, TreeBatches
from fastmerge.data.trees import ImageTree

# Mean and standard deviation of ImageNet's channels; torchvision's networks are trained with them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def make_loaders(
    data: Data, name: Loader, choice: Choice, held_out: float = 0.0
) -> tuple[EpochLoader, EpochLoader, EpochLoader | None]:
    """The loaders of training, of validation and of what is held out of the training images.

    Trees are usually normalised as ImageNet, arrays by their training images.
    """
    mean, std = _normalisation(data, choice)
    labels = data.train_labels if isinstance(data, ImageArrays) else data[0].labels
    held = evenly_held_out(len(labels), held_out, labels) if held_out else np.array([], np.int64)
    kept = np.setdiff1d(np.arange(len(labels)), held) if held_out else slice(None)
    if isinstance(data, ImageArrays):
        finish = _finish(mean, std, choice)
        make_array = _device_loader if name == "device" else _array_loader
        return (
            make_array(data.train_images[kept], data.train_labels[kept], True, finish, choice),
            make_array(data.test_images, data.test_labels, False, finish, choice),
            make_array(data.train_images[held], labels[held], False, finish, choice) if held_out else None,
        )
    make = {"dali": _dali_loader, "device": _decoded_loader, "torch": _tree_loader}[name]
    return (
        make(_part(data[0], kept) if held_out else data[0], True, mean, std, choice),
        make(data[1], False, mean, std, choice),
        make(_part(data[0], held), False, mean, std, choice) if held_out else None,
    )


def _part(tree: ImageTree, index: Any) -> ImageTree:
    return replace(tree, files=[tree.files[i] for i in index], labels=tree.labels[index])


def _normalisation(data: Data, choice: Choice) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of each channel, of pixels in 0..255."""
    if choice.normalisation is None and isinstance(data, ImageArrays):
        return channel_statistics(data.train_images)
    mean, std = choice.normalisation or (IMAGENET_MEAN, IMAGENET_STD)
    return 255 * np.array(mean, np.float64), 255 * np.array(std, np.float64)


def _finish(mean: NDArray[np.float64], std: NDArray[np.float64], choice: Choice) -> Finish:
    return Finish(mean, std, choice.dtype, choice.channels_last, choice.device)


def _dali_loader(
    tree: ImageTree, training: bool, mean: NDArray[np.float64], std: NDArray[np.float64], choice: Choice
) -> EpochLoader:
    graph = Graph(
        batch_size=choice.batch_size[training],
        size=choice.size,
        augmentation=choice.augmentation,
        training=training,
        mean=mean,
        std=std,
        half=choice.dtype is torch.float16,
        channels_last=choice.channels_last,
        device_id=choice.device.index if choice.device.type == "cuda" else None,
        threads=max(1, choice.workers),
    )
    return DaliLoader(tree.files, tree.labels, choice.batches(len(tree.files), training), graph, choice.bad_images)


def _tree_loader(
    tree: ImageTree, training: bool, mean: NDArray[np.float64], std: NDArray[np.float64], choice: Choice
) -> EpochLoader:
    batches = choice.batches(len(tree.files), training)
    source = TreeBatches(tree.files, choice.size, choice.augmentation, batches)
    finish, changes = _finish(mean, std, choice), choice.changes(training)
    return TorchLoader(source, tree.labels, batches, changes, finish, choice.bad_images, choice.workers)


def _array_loader(
    images: NDArray[np.uint8], labels: NDArray[np.int64], training: bool, finish: Finish, choice: Choice
) -> EpochLoader:
    batches = choice.batches(len(images), training)
    # Picking out of an array is no work for other processes.
    return TorchLoader(ArrayBatches(images), labels, batches, choice.changes(training), finish, choice.bad_images, 0)


def _decoded_loader(
    tree: ImageTree, training: bool, mean: NDArray[np.float64], std: NDArray[np.float64], choice: Choice
) -> EpochLoader:
    images, good = read_tree(tree, choice.size, choice.bad_images)
    finish = _finish(mean, std, choice)
    return _device_loader(images, tree.labels, training, finish, choice, None if good.all() else good)


def _device_loader(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    training: bool,
    finish: Finish,
    choice: Choice,
    good: NDArray[np.bool_] | None = None,
) -> EpochLoader:
    placed = torch.from_numpy(np.ascontiguousarray(images)).to(choice.device)
    targets = torch.from_numpy(labels).to(choice.device)
    return DeviceLoader(placed, targets, choice.batches(len(images), training), choice.changes(training), finish, good)

"""Loaders for a data set, whatever it is kept in: one protocol, three ways to read it."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fastmerge.data.arrays import ImageArrays, channel_statistics, load_npz
from fastmerge.data.augmentation import AUGMENTATIONS, Augmentation
from fastmerge.data.cifar import find_cifar, load_cifar
from fastmerge.data.dali_graph import Graph
from fastmerge.data.dali_loader import DaliLoader
from fastmerge.data.decoding import BadImages, OnBadImage
from fastmerge.data.device_loader import DeviceLoader, Finish
from fastmerge.data.epochs import Batches, EpochLoader
from fastmerge.data.folders import read_trees
from fastmerge.data.torch_loader import ArrayBatches, TorchLoader, TreeBatches
from fastmerge.data.trees import ImageTree, find_trees

Loader = Literal["dali", "device", "torch"]
LOADERS: tuple[Loader, ...] = ("dali", "device", "torch")

# Mean and standard deviation of ImageNet's channels; torchvision's networks are trained with them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST_WORKERS = 16
_MOST_DECODED = 2 * 2**30  # bytes of a tree that is decoded once and held without being asked for
Data = ImageArrays | tuple[ImageTree, ImageTree]


@dataclass(frozen=True)
class ImageLoaders:
    """Batches of images (N, C, H, W), normalised, and classes (N,), int64, on the device.

    Attributes:
        train: Shuffled and changed at random.
        val: In order, each image once.
        classes: How many classes there are.
        loader: Which of the loaders reads.
        why: The same in a sentence, with the reason, for a log.
        bad_images: Files that could not be read and were left out; it fills as the loaders come by them.
    """

    train: EpochLoader
    val: EpochLoader
    classes: int
    loader: Loader
    why: str
    bad_images: BadImages


def image_loaders(
    path: str | Path,
    batch_size: int,
    *,
    image_size: int | None = None,
    augmentation: str | Augmentation | None = None,
    loader: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    seed: int = 0,
    workers: int | None = None,
    shard: int = 0,
    shards: int = 1,
    drop_last: bool = False,
    val_batch_size: int | None = None,
    on_bad_image: OnBadImage = "raise",
) -> ImageLoaders:
    """Makes loaders for a data set.

    All loaders give the same batches: order and changes are functions of seed, epoch and image. What a pixel is differs by
    rounding, and on a GPU by its JPEG decoder's.

    Args:
        path: A directory with ``train/<class>/<image>`` and ``val/<class>/<image>`` (or ``test``); one with CIFAR-10 or
            CIFAR-100 as torchvision keeps them; or an .npz file with ``train_images, train_labels, test_images,
            test_labels``, images uint8.
        batch_size: Images per batch, of this shard.
        image_size: Height and width of a tree's images, 224 by default. Arrays keep their own.
        augmentation: One of "imagenet", "imagewoof", "cifar", "small" and "none", or your own. None is "imagenet" for trees,
            "cifar" for CIFAR and "none" for an .npz, whose images may be of anything.
        loader: "dali" decodes the files of a tree on the GPU, or on the CPU with more speed than "torch", which is
            DataLoader and Pillow. "device" holds all images on the device, as uint8 of the final size; of a tree it needs an
            augmentation that doesn't crop from the whole image. "auto" chooses.
        device: Where batches go.
        dtype: Of the images: float32 or float16; "device" and "torch" know bfloat16 too.
        channels_last: The memory format of the images.
        seed: Of the order and the changes.
        workers: Threads (DALI) or processes (torch) that decode; None is one for each core this process may use, 16 at most.
        shard, shards: Which part of how many: the rank and the number of processes. See
            :class:`~fastmerge.data.epochs.Batches`.
        drop_last: Leaves out a last training batch that is smaller.
        val_batch_size: Images per batch of validation; None is ``batch_size``.
        on_bad_image: What happens at a file that can't be read: "raise", or "skip" to leave it out with a warning. Either
            names it.

    Raises:
        FileNotFoundError: There is nothing at path, or a folder is missing.
        ValueError: The data is not of that form, or the options don't go together.
        ImportError: The loader's package is not installed.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"loaders give float32, float16 or bfloat16; got dtype={dtype}")
    if loader not in ("auto", *LOADERS):
        raise ValueError(f"loader must be 'auto', {', '.join(map(repr, LOADERS))}; got {loader!r}")
    device = _device(device)
    data, usual = _find(Path(path))
    choice = _Choice(
        batch_size=(batch_size if val_batch_size is None else val_batch_size, batch_size),
        size=224 if image_size is None else image_size,
        augmentation=_augmentation(usual if augmentation is None else augmentation),
        device=device,
        dtype=dtype,
        channels_last=channels_last,
        seed=seed,
        workers=min(_MOST_WORKERS, _cores()) if workers is None else workers,
        shard=(shard, shards),
        drop_last=drop_last,
        bad_images=BadImages(on_bad_image),
    )
    if isinstance(data, ImageArrays):
        _check_arrays(path, data, image_size, choice.augmentation)
        name, why = _choose_for_arrays(path, data, loader, choice)
    else:
        name, why = _choose_for_trees(data, loader, choice)
    train, val = _make(data, name, choice)
    classes = data.classes if isinstance(data, ImageArrays) else len(data[0].classes)
    return ImageLoaders(train, val, classes, name, f"loader {name}: {why}", choice.bad_images)


@dataclass(frozen=True)
class _Choice:
    """What :func:`image_loaders` was asked for; batch sizes are those of validation and of training."""

    batch_size: tuple[int, int]
    size: int
    augmentation: Augmentation
    device: torch.device
    dtype: torch.dtype
    channels_last: bool
    seed: int
    workers: int
    shard: tuple[int, int]
    drop_last: bool
    bad_images: BadImages

    def batches(self, samples: int, training: bool) -> Batches:
        return Batches(samples, self.batch_size[training], training, self.seed, *self.shard, self.drop_last)

    def finish(self, mean: NDArray[np.float64], std: NDArray[np.float64]) -> Finish:
        return Finish(mean, std, self.dtype, self.channels_last, self.device)

    def changes(self, training: bool) -> Augmentation | None:
        """What happens to images of the final size."""
        return self.augmentation if training else None


def _device(given: torch.device | str) -> torch.device:
    try:
        device = torch.device(given)
        return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"loaders can't use device {given}: {str(error).splitlines()[0]}") from error


def _find(path: Path) -> tuple[Data, str]:
    """The data, and the name of the usual augmentation for it."""
    if find_cifar(path):
        return load_cifar(path), "cifar"
    return (find_trees(path), "imagenet") if path.is_dir() else (load_npz(path), "none")


def _augmentation(given: str | Augmentation) -> Augmentation:
    if isinstance(given, Augmentation):
        return given
    if given not in AUGMENTATIONS:
        raise ValueError(f"augmentation must be {', '.join(AUGMENTATIONS)} or an Augmentation; got {given!r}")
    return AUGMENTATIONS[given]


def _check_arrays(path: str | Path, arrays: ImageArrays, image_size: int | None, augmentation: Augmentation) -> None:
    height, width, channels = arrays.train_images.shape[1:]
    if image_size not in (None, height):
        raise ValueError(f"the images of {path} are {height} high; another size is for a tree of image files")
    if augmentation.crops:
        raise ValueError(
            f"the images of {path} are of their final size, {height}x{width}; the augmentation cuts them out of larger ones"
        )
    if augmentation.jitters and channels != 3:
        raise ValueError(f"the augmentation changes colours; the images of {path} have {channels} channels, not 3")


def _choose_for_arrays(path: str | Path, arrays: ImageArrays, asked: str, choice: _Choice) -> tuple[Loader, str]:
    if asked == "dali":
        raise ValueError(f"loader='dali' reads trees of image files; {path} holds arrays: take 'device' or 'torch'")
    there = f"{len(arrays.train_images) + len(arrays.test_images)} images of {arrays.nbytes / 2**20:.0f} MiB"
    if asked == "torch":
        return "torch", f"{there} in memory, as asked for"
    if asked == "device" or arrays.nbytes <= _room(choice.device):
        return "device", f"{there} stay on {choice.device}"
    return "torch", f"{there} stay in memory; they would take more than half of what is free on {choice.device}"


def _choose_for_trees(trees: tuple[ImageTree, ImageTree], asked: str, choice: _Choice) -> tuple[Loader, str]:
    files = sum(len(tree.files) for tree in trees)
    nbytes = files * 3 * choice.size**2
    once = f"{files} image files, decoded once, stay on {choice.device} ({nbytes / 2**20:.0f} MiB)"
    if asked == "device":
        if choice.augmentation.crops:
            raise ValueError(
                "loader='device' holds images of their final size; this augmentation cuts them out of larger ones: "
                "take another one, such as 'small', or another loader"
            )
        return "device", once
    if asked == "auto" and not choice.augmentation.crops and nbytes <= min(_MOST_DECODED, _room(choice.device)):
        return "device", once
    on_gpu = choice.device.type == "cuda"
    if asked == "dali":
        if not dali_is_there():
            raise ImportError("loader='dali' needs NVIDIA DALI: pip install 'fastmerge[dali]'")
        if choice.dtype is torch.bfloat16:
            raise ValueError("loader='dali' gives float32 or float16; got dtype=torch.bfloat16")
    if asked == "dali" or (asked == "auto" and dali_is_there() and choice.dtype is not torch.bfloat16):
        where = f"the GPU {choice.device}" if on_gpu else f"the CPU, in {_count(max(1, choice.workers), 'thread')}"
        return "dali", f"{files} image files are decoded on {where}"
    reason = "as asked for"
    if asked == "auto":
        reason = (
            "DALI gives no bfloat16" if dali_is_there() else "DALI is not installed (pip install 'fastmerge[dali]')"
        )
    where = f"in {_count(choice.workers, 'process')}" if choice.workers else "in this process"
    return "torch", f"{files} image files are decoded by Pillow {where}; {reason}"


def _make(data: Data, name: Loader, choice: _Choice) -> tuple[EpochLoader, EpochLoader]:
    mean, std = 255 * np.array(IMAGENET_MEAN), 255 * np.array(IMAGENET_STD)
    if isinstance(data, ImageArrays):
        mean, std = channel_statistics(data.train_images)
    elif name == "device":
        data = read_trees(data, choice.size, choice.bad_images)
    if not isinstance(data, ImageArrays):
        make = _dali_loader if name == "dali" else _tree_loader
        return make(data[0], True, mean, std, choice), make(data[1], False, mean, std, choice)
    finish = choice.finish(mean, std)
    make_array = _device_loader if name == "device" else _array_loader
    return (
        make_array(data.train_images, data.train_labels, True, finish, choice),
        make_array(data.test_images, data.test_labels, False, finish, choice),
    )


def _dali_loader(
    tree: ImageTree, training: bool, mean: NDArray[np.float64], std: NDArray[np.float64], choice: _Choice
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
    tree: ImageTree, training: bool, mean: NDArray[np.float64], std: NDArray[np.float64], choice: _Choice
) -> EpochLoader:
    batches = choice.batches(len(tree.files), training)
    source = TreeBatches(tree.files, choice.size, choice.augmentation, batches)
    finish, changes = choice.finish(mean, std), choice.changes(training)
    return TorchLoader(source, tree.labels, batches, changes, finish, choice.bad_images, choice.workers)


def _array_loader(
    images: NDArray[np.uint8], labels: NDArray[np.int64], training: bool, finish: Finish, choice: _Choice
) -> EpochLoader:
    batches = choice.batches(len(images), training)
    # Picking out of an array is no work for other processes.
    return TorchLoader(ArrayBatches(images), labels, batches, choice.changes(training), finish, choice.bad_images, 0)


def _device_loader(
    images: NDArray[np.uint8], labels: NDArray[np.int64], training: bool, finish: Finish, choice: _Choice
) -> EpochLoader:
    placed = torch.from_numpy(np.ascontiguousarray(images)).to(choice.device)
    targets = torch.from_numpy(labels).to(choice.device)
    return DeviceLoader(placed, targets, choice.batches(len(images), training), choice.changes(training), finish)


def dali_is_there() -> bool:
    """Whether NVIDIA DALI is installed."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ImportError:
        return False


def _room(device: torch.device) -> int:
    """Half of the bytes that are free on a device, or in memory for other than CUDA devices."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (ValueError, OSError, AttributeError):
        return _MOST_DECODED


def _count(number: int, noun: str) -> str:
    plural = "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{plural * (number != 1)}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""Loaders for a data set, whatever it is kept in: one protocol, three ways to read it, and which of them is taken, and why."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fastmerge.data.arrays import ImageArrays, channel_statistics, evenly_held_out, find_cifar, load_cifar, load_npz
from fastmerge.data.augmentation import AUGMENTATIONS, Augmentation
from fastmerge.data.dali_graph import Graph
from fastmerge.data.dali_loader import DaliLoader
from fastmerge.data.decoding import BadImages, OnBadImage, cores, sharing
from fastmerge.data.epochs import Batches, EpochLoader
from fastmerge.data.torch_loader import ArrayBatches, DeviceLoader, Finish, TorchLoader, TreeBatches
from fastmerge.data.trees import ImageTree, find_trees, read_tree

Loader = Literal["dali", "device", "torch"]
LOADERS: tuple[Loader, ...] = ("dali", "device", "torch")
Data = ImageArrays | tuple[ImageTree, ImageTree]

_MOST_DECODED = 2 * 2**30  # bytes of a tree that is decoded once and held without being asked for


@dataclass(frozen=True)
class Choice:
    """What :func:`image_loaders` was asked for.

    Attributes:
        batch_size: Of validation and of training.
        shard: Which part, and of how many.
        mean, std: Of each channel, of pixels in 0..255.
    """

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
    mean: NDArray[np.float64]
    std: NDArray[np.float64]

    def batches(self, samples: int, training: bool) -> Batches:
        """Which samples make which batch."""
        return Batches(samples, self.batch_size[training], training, self.seed, *self.shard, self.drop_last)

    def changes(self, training: bool) -> Augmentation | None:
        """What happens to images of the final size."""
        return self.augmentation if training else None


def _choose_for_arrays(path: str | Path, arrays: ImageArrays, asked: str, choice: Choice) -> tuple[Loader, str]:
    """The loader for arrays, and the reason.

    Raises:
        ValueError: DALI was asked for.
    """
    if asked == "dali":
        raise ValueError(f"loader='dali' reads trees of image files; {path} holds arrays: take 'device' or 'torch'")
    there = f"{len(arrays.train_images) + len(arrays.test_images)} images of {arrays.nbytes / 2**20:.0f} MiB"
    if asked == "torch":
        return "torch", f"{there} in memory, as asked for"
    if asked == "device" or arrays.nbytes <= _room(choice.device):
        return "device", f"{there} stay on {choice.device}"
    return "torch", f"{there} stay in memory; they would take more than half of what is free on {choice.device}"


def choose_for_trees(trees: tuple[ImageTree, ImageTree], asked: str, choice: Choice) -> tuple[Loader, str]:
    """The loader for trees of image files, and the reason.

    Raises:
        ValueError: The one asked for can't do what was asked for.
        ImportError: DALI was asked for and is not installed.
    """
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
    # DALI's decoding on a GPU has not been seen to be right yet: tests/parts/test_data_gpu.py shows it, where DALI is.
    if asked == "dali" or (asked == "auto" and dali_is_there() and choice.dtype is not torch.bfloat16 and not on_gpu):
        where = f"the GPU {choice.device}" if on_gpu else f"the CPU, in {_count(max(1, choice.workers), 'thread')}"
        return "dali", f"{files} image files are decoded on {where}"
    reason = "as asked for"
    if asked == "auto":
        if not dali_is_there():
            reason = "DALI is not installed (pip install 'fastmerge[dali]')"
        elif on_gpu:
            reason = "DALI has not been tried on a GPU yet (loader='dali' takes it)"
        else:
            reason = "DALI gives no bfloat16"
    where = f"in {_count(choice.workers, 'process')}" if choice.workers else "in this process"
    return "torch", f"{files} image files are decoded by Pillow {where}; {reason}"


def dali_is_there() -> bool:
    """Whether NVIDIA DALI is installed."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ImportError:
        return False


def _room(device: torch.device) -> int:
    """Half of the bytes that are free on a device, or this process's part of half the memory for other than CUDA devices."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024 // 2 // sharing()
    except (OSError, KeyError, ValueError):
        return _MOST_DECODED


def _count(number: int, noun: str) -> str:
    plural = "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{plural * (number != 1)}"


# Mean and standard deviation of ImageNet's channels; torchvision's networks are trained with them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Images = tuple[NDArray[np.uint8], NDArray[np.int64]]  # and their labels
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST_WORKERS = 16


@dataclass(frozen=True)
class ImageLoaders:
    """Batches of images (N, C, H, W), normalised, and classes (N,), int64, on the device.

    Attributes:
        train: Shuffled and changed at random.
        val: In order, each image once.
        classes: How many classes there are.
        channels: C.
        loader: Which of the loaders reads.
        why: The same in a sentence, with the reason, for a log.
        bad_images: Files that could not be read and were left out; it fills as the loaders come by them.
        held_out: Training images that ``train`` leaves out, in order and as validation images are; None without any.
    """

    train: EpochLoader
    val: EpochLoader
    classes: int
    channels: int
    loader: Loader
    why: str
    bad_images: BadImages
    held_out: EpochLoader | None = None

    def again(self, batch_size: int, seed: int, shard: int = 0, shards: int = 1) -> ImageLoaders:
        """Loaders of the same images that begin with the first epoch; arguments are those of :func:`image_loaders`.

        Nothing is read again: images that these loaders hold are shared, so that a second pair takes no memory to speak of.

        Raises:
            ValueError: There are fewer images than shards, or a number is out of range.
        """
        train, val, held_out = (
            loader
            and loader.in_batches(replace(loader.batches, batch_size=batch_size, seed=seed, shard=shard, shards=shards))
            for loader in (self.train, self.val, self.held_out)
        )
        assert train is not None
        assert val is not None
        return replace(self, train=train, val=val, held_out=held_out)


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
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    held_out: float = 0.0,
) -> ImageLoaders:
    """Makes loaders for a data set.

    All loaders give the same batches: order and augmentation depend only on seed, epoch and image. Pixel values may differ by
    rounding, and on a GPU by its JPEG decoder.

    Args:
        path: A directory with ``train/<class>/<image>`` and ``val/<class>/<image>`` (or ``test``); one with CIFAR-10 or
            CIFAR-100 as torchvision keeps them; or an .npz file with ``train_images, train_labels, test_images,
            test_labels``, images uint8.
        batch_size: Images per batch, of this shard.
        image_size: Height and width of a tree's images, 224 by default. Arrays keep their own.
        augmentation: One of "imagenet", "imagewoof", "cifar", "small" and "none", or your own. None is "imagenet" for trees,
            "cifar" for CIFAR and "none" for an .npz, whose images may be of anything.
        loader: "dali" decodes the files of a tree on the GPU, or on the CPU faster than "torch" does, which is DataLoader
            and Pillow. "device" holds all images on the device, as uint8 of the final size; of a tree it needs an
            augmentation that doesn't crop from the whole image. "auto" chooses.
        device: Where batches go.
        dtype: Of the images: float32 or float16; "device" and "torch" know bfloat16 too.
        channels_last: The memory format of the images.
        seed: Of the order and the augmentation.
        workers: Threads (DALI) or processes (torch) that decode; None is one for each core this process may use, 16 at most;
            of torchrun's processes on a machine, each takes its part.
        shard: Which part of the images: the rank of the process. See :class:`~fastmerge.data.epochs.Batches`.
        shards: How many parts: the number of processes.
        drop_last: Leaves out a last training batch that is smaller.
        val_batch_size: Images per batch of validation; None is ``batch_size``.
        on_bad_image: What happens at a file that can't be read: "raise", or "skip" to leave it out with a warning. Either
            names it.
        mean: What is subtracted from each channel of pixels in 0..1, as by ``torchvision.transforms.Normalize``; take the
            values that your networks were trained with. None is ImageNet's for trees, and that of the training images for
            arrays.
        std: What each channel is divided by afterwards; None likewise.
        held_out: Fraction of the training images, evenly over the classes, that is left out of training.

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
    _check_normalisation(mean, std)
    data, usual = _find(Path(path))
    channels = data.train_images.shape[3] if isinstance(data, ImageArrays) else 3
    if mean is not None and len(mean) != channels:
        raise ValueError(f"the images of {path} have {channels} channels; mean and std have {len(mean)} numbers")
    mean_of_each, std_of_each = _normalisation(data, mean, std)
    choice = Choice(
        batch_size=(batch_size if val_batch_size is None else val_batch_size, batch_size),
        size=224 if image_size is None else image_size,
        augmentation=_augmentation(usual if augmentation is None else augmentation),
        device=device,
        dtype=dtype,
        channels_last=channels_last,
        seed=seed,
        workers=min(_MOST_WORKERS, cores()) if workers is None else workers,
        shard=(shard, shards),
        drop_last=drop_last,
        bad_images=BadImages(on_bad_image),
        mean=mean_of_each,
        std=std_of_each,
    )
    if isinstance(data, ImageArrays):
        _check_arrays(path, data, image_size, choice.augmentation)
        name, why = _choose_for_arrays(path, data, loader, choice)
    else:
        name, why = choose_for_trees(data, loader, choice)
    train, val, held = _make_loaders(data, name, choice, held_out)
    classes = data.classes if isinstance(data, ImageArrays) else len(data[0].classes)
    return ImageLoaders(train, val, classes, channels, name, f"loader {name}: {why}", choice.bad_images, held)


def _device(given: torch.device | str) -> torch.device:
    try:
        device = torch.device(given)
        return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"loaders can't use device {given}: {str(error).splitlines()[0]}") from error


def _check_normalisation(mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    if mean is None and std is None:
        return
    if mean is None or std is None or len(mean) != len(std):
        raise ValueError(f"mean and std go together, a number for each channel; got mean={mean}, std={std}")
    if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise ValueError(f"mean and std must be finite, and std above 0; got mean={mean}, std={std}")


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
        raise ValueError(f"the images of {path} are {height} pixels high; image_size is only for trees of image files")
    if augmentation.crops:
        raise ValueError(
            f"the images of {path} are of their final size, {height}x{width}; the augmentation cuts them out of larger ones: "
            "take another one, such as 'cifar'"
        )
    if augmentation.jitters and channels != 3:
        raise ValueError(f"the augmentation changes colours; the images of {path} have {channels} channels, not 3")


def _make_loaders(
    data: Data, name: Loader, choice: Choice, held_out: float
) -> tuple[EpochLoader, EpochLoader, EpochLoader | None]:
    """The loaders of training, of validation and of what is held out of the training images."""
    if isinstance(data, ImageArrays):
        make: Callable[[Any, bool, Choice], EpochLoader] = _device_loader if name == "device" else _array_loader
        train, val = (data.train_images, data.train_labels), (data.test_images, data.test_labels)
    else:
        make = {"dali": _dali_loader, "device": _decoded_loader, "torch": _tree_loader}[name]
        train, val = data  # type: ignore[assignment]
    if not held_out:
        return make(train, True, choice), make(val, False, choice), None
    labels = data.train_labels if isinstance(data, ImageArrays) else data[0].labels
    held = evenly_held_out(len(labels), held_out, labels)
    kept = _part(data, np.setdiff1d(np.arange(len(labels)), held))
    return make(kept, True, choice), make(val, False, choice), make(_part(data, held), False, choice)


def _part(data: Data, index: NDArray[np.int64]) -> ImageTree | Images:
    """Some of the training images."""
    if isinstance(data, ImageArrays):
        return data.train_images[index], data.train_labels[index]
    return replace(data[0], files=[data[0].files[i] for i in index], labels=data[0].labels[index])


def _normalisation(
    data: Data, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of each channel, for pixels in 0..255; without numbers ImageNet's for trees, and for arrays their training images'."""
    if mean is None or std is None:
        if isinstance(data, ImageArrays):
            return channel_statistics(data.train_images)
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    return 255 * np.array(mean, np.float64), 255 * np.array(std, np.float64)


def _dali_loader(tree: ImageTree, training: bool, choice: Choice) -> EpochLoader:
    graph = Graph(
        batch_size=choice.batch_size[training],
        size=choice.size,
        augmentation=choice.augmentation,
        training=training,
        mean=choice.mean,
        std=choice.std,
        half=choice.dtype is torch.float16,
        channels_last=choice.channels_last,
        device_id=choice.device.index if choice.device.type == "cuda" else None,
        threads=max(1, choice.workers),
    )
    return DaliLoader(tree.files, tree.labels, choice.batches(len(tree.files), training), graph, choice.bad_images)


def _finish(choice: Choice) -> Finish:
    return Finish(choice.mean, choice.std, choice.dtype, choice.channels_last, choice.device)


def _tree_loader(tree: ImageTree, training: bool, choice: Choice) -> EpochLoader:
    batches = choice.batches(len(tree.files), training)
    source, changes = TreeBatches(tree.files, choice.size, choice.augmentation, batches), choice.changes(training)
    return TorchLoader(source, tree.labels, batches, changes, _finish(choice), choice.bad_images, choice.workers)


def _array_loader(arrays: Images, training: bool, choice: Choice) -> EpochLoader:
    images, labels = arrays
    batches, changes = choice.batches(len(images), training), choice.changes(training)
    # Picking out of an array is no work for other processes.
    return TorchLoader(ArrayBatches(images), labels, batches, changes, _finish(choice), choice.bad_images, 0)


def _decoded_loader(tree: ImageTree, training: bool, choice: Choice) -> EpochLoader:
    images, good = read_tree(tree, choice.size, choice.bad_images)
    return _device_loader((images, tree.labels), training, choice, None if good.all() else good)


def _device_loader(
    arrays: Images, training: bool, choice: Choice, good: NDArray[np.bool_] | None = None
) -> EpochLoader:
    images, labels = (torch.from_numpy(np.ascontiguousarray(array)).to(choice.device) for array in arrays)
    batches, changes = choice.batches(len(images), training), choice.changes(training)
    return DeviceLoader(images, labels, batches, changes, _finish(choice), good)

"""Which of the loaders reads a data set, and why."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fastmerge.data.arrays import ImageArrays
from fastmerge.data.augmentation import Augmentation
from fastmerge.data.decoding import BadImages
from fastmerge.data.epochs import Batches
from fastmerge.data.trees import ImageTree

Loader = Literal["dali", "device", "torch"]
LOADERS: tuple[Loader, ...] = ("dali", "device", "torch")
Data = ImageArrays | tuple[ImageTree, ImageTree]

_MOST_DECODED = 2 * 2**30  # bytes of a tree that is decoded once and held without being asked for


@dataclass(frozen=True)
class Choice:
    """What :func:`~fastmerge.data.loading.image_loaders` was asked for.

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


def choose_for_arrays(path: str | Path, arrays: ImageArrays, asked: str, choice: Choice) -> tuple[Loader, str]:
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
        return int(lines["MemAvailable"].split()[0]) * 1024 // 2 // _sharing()
    except (OSError, KeyError, ValueError):
        return _MOST_DECODED


def _count(number: int, noun: str) -> str:
    plural = "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{plural * (number != 1)}"


def cores() -> int:
    """How many cores this process may use; of those that torchrun's processes on one machine share, its part."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // _sharing())


def _sharing() -> int:
    """How many of torchrun's processes share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

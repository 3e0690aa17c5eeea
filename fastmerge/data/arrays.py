"""Images and their classes as uint8 arrays, from an .npz file."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

KEYS = ("train_images", "train_labels", "test_images", "test_labels")


@dataclass(frozen=True)
class ImageArrays:
    """Images to train on and images to test on.

    Attributes:
        train_images, test_images: uint8 (N, H, W, C), of one H, W and C.
        train_labels, test_labels: int64 (N,), classes from 0 on.
    """

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]

    @property
    def classes(self) -> int:
        """How many classes the training labels name."""
        return int(self.train_labels.max()) + 1

    @property
    def nbytes(self) -> int:
        """Bytes of all images."""
        return self.train_images.nbytes + self.test_images.nbytes


def channel_statistics(images: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of each channel of uint8 images (N, H, W, C), for values of 0..255.

    A channel of one value carries nothing; its deviation is given as 1, with which it becomes 0.
    """
    values = np.arange(256)
    counts = np.stack([np.bincount(images[..., channel].ravel(), minlength=256) for channel in range(images.shape[3])])
    mean = counts @ values / counts.sum(1)
    variance = (counts * (values - mean[:, None]) ** 2).sum(1) / counts.sum(1)
    return mean, np.where(variance > 0, np.sqrt(variance), 1.0)


def load_npz(path: str | Path) -> ImageArrays:
    """Loads an .npz file with ``train_images, train_labels, test_images, test_labels``; other arrays may be in it.

    Args:
        path: the file. Images are uint8 (N, H, W, C), or (N, H, W) for grey ones, with 1, 3 or 4 channels; labels are
            integers (N,), at least 0.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no .npz, lacks an array, or holds one of another dtype, shape or range; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no .npz file")
    try:
        # NumPy leaves a file that it opens itself open where the zip is damaged
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            missing = [key for key in KEYS if key not in file.files]
            arrays = {} if missing else {key: file[key] for key in KEYS}
    except Exception as error:  # pickled objects; a damaged file may raise anything, of zlib and for lack of memory too
        raise ValueError(f"{path} can't be read: {error or type(error).__name__}") from error
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; it needs {', '.join(KEYS)}")
    return check_arrays(str(path), arrays)


def check_arrays(where: str, arrays: dict[str, NDArray[Any]]) -> ImageArrays:
    """Checks four arrays and brings them to one form.

    Args:
        where: what messages call the source.
        arrays: by the names of :class:`ImageArrays`.

    Raises:
        ValueError: as :func:`load_npz`.
    """
    images = {split: _images(f"{where}: {split}_images", arrays[f"{split}_images"]) for split in ("train", "test")}
    labels = {
        split: _labels(f"{where}: {split}_labels", arrays[f"{split}_labels"], len(images[split]))
        for split in ("train", "test")
    }
    if images["train"].shape[1:] != images["test"].shape[1:]:
        raise ValueError(
            f"{where}: train_images and test_images must be of one height, width and channels; they are "
            f"{images['train'].shape[1:]} and {images['test'].shape[1:]}"
        )
    if labels["test"].max() > labels["train"].max():
        raise ValueError(
            f"{where}: test_labels go up to {labels['test'].max()}, train_labels only to {labels['train'].max()}"
        )
    return ImageArrays(images["train"], labels["train"], images["test"], labels["test"])


def _images(name: str, images: NDArray[Any]) -> NDArray[np.uint8]:
    if images.dtype != np.uint8:
        raise ValueError(f"{name} must be uint8, 0..255; it is {images.dtype}")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3, 4):
        raise ValueError(
            f"{name} must have shape (N, H, W, C) with 1, 3 or 4 channels, or (N, H, W); got {images.shape}"
        )
    if 0 in images.shape:
        raise ValueError(f"{name} is empty: {images.shape}")
    return images


def _labels(name: str, labels: NDArray[Any], count: int) -> NDArray[np.int64]:
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers; it is {labels.dtype}")
    if labels.shape != (count,):
        raise ValueError(f"{name} must have shape ({count},), one label per image; got {labels.shape}")
    if labels.min() < 0:
        raise ValueError(f"{name} must be at least 0; it holds {labels.min()}")
    return labels.astype(np.int64)


def evenly_held_out(samples: int, fraction: float, labels: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """Chooses a fraction of some samples, at least one, evenly over the classes.

    Args:
        samples: how many there are.
        fraction: of them, above 0 and below 1.
        labels: the class of each, or None.

    Returns:
        Their indices, ascending.

    Raises:
        ValueError: nothing would be left.
    """
    count = max(1, round(fraction * samples))
    if count >= samples:
        raise ValueError(f"{samples} training samples are too few to hold out {fraction:g} of them")
    order = np.arange(samples) if labels is None else np.argsort(labels, kind="stable")
    return np.sort(order[np.arange(count) * samples // count])

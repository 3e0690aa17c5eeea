"""Images and their classes as uint8 arrays, from an .npz file or from CIFAR as torchvision keeps it on disk."""

from __future__ import annotations

import pickle
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


# Folder, training files, test file and the key of the labels.
_LAYOUTS = {
    "cifar-100-python": (["train"], "test", "fine_labels"),
    "cifar-10-batches-py": ([f"data_batch_{number}" for number in range(1, 6)], "test_batch", "labels"),
}
_PIXELS = 3 * 32 * 32


def find_cifar(path: str | Path) -> Path | None:
    """The folder of CIFAR's pickles: ``path`` itself or one in it, as in torchvision's ``root``; None where there is none."""
    path = Path(path)
    return next((folder for name in _LAYOUTS for folder in (path, path / name) if _complete(folder, name)), None)


def load_cifar(path: str | Path) -> ImageArrays:
    """Loads CIFAR-10 or CIFAR-100 from its pickles; of CIFAR-100 the 100 fine classes.

    Raises:
        FileNotFoundError: There is no such folder at ``path``, or it lacks a file.
        ValueError: A file is damaged, holds something else, or anything but arrays and lists.
    """
    folder = find_cifar(path)
    if folder is None:
        raise FileNotFoundError(f"there is no {' or '.join(_LAYOUTS)} with all its files at {path}")
    train, test, labels = next(layout for name, layout in _LAYOUTS.items() if _complete(folder, name))
    arrays: dict[str, Any] = {}
    for split, names in (("train", train), ("test", [test])):
        parts = [_read(folder / name, labels) for name in names]
        arrays[f"{split}_images"] = np.concatenate([images for images, _ in parts])
        arrays[f"{split}_labels"] = np.concatenate([targets for _, targets in parts])
    return check_arrays(str(folder), arrays)


def _complete(folder: Path, name: str) -> bool:
    train, test, _ = _LAYOUTS[name]
    return all((folder / file).is_file() for file in (*train, test))


def _read(file: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        with file.open("rb") as stream:
            content = _ArraysOnly(stream, encoding="latin1").load()
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{file} can't be read as a file of CIFAR: {error or type(error).__name__}") from error
    if not isinstance(content, dict) or not {"data", key} <= set(content):
        raise ValueError(f"{file} is no file of CIFAR; it needs 'data' and {key!r}")
    pixels, labels = content["data"], content[key]
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (_PIXELS,):
        raise ValueError(f"{file}: data must be uint8 (N, {_PIXELS}); it is {_describe(pixels)}")
    if not isinstance(labels, list) or len(labels) != len(pixels) or not all(type(label) is int for label in labels):
        raise ValueError(f"{file}: {key} must be a list of {len(pixels)} whole numbers; it is {_describe(labels)}")
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.array(labels, np.int64)


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    return f"a list of {len(value)}" if isinstance(value, list) else f"a {type(value).__name__}"


class _ArraysOnly(pickle.Unpickler):
    """Reads numbers, strings, lists, dictionaries and numpy arrays; refuses to import anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _empty_array
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return _encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no file of CIFAR needs")


def _empty_array(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """What numpy's ``_reconstruct`` does for a plain array; its state comes next."""
    return np.empty(0, np.uint8)


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes in the pickles of Python 2."""
    return text.encode("latin1")

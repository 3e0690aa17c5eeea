"""CIFAR-10 and CIFAR-100 as torchvision keeps them on disk, without running what a pickle may hold."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from fastmerge.data.arrays import ImageArrays, check_arrays

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

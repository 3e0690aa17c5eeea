"""Images and their classes as uint8 arrays, from a tree of image files."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastmerge.data.arrays import ImageArrays, check_arrays

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
TEST_FOLDERS = ("val", "test")


def load_folder(path: str | Path, image_size: int) -> ImageArrays:
    """Loads a tree ``train/<class>/<image>`` and ``val/<class>/<image>`` (or ``test``), as torchvision's ImageFolder.

    Classes are the subdirectories of ``train``, in alphabetical order. Every image becomes RGB and is stretched to a
    square (bilinear, antialiased). Needs Pillow.

    Args:
        path: the tree's root.
        image_size: height and width to which images are resized.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: there are no classes or images, the test folder has a class that the training folder hasn't, or a
            file can't be read as an image.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no directory {path}")
    train = path / "train"
    test = next((path / name for name in TEST_FOLDERS if (path / name).is_dir()), path / "val")
    for folder in (train, test):
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no {folder}; a tree needs train/<class>/<image> and val/<class>/<image>")
    classes = _classes(train)
    if strangers := sorted(set(_classes(test)) - set(classes)):
        raise ValueError(f"{test} has classes that {train} has not: {', '.join(strangers[:5])}")
    arrays = {}
    for split, folder in (("train", train), ("test", test)):
        files = _files(folder, classes)
        arrays[f"{split}_images"] = _read_all([file for file, _ in files], image_size)
        arrays[f"{split}_labels"] = np.array([label for _, label in files])
    return check_arrays(str(path), arrays)


def _classes(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not names:
        raise ValueError(f"{folder} has no class folders")
    return names


def _files(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    files = [
        (file, label)
        for label, name in enumerate(classes)
        for file in sorted((folder / name).rglob("*"))
        if file.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise ValueError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
    return files


def _read_all(files: list[Path], image_size: int) -> NDArray[np.uint8]:
    images = np.empty((len(files), image_size, image_size, 3), np.uint8)

    def read(index: int) -> None:
        images[index] = _read(files[index], image_size)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes and resizes without the interpreter's lock
        for _ in pool.map(read, range(len(files))):
            pass
    return images


def _read(file: Path, image_size: int) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(file) as image:
            image.draft("RGB", (2 * image_size, 2 * image_size))  # a JPEG decodes at the nearest smaller scale
            return np.asarray(image.convert("RGB").resize((image_size, image_size), Image.Resampling.BILINEAR))
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for broken PNG chunks
        raise ValueError(f"{file} can't be read as an image: {error}") from error

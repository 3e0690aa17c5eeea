"""Trees of image files: which files there are, of which classes, and all of them read as uint8 arrays."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastmerge.data.arrays import ImageArrays, check_arrays
from fastmerge.data.augmentation import Augmentation
from fastmerge.data.decoding import BadImages, OnBadImage, cores, in_threads, read_batch

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
TEST_FOLDERS = ("val", "test")


@dataclass(frozen=True)
class ImageTree:
    """The images of one split.

    Attributes:
        folder: Where they are, ``train`` or ``val``.
        files: Their paths, class by class and in alphabetical order within a class.
        labels: int64 (N,), the class of each.
        classes: The names of the classes.
    """

    folder: Path
    files: Sequence[str]
    labels: NDArray[np.int64]
    classes: list[str]


def find_trees(path: str | Path) -> tuple[ImageTree, ImageTree]:
    """Lists the images of a tree ``train/<class>/<image>`` and ``val/<class>/<image>`` (or ``test``).

    Classes are the subdirectories of ``train``, in alphabetical order, as torchvision's ImageFolder has them; images may
    lie deeper. Names that begin with a dot are left out: they are nobody's images.

    Returns:
        Images to train on and images to validate on, both with the training folder's classes.

    Raises:
        FileNotFoundError: A folder is missing.
        ValueError: There are no classes, the two folders' classes differ, a class has no images, or a file with an image's
            name is no regular file.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no directory {path}")
    train, val = path / "train", next((path / name for name in TEST_FOLDERS if (path / name).is_dir()), path / "val")
    for folder in (train, val):
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no {folder}; a tree needs train/<class>/<image> and val/<class>/<image>")
    classes = _classes(train)
    if differing := sorted(set(classes) ^ set(_classes(val))):
        raise ValueError(f"the classes of {train} and {val} differ: {listed(differing)} in only one of them")
    return _tree(train, classes), _tree(val, classes)


def listed(names: Sequence[str], most: int = 5) -> str:
    """Names for an error, of many the first."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def image_files(folder: str) -> list[str]:
    """The image files below a folder, in alphabetical order of their paths; links are followed, each folder read once,
    and none that the folder lies in.

    Raises:
        ValueError: A file with an image's name is a pipe, a socket or a device, which could be waited for without end.
    """
    found, waiting = [], [folder]
    above = [os.stat(path) for path in Path(folder).absolute().parents]
    seen = {(status.st_dev, status.st_ino) for status in above}  # whose images are other classes'
    while waiting:
        here = waiting.pop()
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:
            continue  # a link that leads back, or to what was read by another name
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(here) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    waiting.append(entry.path)
                elif entry.name.lower().endswith(SUFFIXES):
                    if not entry.is_file() and os.path.exists(entry.path):  # a link to nothing is named when it is read
                        raise ValueError(f"{entry.path} is no regular file; a tree holds image files: remove it")
                    found.append(entry.path)
    return sorted(found)


def _classes(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ValueError(f"{folder} has no class folders; a tree needs {folder.name}/<class>/<image>")
    return names


def _tree(folder: Path, classes: list[str]) -> ImageTree:
    by_class = [image_files(str(folder / name)) for name in classes]
    if empty := [name for name, files in zip(classes, by_class, strict=True) if not files]:
        raise ValueError(f"{folder} holds no images ({', '.join(SUFFIXES)}) of {listed(empty)}")
    labels = np.repeat(np.arange(len(classes)), [len(files) for files in by_class])
    return ImageTree(folder, [file for files in by_class for file in files], labels, classes)


_CHUNK = 32
_STRETCHED = Augmentation(mirror=False)


def load_folder(path: str | Path, image_size: int, on_bad_image: OnBadImage = "raise") -> ImageArrays:
    """Loads a tree ``train/<class>/<image>`` and ``val/<class>/<image>`` (or ``test``), as torchvision's ImageFolder.

    Classes are the subdirectories of ``train``, in alphabetical order. Every image becomes RGB and is stretched to a
    square (bilinear, antialiased). Needs Pillow.

    Args:
        path: the tree's root.
        image_size: height and width to which images are resized.
        on_bad_image: "raise", or "skip" to leave out files that can't be read, with a warning that names each.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: there are no classes or images, the two folders' classes differ, or a file can't be read as an image.
    """
    trees, bad_images = find_trees(path), BadImages(on_bad_image)
    arrays: dict[str, NDArray[np.generic]] = {}
    for split, tree in zip(("train", "test"), trees, strict=True):
        images, good = read_tree(tree, image_size, bad_images)
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images[good], tree.labels[good]
    return check_arrays(str(trees[0].folder.parent), arrays)


def read_tree(tree: ImageTree, size: int, bad_images: BadImages) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Decodes all images, once and for all.

    Returns:
        Images (N, size, size, 3), and which of them could be read, (N,).
    """
    images = np.zeros((len(tree.files), size, size, 3), np.uint8)
    good = np.zeros(len(tree.files), bool)

    def read(start: int) -> dict[str, str]:
        samples = np.arange(start, min(start + _CHUNK, len(tree.files)))
        found, kept, bad = read_batch(tree.files, samples, size, _STRETCHED, training=False)
        images[kept], good[kept] = found, True
        return bad

    with contextlib.closing(in_threads(read, range(0, len(tree.files), _CHUNK), cores())) as each:
        for file, reason in (entry for bad in each for entry in bad.items()):
            bad_images.report(file, reason)
    return images, good

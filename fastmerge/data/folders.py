"""Images and their classes as uint8 arrays, from a tree of image files."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastmerge.data.arrays import ImageArrays, check_arrays
from fastmerge.data.augmentation import Augmentation
from fastmerge.data.choosing import cores
from fastmerge.data.cutting import read_batch
from fastmerge.data.decoding import BadImages, OnBadImage, in_threads
from fastmerge.data.trees import ImageTree, find_trees

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

"""From a decoded image to uint8 pixels of the final size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastmerge.data.augmentation import Augmentation, draw_crops
from fastmerge.data.decoding import BadImageError, read_image


def read_batch(
    files: Sequence[str],
    samples: NDArray[np.int64],
    size: int,
    augmentation: Augmentation,
    *,
    training: bool,
    seed: int = 0,
    epoch: int = 0,
) -> tuple[NDArray[np.uint8], NDArray[np.int64], dict[str, str]]:
    """Reads images and cuts them to one size.

    Args:
        files: Paths of the whole data set.
        samples: (n,), which of them.
        size: Height and width in the end.
        augmentation: How they are cut; what happens after is for the caller.
        training: Whether crops are random.
        seed, epoch: Of the draws.

    Returns:
        Images (m, size, size, 3), the samples (m,) that they are, and path and reason of each file that can't be read.
    """
    crops = draw_crops(augmentation, seed, epoch, samples) if training and augmentation.scale is not None else None
    images, kept, bad = [], [], {}
    for place, sample in enumerate(samples):
        try:
            image = read_image(files[sample])
        except BadImageError as error:
            bad[error.file] = error.reason
            continue
        if crops is not None:
            areas, ratios, where = (draw[place] for draw in crops)
            top, left, height, width = random_crop(image.height, image.width, areas, ratios, where, augmentation.ratio)
            image = image.crop((left, top, left + width, top + height))
        region = None
        if not training and augmentation.shorter_side is not None:
            region = centre_crop(image.height, image.width, size, round(size * augmentation.shorter_side))
        images.append(resize(np.asarray(image), size, region))
        kept.append(sample)
    stacked = np.stack(images) if images else np.empty((0, size, size, 3), np.uint8)
    return stacked, np.array(kept, np.int64), bad


def resize(
    image: NDArray[np.uint8], size: int, region: tuple[float, float, float, float] | None = None
) -> NDArray[np.uint8]:
    """Resizes an image, or a region of it, to a square: bilinear, and antialiased where it gets smaller.

    Pixels beyond the border are those of the border, as in DALI; Pillow alone would leave them out of the mean.

    Args:
        image: uint8 (H, W, 3).
        size: Height and width in the end.
        region: (top, left, bottom, right) in pixels; None is the whole image.
    """
    from PIL import Image

    top, left, bottom, right = region or (0, 0, *image.shape[:2])
    reach = math.ceil(max((bottom - top) / size, (right - left) / size))
    if reach > 1:
        image = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
        top, left, bottom, right = (edge + reach for edge in (top, left, bottom, right))
    resized = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, (left, top, right, bottom))
    return np.asarray(resized)


def random_crop(
    height: int,
    width: int,
    areas: NDArray[np.float64],
    ratios: NDArray[np.float64],
    place: NDArray[np.float64],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """The crop that draws come to: the first try that fits, or else the largest one of an allowed shape, in the middle.

    Its distribution is that of torchvision's RandomResizedCrop. The DALI graph computes the same.

    Args:
        height, width: Of the image.
        areas, ratios, place: (10,), (10,) and (2,), drawn by :func:`~fastmerge.data.augmentation.draw_crops`.
        ratio: Least and largest width over height.

    Returns:
        (top, left, height, width) in whole pixels.
    """
    area = height * width * areas
    widths, heights = np.floor(np.sqrt(area * ratios) + 0.5), np.floor(np.sqrt(area / ratios) + 0.5)
    fitting = (widths >= 1) & (heights >= 1) & (widths <= width) & (heights <= height)
    if fitting.any():
        first = int(fitting.argmax())
        crop_height, crop_width = int(heights[first]), int(widths[first])
    else:
        crop_height = max(1, min(height, int(np.floor(width / ratio[0] + 0.5))))
        crop_width = max(1, min(width, int(np.floor(height * ratio[1] + 0.5))))
        return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width
    top = int(np.floor(place[0] * (height - crop_height + 1)))
    left = int(np.floor(place[1] * (width - crop_width + 1)))
    return top, left, crop_height, crop_width


def centre_crop(height: int, width: int, size: int, shorter: int) -> tuple[float, float, float, float]:
    """The part of an image that is the centre of ``size`` once the shorter side is resized to ``shorter``.

    It is what torchvision's Resize(shorter) and CenterCrop(size) leave.

    Returns:
        (top, left, bottom, right) in pixels of the image before it is resized.
    """
    least = min(height, width)
    new_height, new_width = height * shorter // least, width * shorter // least
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    down, across = height / new_height, width / new_width
    return top * down, left * across, (top + size) * down, (left + size) * across

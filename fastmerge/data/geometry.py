"""Which part of an image becomes the final one, whatever reads it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


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

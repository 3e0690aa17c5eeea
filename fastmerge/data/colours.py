"""Brightness, contrast, saturation and hue as one linear map of the colours."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastmerge.data.augmentation import Augmentation, Changes

# Colours to luminance and two of chrominance, as DALI's color_twist has them, and back.
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
_RGB = np.linalg.inv(_YIQ)
_MIDDLE = 128.0  # what contrast spreads colours from


def jitter_colours(images: Tensor, augmentation: Augmentation, changes: Changes) -> Tensor:
    """Changes the colours of uint8 images (N, H, W, 3) as was drawn.

    Raises:
        ValueError: The images are not of three colours.
    """
    if not augmentation.jitters:
        return images
    if images.shape[3] != 3:
        raise ValueError(f"colours are changed in images of 3 channels; these have {images.shape[3]}")
    maps, offsets = colour_maps(changes)
    return map_colours(images, maps.to(images.device), offsets.to(images.device))


def colour_maps(changes: Changes) -> tuple[Tensor, Tensor]:
    """The linear maps of colours that brightness, contrast, saturation and hue come to.

    ``y = b · (c · RGB · S · R(h) · YIQ · x + 128 · (1 - c))``: chrominance is turned by h and scaled by s. It is what
    DALI's color_twist computes; torchvision's ColorJitter applies four steps in random order, in HSV.

    Returns:
        (n, 3, 3) and (n, 3), float32, for colours of 0..255.
    """
    angle = np.deg2rad(changes.hue.astype(np.float64))
    turn = np.zeros((len(angle), 3, 3))
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = changes.saturation * np.cos(angle)
    turn[:, 1, 2] = changes.saturation * np.sin(angle)
    turn[:, 2, 1] = -turn[:, 1, 2]
    gain = changes.brightness.astype(np.float64) * changes.contrast
    maps = gain[:, None, None] * (_RGB @ turn @ _YIQ)
    offsets = np.repeat((changes.brightness * (1 - changes.contrast) * _MIDDLE)[:, None], 3, axis=1)
    return torch.from_numpy(maps).float(), torch.from_numpy(offsets).float()


def map_colours(images: Tensor, maps: Tensor, offsets: Tensor) -> Tensor:
    """Applies each image's map to it.

    Args:
        images: uint8 (N, H, W, 3).
        maps, offsets: (N, 3, 3) and (N, 3), of :func:`colour_maps`.

    Returns:
        The same, rounded and clamped.
    """
    flat = images.flatten(1, 2).float()
    mapped = torch.baddbmm(offsets[:, None, :], flat, maps.mT)
    return mapped.round_().clamp_(0, 255).to(torch.uint8).view(images.shape)

"""Random changes of training images, each image its own: what they are in a recipe, what is drawn, windows and colours."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastmerge.data.epochs import uniforms

# A sample's draws, by what they decide. Tries of a crop come in pairs: its area and its shape.
CROP_TRIES = 10
_AREAS = range(CROP_TRIES)
_SHAPES = range(CROP_TRIES, 2 * CROP_TRIES)
_PLACE = range(20, 22)
_MIRROR = range(22, 23)
_SHIFT = range(23, 25)
_JITTER = range(25, 29)


@dataclass(frozen=True)
class Augmentation:
    """How images are cut and changed.

    Attributes:
        scale: Fractions of the image's area between which a random crop's lies; None takes the whole image, stretched.
        ratio: Width over height of such a crop, drawn evenly on a logarithmic scale.
        shift: Pixels of the final image by which it is moved at most, either way; what this uncovers is black.
        mirror: Whether half of the images are mirrored.
        brightness, contrast, saturation: Factors are drawn from 1 ± these.
        hue: Turns of the colour circle, drawn from 0 ± this.
        shorter_side: In validation, the shorter side over the final size, of which the centre is cut; None stretches the
            whole image.
    """

    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    shift: int = 0
    mirror: bool = True
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    shorter_side: float | None = None

    @property
    def jitters(self) -> bool:
        """Whether colours change."""
        return any((self.brightness, self.contrast, self.saturation, self.hue))

    @property
    def crops(self) -> bool:
        """Whether it needs the image as it is in its file, larger than the final one."""
        return self.scale is not None or self.shorter_side is not None


AUGMENTATIONS = {
    # torchvision's for ImageNet: crops for training; of a shorter side of 256 the centre of 224 for validation.
    "imagenet": Augmentation(scale=(0.08, 1.0), shorter_side=8 / 7),
    # The paper's for Imagewoof at 224 (its authors' code, imagewoof/dataset.py); the whole image for validation.
    "imagewoof": Augmentation(scale=(0.4, 0.8), brightness=0.15, contrast=0.15, saturation=0.15, hue=0.15),
    # The usual one for CIFAR, the paper's too.
    "cifar": Augmentation(shift=4),
    # Images of 28 pixels.
    "small": Augmentation(shift=2),
    "none": Augmentation(mirror=False),
}


@dataclass(frozen=True)
class Changes:
    """What was drawn for n images.

    Attributes:
        mirrored: (n,) bool.
        top, left: (n,) int64, where the image begins in one with ``shift`` pixels of black around it.
        brightness, contrast, saturation: (n,) float32 factors.
        hue: (n,) float32 degrees.
    """

    mirrored: NDArray[np.bool_]
    top: NDArray[np.int64]
    left: NDArray[np.int64]
    brightness: NDArray[np.float32]
    contrast: NDArray[np.float32]
    saturation: NDArray[np.float32]
    hue: NDArray[np.float32]

    def of(self, part: slice) -> Changes:
        """Those of some of the images."""
        return Changes(*(getattr(self, field.name)[part] for field in fields(self)))

    def windows(self, samples: NDArray[np.int64]) -> Tensor:
        """int64 (4, n): samples, top, left and mirrored, for :func:`cut_windows`; one tensor is one copy to a device."""
        return torch.from_numpy(np.stack([samples, self.top, self.left, self.mirrored]))


def draw_changes(augmentation: Augmentation, seed: int, epoch: int, samples: NDArray[np.int64]) -> Changes:
    """Draws what happens to images after they are cut."""
    mirrored = uniforms(seed, epoch, samples, _MIRROR)[:, 0] < (0.5 if augmentation.mirror else 0.0)
    shifts = uniforms(seed, epoch, samples, _SHIFT) if augmentation.shift else np.full((len(samples), 2), 0.5)
    top, left = np.floor(shifts * (2 * augmentation.shift + 1)).astype(np.int64).T
    jitter = uniforms(seed, epoch, samples, _JITTER) if augmentation.jitters else np.full((len(samples), 4), 0.5)
    widths = (augmentation.brightness, augmentation.contrast, augmentation.saturation, 360 * augmentation.hue)
    offsets = ((2 * jitter - 1) * widths).astype(np.float32)
    brightness, contrast, saturation = np.maximum(0, 1 + offsets[:, :3]).T
    return Changes(mirrored, top, left, brightness, contrast, saturation, offsets[:, 3])


def draw_crops(
    augmentation: Augmentation, seed: int, epoch: int, samples: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Draws what decides a random crop, whatever the image's size.

    Returns:
        Fractions of the area and ratios of width to height, (n, 10) each, to be tried in this order; and the place of the
        crop among those possible, vertical and horizontal, (n, 2) in [0, 1).
    """
    assert augmentation.scale is not None
    (least, most), (narrow, wide) = augmentation.scale, augmentation.ratio
    areas = least + (most - least) * uniforms(seed, epoch, samples, _AREAS)
    shapes = math.log(narrow) + math.log(wide / narrow) * uniforms(seed, epoch, samples, _SHAPES)
    return areas, np.exp(shapes), uniforms(seed, epoch, samples, _PLACE)


def flip_and_shift(images: Tensor, generator: torch.Generator, shift: int = 2) -> Tensor:
    """Mirrors half of the images and shifts each by up to ``shift`` pixels in both directions.

    What a shift uncovers is zero.

    Args:
        images: (N, C, H, W), any dtype.
        generator: where the draws come from, on the images' device.
        shift: pixels, at least 0.

    Returns:
        (N, C, H, W), of the same dtype.
    """
    n, _, height, width = images.shape
    options = {"generator": generator, "device": images.device}
    mirrored = torch.rand(n, **options) < 0.5  # type: ignore[call-overload]
    top, left = torch.randint(2 * shift + 1, (2, n), **options)  # type: ignore[call-overload]
    padded = F.pad(images, (shift, shift, shift, shift)).movedim(1, -1)
    windows = torch.stack([torch.arange(n, device=images.device), top, left, mirrored])
    return cut_windows(padded, windows, height, width).movedim(-1, 1).contiguous()


def cut_windows(images: Tensor, windows: Tensor, height: int, width: int) -> Tensor:
    """Cuts a window out of each image and mirrors it or not, in one gather.

    Args:
        images: (N, H, W, C).
        windows: int64 (4, n): which images, where their windows begin (top, left), and whether they are mirrored.
        height, width: Of the windows.

    Returns:
        (n, height, width, C).
    """
    samples, top, left, mirrored = windows[:, :, None]
    columns = torch.arange(width, device=images.device)
    columns = torch.where(mirrored.bool(), width - 1 - columns, columns) + left
    rows = samples * images.shape[1] + torch.arange(height, device=images.device) + top
    # Numbers of whole pixels: on a CPU, indexing three dimensions takes eight times as long.
    pixels = rows[:, :, None] * images.shape[2] + columns[:, None, :]
    return images.reshape(-1, images.shape[3]).index_select(0, pixels.flatten()).view(*pixels.shape, -1)


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

"""Whole data sets as tensors on one device; and two that need no files, digits and the points of a sine."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastmerge.data.arrays import ImageArrays, channel_statistics, check_arrays


@dataclass(frozen=True)
class Dataset:
    """Samples to train on and samples to test on, small enough to stay on the device.

    Attributes:
        train_inputs, test_inputs: (N, ...), uint8 images (N, C, H, W) or floats.
        train_targets, test_targets: (N,) int64 classes, or (N, ...) floats.
        mean, std: what :meth:`normalise` subtracts and divides by, broadcast against one sample; None for no
            normalisation.
    """

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    mean: Tensor | None = None
    std: Tensor | None = None

    def to(self, device: torch.device | str) -> Dataset:
        """The same data on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return replace(self, **moved)

    def normalise(self, inputs: Tensor) -> Tensor:
        """Turns stored inputs (..., C, H, W) into what networks read, float32."""
        if self.mean is None or self.std is None:
            return inputs
        return (inputs.float() - self.mean) / self.std

    @property
    def classes(self) -> int | None:
        """How many classes the training targets name; None for a regression."""
        return None if self.train_targets.is_floating_point() else int(self.train_targets.max()) + 1


def image_dataset(arrays: ImageArrays) -> Dataset:
    """Images as a data set, normalised by the mean and standard deviation of each channel over the training images."""
    mean, std = channel_statistics(arrays.train_images)
    return Dataset(
        _channels_first(arrays.train_images),
        torch.from_numpy(arrays.train_labels),
        _channels_first(arrays.test_images),
        torch.from_numpy(arrays.test_labels),
        torch.from_numpy(mean).float().reshape(-1, 1, 1),
        torch.from_numpy(std).float().reshape(-1, 1, 1),
    )


def _channels_first(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


_DIGITS_TO_TRAIN_ON = 1200


def load_digits() -> ImageArrays:
    """Loads scikit-learn's 1,797 grey 8×8 images of handwritten digits (UCI, E. Alpaydin and C. Kaynak).

    The first 1,200 images, in scikit-learn's order, are for training, the other 597 for testing. The order goes by
    writer, so most of the test images are by people whose digits were not trained on. Pixels of 0..16 become 0..240.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    from sklearn import datasets

    digits = datasets.load_digits()
    images = (digits.images * 15).astype("uint8")
    labels = digits.target
    arrays = {
        "train_images": images[:_DIGITS_TO_TRAIN_ON],
        "train_labels": labels[:_DIGITS_TO_TRAIN_ON],
        "test_images": images[_DIGITS_TO_TRAIN_ON:],
        "test_labels": labels[_DIGITS_TO_TRAIN_ON:],
    }
    return check_arrays("scikit-learn's digits", arrays)


_SINE_PERIODS = 5
_SINE_NOISE = 0.2


def sine_dataset(seed: int, points: int = 10_000) -> Dataset:
    """Draws points to train on and as many to test on: ``x ~ U(0, 1)``, ``y = sin(10 π x) + N(0, 0.2²)``.

    A network that knows the curve has a mean squared error of 0.04, the noise.

    Args:
        seed: the same seed gives the same points.
        points: in each of the two sets.

    Returns:
        Inputs and targets of shape (points, 1), float32.

    Source: Pašen & Boža, "Merging of neural networks", section 3.1.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw() -> tuple[Tensor, Tensor]:
        x = torch.rand(points, 1, generator=generator)
        return x, sine_curve(x) + _SINE_NOISE * torch.randn(points, 1, generator=generator)

    return Dataset(*draw(), *draw())


def sine_curve(x: Tensor) -> Tensor:
    """The curve without noise, ``sin(10 π x)``."""
    return torch.sin(2 * math.pi * _SINE_PERIODS * x)

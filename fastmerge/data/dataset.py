"""A whole data set as tensors on one device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastmerge.data.arrays import ImageArrays, channel_statistics


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

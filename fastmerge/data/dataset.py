"""Whole data sets as tensors on one device: two that need no files, and batches of them, each network's in its own order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmerge.data.arrays import ImageArrays, channel_statistics, check_arrays, evenly_held_out


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


Augment = Callable[[Tensor, torch.Generator], Tensor]

_CHUNK_BYTES = 32 * 2**20
_VALUES_AT_ONCE = 2**20  # of input or of a hidden layer like the sine's, in all networks together


class StackedBatches:
    """A loader of training batches (inputs (R, N, ...), targets (R, N, ...)) for R networks, each with an order of its own.

    Args:
        data: on the device where the networks are.
        batch_size: samples per network and batch; the last batch of an epoch may be smaller.
        orders: R generators on the CPU, from which each network's order is drawn, epoch by epoch.
        augment: changes a batch of stored images (N, C, H, W) at random, if given.
        noise: the generator that ``augment`` draws from.
    """

    def __init__(
        self,
        data: Dataset,
        batch_size: int,
        orders: Sequence[torch.Generator],
        augment: Augment | None = None,
        noise: torch.Generator | None = None,
    ) -> None:
        self.data, self.orders, self.augment, self.noise = data, orders, augment, noise
        self.samples = len(data.train_inputs)
        self.batch_size = min(batch_size, self.samples)
        per_step = 4 * len(orders) * self.batch_size * math.prod(data.train_inputs.shape[1:])
        self._steps_at_once = max(1, _CHUNK_BYTES // per_step)  # few large gathers, yet no copy of the whole data set
        self._said: Tensor | None = None

    def ask(self, answers: Callable[[tuple[Tensor, ...]], Tensor]) -> bool:
        """From here on targets are (targets, what each network's teachers say of the same samples).

        Args:
            answers: of inputs (R, n, ...), (R, n, K). Asked once about every sample.

        Returns:
            False where samples change at random, so that nothing was asked.
        """
        if self.augment is not None:
            return False
        parts = self.data.normalise(self.data.train_inputs).split(self.batch_size)
        self._said = torch.cat([answers((x.expand(len(self.orders), *x.shape).contiguous(),)) for x in parts], 1)
        return True

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        """One epoch: every network sees every sample once."""
        order = torch.stack([torch.randperm(self.samples, generator=generator) for generator in self.orders])
        whole = self.samples // self.batch_size
        for start in range(0, whole, self._steps_at_once):
            steps = min(self._steps_at_once, whole - start)
            first = start * self.batch_size
            yield from self._gather(order[:, first : first + steps * self.batch_size], steps)
        if whole * self.batch_size < self.samples:
            yield from self._gather(order[:, whole * self.batch_size :], 1)

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on with the same epochs."""
        noise = None if self.noise is None else self.noise.get_state()
        return {"orders": [order.get_state() for order in self.orders], "noise": noise}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a :meth:`state_dict`."""
        for order, saved in zip(self.orders, state["orders"], strict=True):
            order.set_state(saved)
        if self.noise is not None:
            self.noise.set_state(state["noise"])

    def _gather(self, order: Tensor, steps: int) -> Iterator[tuple[Tensor, Any]]:
        index = order.view(len(order), steps, -1).transpose(0, 1).to(self.data.train_inputs.device)  # (steps, R, N)
        inputs = self.data.train_inputs[index]
        if self.augment is not None:
            assert self.noise is not None
            inputs = self.augment(inputs.flatten(0, 2), self.noise).view(inputs.shape)
        batches = zip(self.data.normalise(inputs).unbind(), self.data.train_targets[index].unbind(), strict=True)
        if self._said is None:
            return batches
        said = self._said[torch.arange(len(order), device=index.device)[:, None], index]
        return ((x, (target, each)) for (x, target), each in zip(batches, said, strict=True))


class SameForAll:
    """A loader of test batches, the same for R networks, in order.

    Args:
        data: whose test samples.
        replicates: R.
    """

    def __init__(self, data: Dataset, replicates: int) -> None:
        self.data, self.replicates = data, replicates
        per_sample = replicates * max(100, math.prod(data.test_inputs.shape[1:]))
        self.batch_size = max(1, _VALUES_AT_ONCE // per_sample)

    def __len__(self) -> int:
        return -(-len(self.data.test_inputs) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        pairs = zip(
            self.data.test_inputs.split(self.batch_size), self.data.test_targets.split(self.batch_size), strict=True
        )
        for inputs, targets in pairs:
            same = self.data.normalise(inputs)
            yield tuple(value.expand(self.replicates, *value.shape).contiguous() for value in (same, targets))  # type: ignore[misc]


def held_out(data: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """Takes a part of the training samples away, evenly over the classes.

    Returns:
        The data without it, and the part as the test samples of another data set.
    """
    labels = None if data.classes is None else data.train_targets.cpu().numpy()
    held = torch.from_numpy(evenly_held_out(len(data.train_inputs), fraction, labels))
    rest = torch.ones(len(data.train_inputs), dtype=torch.bool)
    rest[held] = False
    part = replace(data, test_inputs=data.train_inputs[held], test_targets=data.train_targets[held])
    return replace(data, train_inputs=data.train_inputs[rest], train_targets=data.train_targets[rest]), part

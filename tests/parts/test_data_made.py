"""The data sets that need no file, and augmentation."""

import math

import numpy as np
import pytest
import torch

from fastmerge.data.augmentation import flip_and_shift
from fastmerge.data.dataset import image_dataset, sine_curve, sine_dataset


def test_sine_points_are_those_of_the_paper():
    data = sine_dataset(3)
    for x, y in ((data.train_inputs, data.train_targets), (data.test_inputs, data.test_targets)):
        assert x.shape == y.shape == (10_000, 1)
        assert x.min() >= 0
        assert x.max() <= 1
        assert x.mean().item() == pytest.approx(0.5, abs=0.02)
        noise = y - torch.sin(10 * math.pi * x)
        assert noise.mean().item() == pytest.approx(0, abs=0.01)
        assert noise.std().item() == pytest.approx(0.2, abs=0.01)
    assert data.classes is None
    assert data.normalise(data.train_inputs) is data.train_inputs


def test_sine_points_repeat_by_seed_and_differ_otherwise():
    data, again, other = sine_dataset(1, 50), sine_dataset(1, 50), sine_dataset(2, 50)
    assert torch.equal(data.train_targets, again.train_targets)
    assert not torch.equal(data.train_inputs, other.train_inputs)
    assert not torch.equal(data.train_inputs, data.test_inputs)


def test_sine_curve():
    assert sine_curve(torch.tensor([0.05, 0.25])).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


def test_digits_are_scikit_learns():
    sklearn_data = pytest.importorskip("sklearn.datasets")
    from fastmerge.data.dataset import load_digits

    arrays, raw = load_digits(), sklearn_data.load_digits()
    assert arrays.train_images.shape == (1200, 8, 8, 1)
    assert arrays.test_images.shape == (597, 8, 8, 1)
    assert np.array_equal(np.concatenate([arrays.train_images, arrays.test_images])[..., 0] / 15, raw.images)
    assert np.array_equal(np.concatenate([arrays.train_labels, arrays.test_labels]), raw.target)
    assert image_dataset(arrays).classes == 10


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_flip_and_shift_gives_only_flips_and_shifts(dtype):
    image = torch.arange(1, 1 + 2 * 5 * 6).view(1, 2, 5, 6).to(dtype)
    possible = {}
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
    for flipped in (False, True):
        for top in range(3):
            for left in range(3):
                whole = padded.flip(3) if flipped else padded
                possible[tuple(whole[:, :, top : top + 5, left : left + 6].flatten().tolist())] = (flipped, top, left)
    generator = torch.Generator().manual_seed(0)
    out = flip_and_shift(image.expand(400, -1, -1, -1), generator, shift=1)
    assert out.dtype == dtype
    seen = [possible[tuple(sample.flatten().tolist())] for sample in out]
    assert len(set(seen)) == 18
    assert sum(flipped for flipped, _, _ in seen) == pytest.approx(200, abs=50)


def test_flip_and_shift_without_a_shift_repeats_by_seed():
    images = torch.randn(8, 3, 4, 4)
    first, second = (flip_and_shift(images, torch.Generator().manual_seed(4), shift=0) for _ in range(2))
    assert torch.equal(first, second)
    for image, changed in zip(images, first, strict=True):
        assert torch.equal(changed, image) or torch.equal(changed, image.flip(2))

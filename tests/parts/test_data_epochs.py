"""Which samples make which batch: every one once, whatever the shards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fastmerge.data.augmentation import AUGMENTATIONS, Augmentation, draw_changes, draw_crops
from fastmerge.data.decoding import centre_crop, random_crop
from fastmerge.data.epochs import Batches, order, uniforms
from fastmerge.data.loading import image_loaders
from fastmerge.evaluation import Setting, evaluate
from image_files import write_tree


@pytest.mark.parametrize("shards", [1, 2, 3, 5])
@pytest.mark.parametrize("samples", [7, 24, 31])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_validation_reads_each_sample_once(shards, samples, batch_size):
    parts = [Batches(samples, batch_size, False, shard=shard, shards=shards) for shard in range(shards)]
    batches = [part.of(5) for part in parts]
    assert [len(part) for part in parts] == [len(found) for found in batches]
    assert sorted(np.concatenate([np.concatenate(found) for found in batches])) == list(range(samples))
    assert all(len(batch) <= batch_size for found in batches for batch in found)
    assert [part.shard_samples for part in parts] == [sum(map(len, found)) for found in batches]


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_shards_together_read_what_one_process_reads(shards):
    samples, batch_size = 60, 5
    one = Batches(samples, shards * batch_size, True, seed=4).of(2)
    parts = [Batches(samples, batch_size, True, seed=4, shard=shard, shards=shards).of(2) for shard in range(shards)]
    assert len({len(part) for part in parts}) == 1
    for step, batch in enumerate(one):
        together = np.stack([part[step] for part in parts], 1).ravel()
        assert together.tolist() == batch.tolist()


@pytest.mark.parametrize("samples", [60, 61, 62, 64])
def test_shards_of_training_are_equally_long(samples):
    parts = [Batches(samples, 4, True, shard=shard, shards=3) for shard in range(3)]
    sizes = {tuple(len(batch) for batch in part.of(0)) for part in parts}
    assert len(sizes) == 1
    read = np.concatenate([np.concatenate(part.of(0)) for part in parts])
    assert len(set(read)) == len(read) > samples - 3 - 3  # less than one each left out, and a last batch of one each


@pytest.mark.parametrize(
    ("samples", "batch_size", "drop_last", "sizes"),
    [
        (33, 8, False, [8] * 4),  # a last batch of one is left out
        (34, 8, False, [8] * 4 + [2]),
        (34, 8, True, [8] * 4),
        (3, 8, True, [3]),  # there is no other
        (3, 1, False, [1] * 3),
        (1, 8, False, [1]),
    ],
)
def test_last_batches(samples, batch_size, drop_last, sizes):
    assert [len(batch) for batch in Batches(samples, batch_size, True, drop_last=drop_last).of(0)] == sizes


def test_orders_are_permutations_that_differ():
    orders = [tuple(order(seed, epoch, 50)) for seed in range(3) for epoch in range(3)]
    assert all(sorted(found) == list(range(50)) for found in orders)
    assert len(set(orders)) == 9
    assert order(0, 0, 10).tolist() == [7, 0, 6, 1, 3, 9, 8, 4, 2, 5]  # the same in every version, for ever


def test_draws_are_uniform_and_independent():
    draws = uniforms(1, 2, np.arange(20_000), range(6))
    assert draws.min() >= 0
    assert draws.max() < 1
    for column in draws.T:
        counts = np.histogram(column, 20, (0, 1))[0]
        assert ((counts - 1000) ** 2 / 1000).sum() < 50  # chi-squared of 19 degrees: 1 in 7,000
    for other in (
        draws[:, 1:],
        uniforms(1, 3, np.arange(20_000), range(6)),
        uniforms(2, 2, np.arange(20_000), range(6)),
    ):
        assert abs(np.corrcoef(draws[:, 0], other[:, -1])[0, 1]) < 0.03
    assert abs(np.corrcoef(draws[1:, 0], draws[:-1, 0])[0, 1]) < 0.03


def test_draws_do_not_depend_on_who_asks():
    samples = np.array([5, 900, 3])
    assert np.array_equal(uniforms(7, 1, samples, range(4, 6)), uniforms(7, 1, np.arange(1000), range(8))[samples, 4:6])


def test_changes_keep_within_their_bounds():
    augmentation = Augmentation(shift=3, brightness=0.2, contrast=0.4, saturation=1.5, hue=0.1)
    changes = draw_changes(augmentation, 0, 0, np.arange(4000))
    assert changes.mirrored.mean() == pytest.approx(0.5, abs=0.03)
    for shift in (changes.top, changes.left):
        assert sorted(set(shift)) == list(range(7))
    for values, low, high in (
        (changes.brightness, 0.8, 1.2),
        (changes.contrast, 0.6, 1.4),
        (changes.saturation, 0.0, 2.5),
        (changes.hue, -36, 36),
    ):
        assert low <= values.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < values.max() <= high
    still = draw_changes(AUGMENTATIONS["none"], 0, 0, np.arange(50))
    assert not still.mirrored.any()
    assert not still.top.any()
    assert (still.hue == 0).all()
    assert (still.contrast == 1).all()


def test_crops_fit_and_have_the_shape_asked_for():
    augmentation = AUGMENTATIONS["imagenet"]
    areas, ratios, place = draw_crops(augmentation, 0, 0, np.arange(2000))
    for draws in zip(areas, ratios, place, strict=True):
        top, left, height, width = random_crop(100, 140, *draws, augmentation.ratio)
        assert 0 <= top <= 100 - height
        assert 0 <= left <= 140 - width
        assert 0.07 < height * width / 14_000 <= 1
        assert 0.7 < width / height < 1.4


@pytest.mark.parametrize(
    ("size", "crop"),
    [((10, 100), (0, 43, 10, 13)), ((100, 10), (43, 0, 13, 10)), ((1, 1), (0, 0, 1, 1)), ((2, 90), (0, 43, 2, 3))],
)
def test_images_in_which_no_crop_fits_give_the_largest_in_the_middle(size, crop):
    never = np.full(10, 0.99), np.full(10, 1.0)
    assert random_crop(*size, *never, np.array([0.9, 0.1]), (3 / 4, 4 / 3)) == crop


def test_centre_crop():
    assert centre_crop(256, 256, 224, 256) == (16, 16, 240, 240)
    assert centre_crop(512, 1024, 224, 256) == (32, 288, 480, 736)
    assert centre_crop(256, 287, 224, 256) == (16, 32, 240, 256)  # 31.5 is rounded to even, as torchvision does


@pytest.mark.parametrize("loader", ["dali", "torch", "device"])
def test_scores_count_each_image_of_a_smaller_last_batch_once(tmp_path, loader):
    """Whatever the batches, and whatever the shards, whose samples and not whose means are counted."""
    pytest.importorskip("PIL")
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    write_tree(tmp_path, train_a=2, train_b=2, val_a=7, val_b=4)
    options = {"image_size": 8, "augmentation": "small", "loader": loader, "workers": 0}
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    setting = Setting(torch.device("cpu"), nn.functional.cross_entropy)
    whole = evaluate(network, image_loaders(tmp_path, 11, **options).val, setting)
    assert 0 < whole.accuracy < 1
    for batch_size in (1, 3, 4, 10, 100):
        score = evaluate(network, image_loaders(tmp_path, batch_size, **options).val, setting)
        assert score.accuracy == pytest.approx(whole.accuracy)
        assert score.loss == pytest.approx(whole.loss, rel=1e-5)
    parts = [image_loaders(tmp_path, 3, shard=shard, shards=2, **options).val for shard in range(2)]
    assert [len(part) for part in parts] == [2, 2]
    assert [part.samples for part in parts] == [6, 5]
    scores = [evaluate(network, part, setting) for part in parts]
    right = sum(score.accuracy * part.samples for score, part in zip(scores, parts, strict=True))
    assert right / 11 == pytest.approx(whole.accuracy)


@pytest.mark.parametrize("loader", ["dali", "torch", "device"])
@pytest.mark.parametrize("shards", [2, 3])
def test_loaders_of_all_shards_read_each_validation_image_once(tmp_path, loader, shards):
    pytest.importorskip("PIL")
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    write_tree(tmp_path, train_a=7, train_b=7, val_a=5, val_b=3)
    options = {"image_size": 8, "augmentation": "small", "loader": loader, "workers": 0, "channels_last": False}
    every = [image_loaders(tmp_path, 2, shard=shard, shards=shards, **options) for shard in range(shards)]
    images = [image.numpy().tobytes() for loaders in every for batch, _ in loaders.val for image in batch]
    one = [image.numpy().tobytes() for batch, _ in image_loaders(tmp_path, 100, **options).val for image in batch]
    assert sorted(images) == sorted(one)
    assert len(set(one)) == 8
    assert len({len(list(loaders.train)) for loaders in every}) == 1
    # In training, an image is changed alike whichever shard reads it.
    train = {image.numpy().tobytes() for batch, _ in image_loaders(tmp_path, 100, **options).train for image in batch}
    parts = [image.numpy().tobytes() for loaders in every for batch, _ in loaders.train for image in batch]
    assert not all(image in train for image in parts)  # the passes above were of epoch 0, these are of epoch 1
    for loaders in every:
        loaders.train.set_epoch(0)
        assert all(image.numpy().tobytes() in train for batch, _ in loaders.train for image in batch)

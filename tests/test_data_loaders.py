"""Loaders: batches as networks read them, from arrays and from trees of images."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fastmerge.data.loaders import IMAGENET_MEAN, IMAGENET_STD, image_loaders


@pytest.fixture
def arrays(tmp_path) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (33, 5, 4, 3), np.uint8)
    names = ("train_images", "train_labels", "test_images", "test_labels")
    np.savez(tmp_path / "x.npz", **dict(zip(names, (images, np.arange(33), images[:21], np.arange(21)), strict=True)))
    return tmp_path / "x.npz"


def test_arrays_are_normalised_by_the_training_images(arrays):
    loaders = image_loaders(arrays, 8)
    images = np.load(arrays)["train_images"].astype(np.float64)
    expected = (images - images.mean((0, 1, 2))) / images.std((0, 1, 2))
    inputs, targets = (torch.cat(parts) for parts in zip(*loaders.val, strict=True))
    assert inputs.dtype == torch.float32
    np.testing.assert_allclose(inputs, expected[:21].transpose(0, 3, 1, 2), atol=1e-5)
    assert targets.tolist() == list(range(21))
    assert loaders.classes == 33


def test_training_batches_come_in_a_new_order_each_pass(arrays):
    loaders = image_loaders(arrays, 11)
    ordered = torch.cat([inputs for inputs, _ in image_loaders(arrays, 33).train])
    first, second = ([targets for _, targets in loaders.train] for _ in range(2))
    assert len(first) == len(loaders.train) == 3
    assert sorted(torch.cat(first).tolist()) == list(range(33))
    assert torch.cat(first).tolist() != torch.cat(second).tolist()
    assert ordered.shape == (33, 3, 5, 4)
    inputs, targets = next(iter(loaders.train))
    np.testing.assert_allclose(inputs[0], next(iter(image_loaders(arrays, 33).val))[0][targets[0]], atol=1e-6)


@pytest.mark.parametrize(
    ("batch_size", "train", "val"), [(8, 4, 3), (16, 2, 2), (10, 4, 3), (20, 2, 2), (1, 33, 21), (64, 1, 1)]
)
def test_a_last_training_batch_of_one_is_left_out(arrays, batch_size, train, val):
    loaders = image_loaders(arrays, batch_size)
    assert (len(list(loaders.train)), len(list(loaders.val))) == (len(loaders.train), len(loaders.val)) == (train, val)


def tree(root: Path, **folders: int) -> Path:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    for folder, count in folders.items():
        directory = root / folder.replace("_", "/")
        directory.mkdir(parents=True)
        for number in range(count):
            image.new("RGB", (40, 30), (255, 0, 51)).save(directory / f"{number}.png")
    return root


@pytest.mark.parametrize("validation", ["val", "test"])
def test_a_tree_becomes_square_normalised_images(tmp_path, validation):
    folders = {"train_cat": 3, "train_dog": 2, f"{validation}_cat": 1, f"{validation}_dog": 1}
    loaders = image_loaders(tree(tmp_path, **folders), 4, image_size=16)
    colour = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    for loader in (loaders.train, loaders.val):
        inputs, _ = next(iter(loader))
        assert inputs.shape[1:] == (3, 16, 16)
        torch.testing.assert_close(inputs, colour[:, None, None].expand_as(inputs), atol=1e-5, rtol=0)
    assert torch.cat([targets for _, targets in loaders.val]).tolist() == [0, 1]
    assert len(loaders.train) == 1  # of 4 and 1 images
    assert loaders.classes == 2


@pytest.mark.parametrize(
    ("folders", "error", "message"),
    [
        ({"val_cat": 1}, FileNotFoundError, "there is no .*train; a tree needs"),
        ({"train_cat": 1}, FileNotFoundError, "there is no .*val; a tree needs"),
        ({"train_cat": 1, "val_cat": 0}, ValueError, "no tree of images: .*cat"),
        ({"train_cat": 1, "val_cat": 1, "val_dog": 1}, ValueError, "classes of .* differ: dog"),
    ],
)
def test_trees_of_another_form_are_refused(tmp_path, folders, error, message):
    with pytest.raises(error, match=message):
        image_loaders(tree(tmp_path, **folders), 4)


def test_arrays_keep_their_size(arrays):
    assert image_loaders(arrays, 4, image_size=5).classes == 33
    with pytest.raises(ValueError, match=r"are 5 high; another size is for a tree"):
        image_loaders(arrays, 4, image_size=6)

"""CIFAR's pickles: what is read, and what is not run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmerge.data.arrays import find_cifar, load_cifar
from fastmerge.data.augmentation import AUGMENTATIONS, Augmentation, colour_maps, draw_changes, map_colours
from fastmerge.data.loading import image_loaders


def content(count: int, key: str, seed: int) -> dict[str, object]:
    generator = np.random.default_rng(seed)
    labels = [number % 10 for number in range(count)]
    names = [f"{number}.png" for number in range(count)]
    return {"data": generator.integers(0, 256, (count, 3072), np.uint8), key: labels, "filenames": names}


def write(path: Path, value: object, old: bool = True) -> None:
    """A pickle as numpy of Python 2 wrote them, or as today's does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = pickle.dumps(value, protocol=2)
    path.write_bytes(written.replace(b"numpy._core", b"numpy.core") if old else written)


def write_cifar100(root: Path) -> dict[str, dict[str, object]]:
    made = {"train": content(20, "fine_labels", 0), "test": content(12, "fine_labels", 1)}
    for name, value in made.items():
        write(root / "cifar-100-python" / name, value | {"coarse_labels": [0] * len(value["fine_labels"])})  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_cifar100_is_read(tmp_path, inside, old):
    made = write_cifar100(tmp_path)
    for name, value in made.items():
        write(tmp_path / "cifar-100-python" / name, value, old)
    arrays = load_cifar(tmp_path / "cifar-100-python" if inside else tmp_path)
    for split in ("train", "test"):
        images = getattr(arrays, f"{split}_images")
        assert images.shape[1:] == (32, 32, 3)
        # Rows of pixels, colour by colour.
        assert np.array_equal(images[3, 5, 7], made[split]["data"][3].reshape(3, 32, 32)[:, 5, 7])
        assert getattr(arrays, f"{split}_labels").tolist() == made[split]["fine_labels"]


def test_cifar10_is_read_in_the_order_of_its_parts(tmp_path):
    parts = [content(10, "labels", number) for number in range(6)]
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    for name, part in zip(names, parts, strict=True):
        write(tmp_path / "cifar-10-batches-py" / name, part)
    arrays = load_cifar(tmp_path)
    assert arrays.train_images.shape == (50, 32, 32, 3)
    flat = arrays.train_images.transpose(0, 3, 1, 2).reshape(50, 3072)
    assert np.array_equal(flat, np.concatenate([part["data"] for part in parts[:5]]))
    assert arrays.classes == 10


def test_torchvision_reads_the_same(tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")
    write_cifar100(tmp_path)
    write(tmp_path / "cifar-100-python" / "meta", {"fine_label_names": [str(number) for number in range(10)]})

    class Unchecked(datasets.CIFAR100):
        def _check_integrity(self) -> bool:
            return True  # the sums are those of the real files

        def _load_meta(self) -> None:
            self.classes = []

    theirs = Unchecked(tmp_path, train=False)
    ours = load_cifar(tmp_path)
    assert np.array_equal(theirs.data, ours.test_images)
    assert theirs.targets == ours.test_labels.tolist()


def test_loaders_take_it_with_its_augmentation(tmp_path):
    write_cifar100(tmp_path)
    loaders = image_loaders(tmp_path, 8)
    assert loaders.loader == "device"
    assert loaders.train.augmentation == AUGMENTATIONS["cifar"]
    assert [images.shape[1:] for images, _ in loaders.val] == [(3, 32, 32)] * 2


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("touched",)


@pytest.mark.parametrize("value", [Evil(), {"data": Evil()}, {"data": np.array([Evil()], object)}])
def test_nothing_that_a_pickle_asks_for_is_run(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    write_cifar100(tmp_path)
    write(tmp_path / "cifar-100-python" / "train", value)
    with pytest.raises(ValueError, match=r"train can't be read as a file of CIFAR: it asks for posix.mkdir,"):
        load_cifar(tmp_path)
    assert not Path("touched").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], "needs 'data' and 'fine_labels'"),
        ({"data": np.zeros((2, 3072), np.uint8)}, "needs 'data' and 'fine_labels'"),
        (
            {"data": np.zeros((2, 9), np.uint8), "fine_labels": [0, 1]},
            r"data must be uint8 \(N, 3072\); it is uint8 \(2, 9\)",
        ),
        ({"data": np.zeros((2, 3072)), "fine_labels": [0, 1]}, "data must be uint8"),
        ({"data": [1], "fine_labels": [0, 1]}, "it is a list of 1"),
        (
            {"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0]},
            "must be a list of 2 whole numbers; it is a list of 1",
        ),
        ({"data": np.zeros((2, 3072), np.uint8), "fine_labels": ["a", 1]}, "must be a list of 2 whole numbers"),
    ],
)
def test_files_of_another_form_are_named(tmp_path, value, message):
    write_cifar100(tmp_path)
    write(tmp_path / "cifar-100-python" / "train", value)
    with pytest.raises(ValueError, match=rf"cifar-100-python/train.*{message}"):
        load_cifar(tmp_path)


def test_damaged_and_missing_files_are_named(tmp_path):
    write_cifar100(tmp_path)
    test = tmp_path / "cifar-100-python" / "test"
    test.write_bytes(test.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cifar-100-python/test can't be read as a file of CIFAR"):
        load_cifar(tmp_path)
    test.unlink()
    assert find_cifar(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="no cifar-100-python or cifar-10-batches-py with all its files at"):
        load_cifar(tmp_path)


def test_colour_maps_are_dalis(tmp_path):
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import Pipeline, fn

    images = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), np.uint8)
    augmentation = Augmentation(brightness=0.4, contrast=0.5, saturation=0.6, hue=0.2)
    changes = draw_changes(augmentation, 0, 0, np.arange(5))
    drawn = (changes.brightness, changes.contrast, changes.saturation, changes.hue)
    values = [np.ascontiguousarray(value) for value in drawn]
    pipeline = Pipeline(5, 1, None)
    with pipeline:
        pixels, *twist = fn.external_source(lambda: (images, *values), num_outputs=5, layout=["HWC"])
        names = ("brightness", "contrast", "saturation", "hue")
        pipeline.set_outputs(fn.color_twist(pixels, **dict(zip(names, twist, strict=True))))
    expected = torch.from_dlpack(pipeline.run()[0].as_tensor())
    got = map_colours(torch.from_numpy(images), *colour_maps(changes))
    assert (got.int() - expected.int()).abs().max() <= 1  # halves are rounded one way or the other
    assert (got.int() - torch.from_numpy(images).int()).abs().float().mean() > 20

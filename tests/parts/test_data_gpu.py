"""Loaders on a GPU: what the CPU gives, there already."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastmerge.data.decoding import BadImageError, BadImageWarning
from fastmerge.data.loading import IMAGENET_STD, image_loaders
from image_files import spoil, write_odd_images, write_tree

pytestmark = pytest.mark.gpu
SIZE = 24


@pytest.fixture
def tree(request, tmp_path) -> Path:
    pytest.importorskip("PIL")
    return write_tree(tmp_path, getattr(request, "param", ".jpg"), train_ant=9, train_cat=6, val_ant=4, val_cat=5)


def make(path: Path, device: str, loader: str = "dali", **options):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    options = {"image_size": SIZE, "augmentation": "imagenet", "seed": 3, "workers": 2} | options
    return image_loaders(path, 4, loader=loader, device=device, **options)


def whole(loader) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    return images, labels


def levels(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Differences in units of 1/255."""
    return (images.float().cpu() - others).abs() * torch.tensor(IMAGENET_STD).view(3, 1, 1) * 255


# nvJPEG enlarges colours without smoothing, so JPEGs differ where colours change, by a level or two in the mean; PNGs, decoded
# on the CPU, differ by the rounding of the resize.
@pytest.mark.parametrize(("tree", "mean", "most"), [(".jpg", 2.5, 80), (".png", 0.5, 2.01)], indirect=["tree"])
@pytest.mark.parametrize("augmentation", ["imagenet", "cifar", "none"])
def test_dali_on_a_gpu_gives_what_it_gives_on_the_cpu(tree, augmentation, mean, most):
    there, here = (make(tree, device, augmentation=augmentation) for device in ("cuda", "cpu"))
    for ours, theirs in ((there.train, here.train), (there.val, here.val)):
        for _ in range(2):
            (images, labels), (expected, targets) = whole(ours), whole(theirs)
            assert images.device.type == labels.device.type == "cuda"
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert labels.tolist() == targets.tolist()
            assert levels(images, expected).mean() < mean
            assert levels(images, expected).max() < most


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("loader", ["dali", "device", "torch"])
def test_batches_held_are_not_overwritten(tree, loader, dtype):
    train = make(tree, "cuda", loader, augmentation="cifar", dtype=dtype).train
    held = list(train)
    copies = [images.clone() for images, _ in held]
    for _ in range(5):
        for images, _ in train:
            images.double().sum()  # work on torch's stream while DALI goes on
    torch.cuda.synchronize()
    assert all(images.dtype == dtype for images, _ in held)
    assert all(torch.equal(images, copied) for (images, _), copied in zip(held, copies, strict=True))


def test_dali_takes_no_memory_back_from_work_that_waits(tree):
    """The GPU reads each batch long after Python has let go of it."""
    train = make(tree, "cuda", augmentation="cifar").train
    sums: list[list[torch.Tensor]] = []
    for cycles in (0, 100_000_000):
        train.set_epoch(1)
        found = []
        for images, _ in train:
            torch.cuda._sleep(cycles)
            found.append(images.double().sum())
            del images
            if not cycles:
                torch.cuda.synchronize()
        sums.append(found)
    assert torch.equal(*(torch.stack(found) for found in sums))


@pytest.mark.parametrize("augmentation", ["cifar", "none"])
@pytest.mark.parametrize("loader", ["device", "torch"])
def test_the_other_loaders_give_what_they_give_on_the_cpu(tree, loader, augmentation):
    there, here = (make(tree, device, loader, augmentation=augmentation) for device in ("cuda", "cpu"))
    for ours, theirs in ((there.train, here.train), (there.val, here.val)):
        (images, labels), (expected, targets) = whole(ours), whole(theirs)
        assert images.device.type == labels.device.type == "cuda"
        assert labels.tolist() == targets.tolist()
        torch.testing.assert_close(images.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["truncated", "last byte", "empty", "text", "header"])
def test_bad_images_are_named_on_a_gpu_too(tree, kind):
    spoil(tree / "val" / "ant" / "002.jpg", kind)
    with pytest.raises(BadImageError, match=r"val/ant/002.jpg can't be read as an image"):
        list(make(tree, "cuda").val)
    with pytest.warns(BadImageWarning, match=r"val/ant/002.jpg can't be read as an image"):
        assert whole(make(tree, "cuda", on_bad_image="skip").val)[1].tolist() == [0] * 3 + [1] * 5


def test_unusual_images_are_read_on_a_gpu_too(tmp_path):
    pytest.importorskip("PIL")
    for split in ("train", "val"):
        write_odd_images(tmp_path / split / "a")
    there, here = (whole(make(tmp_path, device, augmentation="none").val)[0] for device in ("cuda", "cpu"))
    assert levels(there, here).mean((1, 2, 3)).max() < 4


def test_a_second_gpu_gets_its_own_batches(tree):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for loader in ("dali", "device", "torch"):
        images, labels = next(iter(make(tree, "cuda:1", loader, augmentation="cifar").train))
        assert images.device == labels.device == torch.device("cuda", 1)

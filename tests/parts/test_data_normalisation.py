"""Images are normalised as usual for their kind, or as the teachers were trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastmerge.cli import main
from fastmerge.data.loading import IMAGENET_MEAN, IMAGENET_STD, image_loaders
from image_files import noise_arrays, write_tree

MEAN, STD = (0.5, 0.4, 0.1), (0.25, 1.0, 0.5)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "tree", train_ant=3, train_cat=2, val_ant=2, val_cat=1)


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    np.savez(tmp_path / "x.npz", **noise_arrays(8, 8, (5, 6, 3), classes=8))
    return tmp_path / "x.npz"


def images(path: Path, loader: str, **options: Any) -> list[torch.Tensor]:
    """Of training and validation, without random changes."""
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    size = 8 if path.is_dir() else None
    made = image_loaders(path, 2, loader=loader, image_size=size, augmentation="none", workers=1, **options)
    return [torch.cat([batch for batch, _ in part]) for part in (made.train, made.val)]


def channels(values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values).view(3, 1, 1)


@pytest.mark.parametrize("loader", ["device", "torch", "dali"])
def test_trees(tree: Path, loader: str) -> None:
    chosen = images(tree, loader, mean=MEAN, std=STD)
    for usual, other in zip(images(tree, loader), chosen, strict=True):
        pixels = usual * channels(IMAGENET_STD) + channels(IMAGENET_MEAN)
        torch.testing.assert_close(other, (pixels - channels(MEAN)) / channels(STD), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("loader", ["device", "torch"])
def test_arrays(arrays: Path, loader: str) -> None:
    usual = images(arrays, loader)[0]
    assert usual.mean((0, 2, 3)).abs().max() < 1e-5
    assert (usual.std((0, 2, 3)) - 1).abs().max() < 0.01
    pixels = torch.from_numpy(np.load(arrays)["test_images"]).permute(0, 3, 1, 2) / 255
    chosen = images(arrays, loader, mean=MEAN, std=STD)[1]
    torch.testing.assert_close(chosen, (pixels - channels(MEAN)) / channels(STD), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": MEAN}, "mean and std go together"),
        ({"mean": MEAN, "std": STD[:2]}, "a number for each channel"),
        ({"mean": (0.5,), "std": (0.5,)}, "have 3 channels; mean and std have 1"),
        ({"mean": MEAN, "std": (0.5, 0.0, 0.5)}, "std above 0"),
        ({"mean": (float("nan"), 0.0, 0.0), "std": STD}, "must be finite"),
    ],
)
def test_refusals(arrays: Path, tree: Path, options: dict[str, Any], message: str) -> None:
    for path in (arrays, tree):
        with pytest.raises(ValueError, match=message):
            image_loaders(path, 2, **options)


def test_the_command_line(arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def record(path: Path, batch_size: int, **options: Any) -> None:
        seen.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr("fastmerge.cli.merge.image_loaders", record)
    words = ["merge", "--model", "resnet18", "--teachers", "a", "b", "--data", str(arrays), "--device", "cpu"]
    numbers = ["--mean", *map(str, MEAN), "--std", *map(str, STD)]
    assert main([*words, "--out", str(tmp_path / "out"), *numbers]) == 130
    assert (tuple(seen["mean"]), tuple(seen["std"])) == (MEAN, STD)

"""Images per second of the loaders, all reading the same files in turn; on a GPU beside the big student that they feed.

A step reads every training image once, resized to 224 pixels: for DALI and DataLoader with torchvision's recipe for ImageNet,
from files; for the device loader with the shifts of small images, from what it decoded before the clock started. The files
are made here: noise with as much detail at each scale as photographs have, as JPEGs of 500 x 375, and what ``fastmerge data
prepare`` makes of them. ``FASTMERGE_BENCH_DATA=FOLDER`` takes a tree train/<class>/<image>,
val/<class>/<image> in their place.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import names
from benchmarks.cases import Case, needs_gpu
from benchmarks.contenders import big
from benchmarks.effort import Effort
from benchmarks.race import Contender, UnavailableError, race
from benchmarks.steps import Step
from fastmerge.data.decoding import cores
from fastmerge.data.loading import dali_is_there, image_loaders
from fastmerge.data.preparing import prepare

SIDE = 224
DISTINCT = 128  # files that differ; on a GPU each has several names
BATCH = {"cpu": 64, "cuda": 256}
COPIES = {"cpu": 1, "cuda": 32}
ROUNDS, SECONDS = 15, 45.0  # passes are long; what they read is the same each time


def photograph(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3): noise whose amplitude falls with the frequency."""
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequencies[0, 0] = np.inf
    spectrum = np.fft.rfft2(generator.normal(size=(3, height, width))) / frequencies
    pixels = np.fft.irfft2(spectrum, (height, width)).transpose(1, 2, 0)
    return (pixels / pixels.std() * 55 + 118).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "FASTMERGE_BENCH_DATA" in os.environ:
        return Path(os.environ["FASTMERGE_BENCH_DATA"])
    image = pytest.importorskip("PIL.Image")
    root, generator = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for split, count in (("train", DISTINCT), ("val", 2)):
        (root / split / "a").mkdir(parents=True)
        for number in range(count):
            image.fromarray(photograph(generator, 375, 500)).save(root / split / "a" / f"{number:04}.jpg", quality=90)
    return root


@pytest.fixture(scope="module")
def prepared(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("prepared") / "tree"
    prepare(photographs, target, on_bad_image="skip", progress=False)
    return target


def repeated(tree: Path, root: Path, copies: int) -> Path:
    """The same files under several names each, so that a pass is long enough to be timed."""
    if copies == 1 or "FASTMERGE_BENCH_DATA" in os.environ:
        return tree
    shutil.copytree(tree, root / "tree")
    for file in list((root / "tree" / "train").rglob("*.jpg")):
        for number in range(1, copies):
            file.with_stem(f"{file.stem}-{number}").symlink_to(file)
    return root / "tree"


def reading(tree: Path, loader: str, device: str, workers: int) -> Contender:
    """A contender that reads all training images, and ends when the device has them."""
    if loader == "dali" and not dali_is_there():
        raise UnavailableError("DALI is not installed")
    augmentation = "cifar" if loader == "device" else "imagenet"
    options = {"loader": loader, "device": device, "workers": workers, "augmentation": augmentation}
    train = image_loaders(tree, BATCH[device], image_size=SIDE, on_bad_image="skip", **options).train  # type: ignore[arg-type]

    def step() -> None:
        for images, _ in train:
            assert images.device.type == device

    return Contender(step, {"items": train.samples, "workers": workers})


def training(tree: Path, linked: bool) -> Contender:
    """A contender that trains the big student on as many images, which are there already."""
    batch = BATCH["cuda"]
    images = image_loaders(tree, batch, loader="torch", workers=0).train.samples
    case = Case("resnet18", batch, SIDE, "bf16", "cuda")
    one = Step(case, [big(case, linked)])

    def step() -> None:
        for _ in range(images // batch):
            one()

    return Contender(step, {"items": images // batch * batch})


CASES = [
    pytest.param("prepared", "cuda", marks=needs_gpu),
    pytest.param("photographs", "cuda", marks=needs_gpu),
    ("prepared", "cpu"),
    ("photographs", "cpu"),
]


@pytest.mark.parametrize(("files", "device"), CASES)
def bench_data(
    benchmark: BenchmarkFixture,
    files: str,
    device: str,
    effort: Effort,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    tree = repeated(request.getfixturevalue(files), tmp_path, COPIES[device])
    makers: dict[str, Callable[[], Contender]] = {
        names.DATALOADER: lambda: reading(tree, "torch", device, cores()),
        names.DATALOADER_ALONE: lambda: reading(tree, "torch", device, 0),
        names.DALI_ALONE: lambda: reading(tree, "dali", "cpu", 1),
        names.DALI: lambda: reading(tree, "dali", device, cores()),
        names.DEVICE: lambda: reading(tree, "device", device, 0),
    }
    if device == "cuda":
        del makers[names.DATALOADER_ALONE], makers[names.DALI_ALONE]
        makers |= {
            names.LINKED: lambda: training(tree, linked=True),
            names.UNLINKED: lambda: training(tree, linked=False),
        }
    case = f"data, {files} to {SIDE}px {device}"
    benchmark.group = case
    benchmark.extra_info["case"] = case
    sizes = [path.stat().st_size for path in (tree / "train").rglob("*") if path.is_file()]
    benchmark.extra_info["bytes per file"] = sum(sizes) / len(sizes)
    effort = dataclasses.replace(effort, seconds=min(SECONDS, effort.seconds))
    race(benchmark, makers, effort, device, rounds=effort.asked or ROUNDS, warmup=1, alone=1, profile=False)

"""Images for tests: trees of small files, smooth colours and some noise in several sizes and formats; and arrays of noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

MARKERS = b"\xff\xc0" * 20  # that can't be within a JPEG's pixels
SIZES = ((40, 56), (64, 48), (33, 90), (120, 41), (6, 150))  # no random crop fits into the last


def pixels(number: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """uint8 (H, W, 3), another for each number."""
    height, width = SIZES[number % len(SIZES)] if size is None else size
    generator = np.random.default_rng(number)
    y, x = np.mgrid[:height, :width] / 40
    waves = [np.sin(x * a + y * b + c) for a, b, c in generator.uniform(-3, 3, (3, 3))]
    noise = generator.normal(0, 6, (height, width, 3))
    return (np.stack(waves, 2) * 100 + 128 + noise).clip(0, 255).astype(np.uint8)


def write_tree(root: Path, suffix: str = ".jpg", **folders: int) -> Path:
    """Writes ``folders``, such as ``train_cat=3``: so many images in ``train/cat``."""
    image = pytest.importorskip("PIL.Image")
    number = 0
    for folder, count in folders.items():
        directory = root / folder.replace("_", "/")
        directory.mkdir(parents=True)
        for place in range(count):
            image.fromarray(pixels(number)).save(directory / f"{place:03}{suffix}", quality=92)
            number += 1
    return root


def noise_arrays(train: int, test: int, size: tuple[int, ...], classes: int) -> dict[str, np.ndarray]:
    """What an ``.npz`` of images holds: noise of a size (H, W) or (H, W, C), the classes one after another."""
    random, arrays = np.random.default_rng(0), {}
    for split, count in (("train", train), ("test", test)):
        arrays[f"{split}_images"] = random.integers(0, 256, (count, *size), np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % classes
    return arrays


def write_odd_images(directory: Path) -> dict[str, tuple[int, int]]:
    """Writes good images of unusual kinds; returns their names and what (height, width) they have when upright."""
    image = pytest.importorskip("PIL.Image")
    directory.mkdir(parents=True, exist_ok=True)
    colour = image.fromarray(pixels(0))
    exif = image.Exif()
    exif[0x112] = 6  # a camera held upright
    colour.save(directory / "00_rotated.jpg", exif=exif, quality=95)
    colour.convert("L").save(directory / "01_grey.jpg", quality=95)
    colour.convert("CMYK").save(directory / "02_cmyk.jpg", quality=95)
    colour.save(directory / "03_progressive.jpg", progressive=True, quality=95)
    colour.save(directory / "04.png")
    colour.convert("RGBA").save(directory / "05_transparent.png")
    colour.convert("P").save(directory / "06_palette.png")
    image.fromarray(pixels(0)[..., 0].astype(np.uint16) * 257).save(directory / "07_16bit.png")
    colour.save(directory / "08.png.jpg", format="PNG")  # named as what it is not
    colour.save(directory / "09.webp", lossless=True)
    colour.save(directory / "10_gif.jpg", format="GIF")  # DALI reads no GIF
    (directory / "11_trailing.jpg").write_bytes((directory / "01_grey.jpg").read_bytes() + b"and more")
    upright = SIZES[0]
    return {path.name: upright[::-1] if "rotated" in path.name else upright for path in sorted(directory.iterdir())}


def spoil(path: Path, how: str) -> Path:
    """Damages a JPEG file; "middle" is in the middle of its pixels."""
    whole = path.read_bytes()
    middle = (whole.find(b"\xff\xda") + len(whole)) // 2
    damaged = {
        "truncated": whole[: len(whole) // 2],
        "last byte": whole[:-1],
        "empty": b"",
        "text": b"not an image",
        "header": whole[:2] + bytes(40) + whole[42:],
        "middle": whole[:middle] + MARKERS + whole[middle + len(MARKERS) :],
    }
    path.write_bytes(damaged[how])
    return path

"""Damaged and random input for everything that reads files from elsewhere, and for the C++ extension.

``make fuzz`` gives each reader FUZZ_EXAMPLES inputs, another selection each time; the suite gives it a few, always the same.
A reader may refuse a file in its own way, or read it; it may not raise anything else, warn, or call what has no checksum whole.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fastmerge.checkpoints import Snapshots, read_snapshot
from fastmerge.compaction import compact_
from fastmerge.data.arrays import load_npz
from fastmerge.data.decoding import FORMATS, BadImageError, check_header, read_image
from fastmerge.weights import read_weights
from image_files import pixels

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "20"))
fuzzed = settings(
    max_examples=EXAMPLES,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """A file with a few bytes changed, cut off, repeated or put in; now and then something else altogether."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        how = draw(st.sampled_from(["flip", "set", "cut", "insert", "repeat", "number"]))
        if how == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "set":
            new = draw(st.binary(min_size=1, max_size=8))
            data[at : at + len(new)] = new
        elif how == "cut":
            del data[at:]
        elif how == "insert":
            data[at:at] = draw(st.binary(max_size=16))
        elif how == "repeat":
            data[at:at] = data[at : at + 64]
        else:  # lengths and offsets
            number = draw(st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1]))
            data[at : at + 8] = number.to_bytes(8, draw(st.sampled_from(["little", "big"])))
    return bytes(data) if draw(st.integers(0, 19)) else draw(st.binary(max_size=200))


def written(save: Callable[[Any], None]) -> bytes:
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()


def of_path(path: Path, save: Callable[[Path], None]) -> bytes:
    save(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)).state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@fuzzed
@given(data=st.data())
def test_weights_by_torch_save(data: st.DataObject, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    """What is in a zip has checksums: damaged weights are never taken for good ones."""
    good = written(lambda file: torch.save({"state_dict": weights, "epoch": 3}, file))
    file = tmp_path / "weights.pt"
    file.write_bytes(data.draw(damaged(good)))
    try:
        found = read_weights(file)
    except (ValueError, OSError):
        return
    assert same(found, weights)


@fuzzed
@given(data=st.data())
def test_weights_in_safetensors(data: st.DataObject, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save

    file = tmp_path / "weights.safetensors"
    file.write_bytes(data.draw(damaged(save(weights))))
    try:
        found = read_weights(file)
    except (ValueError, OSError):
        return
    assert all(isinstance(value, torch.Tensor) for value in found.values())  # the format has no checksums


@fuzzed
@given(data=st.data())
def test_checkpoints_of_runs(data: st.DataObject, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    """The one before is good, so that the run goes on, with the state of one of the two."""
    for file in tmp_path.iterdir():
        file.unlink()
    snapshots = Snapshots(tmp_path, {"seed": 1})
    for epoch in (1, 2):
        snapshots.save({"epoch": epoch, "weights": weights, "rest": [1.5, None, "text"]})
    newest = snapshots.files()[-1]
    newest.write_bytes(data.draw(damaged(newest.read_bytes())))
    try:
        read_snapshot(newest)
        is_good = True
    except ValueError:
        is_good = False
    if is_good:
        state = Snapshots(tmp_path, {"seed": 1}).load()
    else:
        with pytest.warns(UserWarning, match="going back to"):
            state = Snapshots(tmp_path, {"seed": 1}).load()
    assert state is not None
    assert state["epoch"] == 1 + is_good
    assert state["rest"] == [1.5, None, "text"]
    assert same(state["weights"], weights)


@fuzzed
@given(data=st.data(), compressed=st.booleans())
def test_arrays(data: st.DataObject, tmp_path: Path, compressed: bool) -> None:
    arrays = {
        f"{part}_images": np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3) for part in ("train", "test")
    }
    arrays |= {f"{part}_labels": np.arange(2) for part in ("train", "test")}
    good = written(lambda file: (np.savez_compressed if compressed else np.savez)(file, **arrays))
    file = tmp_path / "data.npz"
    file.write_bytes(data.draw(damaged(good)))
    try:
        found = load_npz(file)
    except (ValueError, OSError):
        return
    assert found.train_images.dtype == np.uint8
    assert found.train_images.shape[0] == len(found.train_labels)


def encoded(kind: str) -> bytes:
    from PIL import Image

    image = Image.fromarray(pixels(1, (24, 20)))
    return written(lambda file: image.save(file, format=kind))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.filterwarnings("error")
@fuzzed
@given(data=st.data())
def test_images(data: st.DataObject, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("PIL.Image")
    file = tmp_path / "image.jpg"
    file.write_bytes(data.draw(damaged(encoded(kind))))
    for read in (check_header, read_image):
        with contextlib.suppress(BadImageError):
            image = read(str(file))
            assert image is None or image.mode == "RGB"


@fuzzed
@given(data=st.data())
def test_compaction_of_any_tensor(data: st.DataObject) -> None:
    """Of any shape, order in memory and dtype it is what indexing gives; indices that are wrong change nothing."""
    shape = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    order = data.draw(st.permutations(range(len(shape))))
    dtype = data.draw(
        st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool])
    )
    values = (torch.arange(int(np.prod(shape))) % 251).to(dtype)
    tensor = values.view([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))]).clone()
    keeps = [
        torch.tensor(data.draw(st.lists(st.integers(-2, size + 1), max_size=size + 1)), dtype=torch.int64)
        for size in shape[:2]
    ]
    if data.draw(st.booleans()):  # most lists are wrong
        keeps = [keep.clamp(0, max(0, size - 1)).unique()[:size] for keep, size in zip(keeps, shape, strict=False)]
    before = tensor.clone()
    is_right = all(
        len(keep) == 0 or (keep.min() >= 0 and keep.max() < size and bool((keep.diff() > 0).all()))
        for keep, size in zip(keeps, shape, strict=False)
    )
    if is_right:
        compact_(tensor, *keeps)
        wanted = before[keeps[0]] if len(keeps) == 1 else before[keeps[0]][:, keeps[1]]
        assert torch.equal(tensor, wanted)
    else:
        with pytest.raises((ValueError, IndexError)):
            compact_(tensor, *keeps)
        assert torch.equal(tensor, before)


NUMBERS = st.sampled_from([*range(-3, 9), 2**31, 2**62, 2**63 - 1, -(2**63), 2**64])


@fuzzed
@given(
    dims=st.lists(st.tuples(NUMBERS, NUMBERS, st.none() | st.lists(NUMBERS, max_size=4)), max_size=4), itemsize=NUMBERS
)
def test_compaction_of_nonsense(dims: list[tuple[int, int, list[int] | None]], itemsize: int) -> None:
    """The extension adds up sizes and strides before it comes to the last dimension, whose index is wrong."""
    compaction = pytest.importorskip("fastmerge._compaction")
    shape, strides, keeps = zip(*dims, (1, 1, [1]), strict=True)
    with pytest.raises((ValueError, TypeError, IndexError)):
        compaction.compact(0, itemsize, list(shape), list(strides), list(keeps), 1)

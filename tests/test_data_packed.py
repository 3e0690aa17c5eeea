"""Packed trees: they hold what the tree of small images holds, read as it does, and outlive a kill."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmerge.cli import main
from fastmerge.data import packing
from fastmerge.data.augmentation import AUGMENTATIONS
from fastmerge.data.choosing import dali_is_there
from fastmerge.data.decoding import BadImageError, BadImageWarning, read_image
from fastmerge.data.loading import image_loaders
from fastmerge.data.packed import INDEX, PackedFiles, contents
from fastmerge.data.preparing import prepare
from fastmerge.data.trees import find_trees
from image_files import pixels, spoil, write_odd_images, write_tree

Image = pytest.importorskip("PIL.Image")
ROOT = Path(__file__).resolve().parent.parent
TARS = ["train-00000.tar", "train-00001.tar", "train-00002.tar", "val-00000.tar"]


@pytest.fixture(autouse=True)
def few_images_in_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "IMAGES", 4)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "from", train_ant=6, train_cat=4, val_ant=3, val_cat=1)


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("[tv]*.tar")}


def test_it_holds_the_bytes_of_the_tree_and_other_programs_can_read_them(tree: Path, tmp_path: Path) -> None:
    whole = prepare(tree, tmp_path / "tree", size=32)
    summary = prepare(tree, tmp_path / "packed", size=32, packed=True)
    assert vars(summary) == vars(whole)
    assert sorted(path.name for path in (tmp_path / "packed").iterdir()) == [INDEX, "prepared.json", *TARS]
    for ours, theirs in zip(find_trees(tmp_path / "packed"), find_trees(tmp_path / "tree"), strict=True):
        assert ours.classes == theirs.classes
        assert ours.labels.tolist() == theirs.labels.tolist()
        assert [os.path.basename(file) for file in ours.files] == [os.path.basename(file) for file in theirs.files]
        for content, file in zip(contents(list(ours.files)), theirs.files, strict=True):
            assert content.tobytes() == Path(file).read_bytes()
        assert [file.read() for file in ours.files] == [Path(file).read_bytes() for file in theirs.files]
    with tarfile.open(tmp_path / "packed" / "train-00001.tar") as tar:
        assert tar.getnames() == ["ant/004.jpg", "ant/005.jpg", "cat/000.jpg", "cat/001.jpg"]
        member = tar.extractfile("cat/000.jpg")
        assert member is not None
        assert member.read() == (tmp_path / "tree" / "train" / "cat" / "000.jpg").read_bytes()


@pytest.mark.parametrize("loader", ["torch", "device", "dali"])
def test_loaders_give_the_batches_of_the_tree(tree: Path, tmp_path: Path, loader: str) -> None:
    if loader == "dali" and not dali_is_there():
        pytest.skip("DALI is not installed")
    write_odd_images(tree / "train" / "ant")
    batches = []
    for packed in (False, True):
        prepare(tree, target := tmp_path / str(packed), size=32, packed=packed)
        augmentation = AUGMENTATIONS["small" if loader == "device" else "imagenet"]
        options = {"image_size": 24, "augmentation": augmentation, "loader": loader, "workers": 1}
        loaders = image_loaders(target, 4, seed=3, **options)
        batches.append([batch for part in (loaders.train, loaders.train, loaders.val) for batch in part])
        assert loaders.classes == 2
    assert len(batches[0]) == len(batches[1]) == 6 + 6 + 1
    for ours, theirs in zip(*batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_kill_leaves_whole_files_and_the_next_run_goes_on(tmp_path: Path) -> None:
    for split, count in (("train", 100), ("val", 3)):
        folder = tmp_path / "from" / split / "a"
        folder.mkdir(parents=True)
        for number in range(count):
            Image.fromarray(pixels(number, (300, 400))).save(folder / f"{number:03}.jpg", quality=95)
    source, target = tmp_path / "from", tmp_path / "to"
    code = "import sys, time; from fastmerge.data import packing; from fastmerge.cli import main; packing.IMAGES = 4; "
    code += "small = packing.small_jpeg; packing.small_jpeg = lambda *image: (time.sleep(0.1), small(*image))[1]; "
    code += "main(sys.argv[1:])"  # so slow that this process, on a busy machine, comes in time
    words = ["data", "prepare", str(source), str(target), "--size", "200", "--workers", "2", "--quiet", "--packed"]
    with subprocess.Popen([sys.executable, "-c", code, *words], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + 60
        while len(times(target)) < 3:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    before = times(target)
    assert 3 <= len(before) < 26
    (target / ".train-00024-half.tar").write_bytes(b"half")
    with pytest.raises(ValueError, match="is being packed, or was not finished"):
        find_trees(target)
    summary = prepare(source, target, size=200, packed=True)
    assert (summary.there, summary.resized) == (4 * len(before), 103 - 4 * len(before))
    assert {name: made for name, made in times(target).items() if name in before} == before
    assert not list(target.glob(".*"))
    train, val = find_trees(target)
    assert [read_image(file).size for file in (*train.files, *val.files)] == [(267, 200)] * 103


def test_only_what_changed_is_packed_anew(tree: Path, tmp_path: Path) -> None:
    target = tmp_path / "to"
    prepare(tree, target, size=32, packed=True)
    before = times(target)
    assert prepare(tree, target, size=32, packed=True).there == 14
    assert times(target) == before
    os.utime(tree / "train" / "cat" / "000.jpg", ns=(time.time_ns() + 10**9,) * 2)
    (target / "val-00000.tar").write_bytes((target / "val-00000.tar").read_bytes()[:700])
    summary = prepare(tree, target, size=32, packed=True)
    assert (summary.there, summary.resized + summary.copied) == (6, 8)
    assert {name for name, made in times(target).items() if made == before[name]} == {TARS[0], TARS[2]}
    for name in ("000", "001", "002"):
        (tree / "train" / "cat" / f"{name}.jpg").unlink()
    prepare(tree, target, size=32, packed=True)
    assert sorted(times(target)) == [TARS[0], TARS[1], TARS[3]]
    assert len(find_trees(target)[0].files) == 7


@pytest.mark.parametrize("kind", ["truncated", "empty", "text"])
def test_bad_images_are_named_and_left_out(tree: Path, tmp_path: Path, kind: str) -> None:
    bad, target = tree / "train" / "cat" / "002.jpg", tmp_path / "to"
    whole = bad.read_bytes()
    spoil(bad, kind)
    with pytest.raises(BadImageError, match=r"cat/002.jpg can't be read as an image"):
        prepare(tree, target, size=32, packed=True)
    assert sorted(times(target)) == TARS[:2]  # what was whole stays, and nothing half
    assert not list(target.glob(".*"))
    for _ in range(2):
        with pytest.warns(BadImageWarning, match=r"cat/002.jpg can't be read as an image"):
            summary = prepare(tree, target, size=32, on_bad_image="skip", packed=True)
        assert (list(summary.bad), summary.images) == ([str(bad)], 13)
    assert summary.there == 13
    train, _ = find_trees(target)
    assert train.labels.tolist() == [0] * 6 + [1] * 3
    assert [os.path.basename(file) for file in train.files][-3:] == ["000.jpg", "001.jpg", "003.jpg"]
    bad.write_bytes(whole)
    assert prepare(tree, target, size=32, packed=True).images == len(find_trees(target)[0].files) + 4 == 14


@pytest.mark.parametrize("loader", ["torch", "dali"])
@pytest.mark.parametrize(("begin", "count"), [(0.0, 200), (0.5, 8)])  # of the second, decoders make other pixels
def test_bytes_that_are_damaged_later_are_named(
    tree: Path, tmp_path: Path, loader: str, begin: float, count: int
) -> None:
    if loader == "dali" and not dali_is_there():
        pytest.skip("DALI is not installed")
    target = tmp_path / "to"
    prepare(tree, target, size=32, packed=True)
    file = find_trees(target)[0].files[5]
    with open(target / TARS[1], "r+b") as tar:
        tar.seek(file.offset + int(begin * file.size))
        tar.write(bytes(count))
    options = {"image_size": 24, "loader": loader, "workers": 1}
    with pytest.raises(BadImageError, match=r"train-00001.tar/ant/005.jpg can't be read as an image"):
        list(image_loaders(target, 5, **options).train)
    loaders = image_loaders(target, 5, on_bad_image="skip", **options)
    with pytest.warns(BadImageWarning, match=r"train-00001.tar/ant/005.jpg"):
        batches = list(loaders.train)
    assert sum(len(labels) for _, labels in batches) == 9
    assert list(loaders.bad_images.found) == [str(file)]


def test_an_index_without_checksums_is_read_and_gets_them(tree: Path, tmp_path: Path) -> None:
    target = tmp_path / "to"
    prepare(tree, target, size=32, packed=True)
    with np.load(target / INDEX) as index:
        whole = dict(index)
    np.savez(target / INDEX, **{name: values for name, values in whole.items() if not name.endswith("_crc")})
    files = find_trees(target)[0].files
    assert isinstance(files, PackedFiles)
    assert [file.crc for file in files] == [None] * 10
    assert (
        sum(len(labels) for _, labels in image_loaders(target, 4, image_size=24, loader="torch", workers=0).train) == 10
    )
    before = times(target)
    assert prepare(tree, target, size=32, packed=True).there == 14
    assert times(target) == before
    with np.load(target / INDEX) as index:
        assert {name: values.tolist() for name, values in index.items()} == {
            name: values.tolist() for name, values in whole.items()
        }
    assert [file.crc for file in find_trees(target)[0].files] == [zlib.crc32(file.read()) for file in files]


def test_what_changed_is_packed_anew(tree: Path, tmp_path: Path) -> None:
    """It gets its old bytes again, not a checksum of the new ones."""
    target = tmp_path / "to"
    prepare(tree, target, size=32, packed=True)
    before, made = {name: (target / name).read_bytes() for name in TARS}, times(target)
    file = find_trees(target)[0].files[5]
    with open(target / TARS[1], "r+b") as tar:
        tar.seek(file.offset + file.size // 2)
        tar.write(bytes(8))
    (target / TARS[3]).write_bytes(b"")
    summary = prepare(tree, target, size=32, packed=True)
    assert (summary.there, summary.resized + summary.copied) == (6, 8)
    assert {name: (target / name).read_bytes() for name in TARS} == before
    assert {name for name, then in times(target).items() if then == made[name]} == {TARS[0], TARS[2]}


def test_other_packings_are_refused(tree: Path, tmp_path: Path) -> None:
    target = tmp_path / "to"
    prepare(tree, target, size=32, packed=True)
    with pytest.raises(ValueError, match=r'was prepared with .*"packed": true.*, not {"size": 32, "quality": 90}'):
        prepare(tree, target, size=32)
    with pytest.raises(ValueError, match="choose another target"):
        prepare(tree, target, size=40, packed=True)
    for packed in (False, True):
        with pytest.raises(ValueError, match=r"to is packed already; prepare the tree that it was made of"):
            prepare(target, tmp_path / "again", packed=packed)
    (tree / "val" / "cat" / "000.jpg").unlink()
    with pytest.raises(ValueError, match="holds no images"):
        prepare(tree, tmp_path / "other", size=32, packed=True)
    whole = (target / INDEX).read_bytes()
    (target / INDEX).write_bytes(whole[:-300])
    with pytest.raises(ValueError, match=r"packed.npz is damaged .*; prepare the tree again"):
        find_trees(target)
    (target / INDEX).write_bytes(whole)
    (target / TARS[1]).rename(tmp_path / "away.tar")
    with pytest.raises(ValueError, match=r"train-00001.tar should have \d+ bytes and is missing"):
        find_trees(target)
    (target / TARS[1]).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"and is of 1 bytes; prepare the tree again"):
        find_trees(target)


def test_names_may_be_of_any_kind(tree: Path, tmp_path: Path) -> None:
    folder = tree / "train" / "ant" / "deeper down"
    folder.mkdir()
    for name in ("é" * 60 + ".jpg", "a\nb.jpg", os.fsdecode(b"\xff.jpg")):
        Image.fromarray(pixels(1)).save(folder / name)
    prepare(tree, tmp_path / "to", size=32, packed=True)
    train, _ = find_trees(tmp_path / "to")
    found = {os.fspath(file).partition(".tar/")[2] for file in train.files}
    assert found == {os.path.relpath(file, tree / "train") for file in find_trees(tree)[0].files}
    assert train.files[-1] == train.files[len(train.files) - 1] == train.files[-2:][-1]
    with pytest.raises(IndexError):
        train.files[len(train.files)]
    again = pickle.loads(pickle.dumps(train.files))[6]
    assert (again, again.read()) == (train.files[6], train.files[6].read())
    assert np.array_equal(contents([train.files[6], str(tree / "val" / "cat" / "000.jpg")])[0].tobytes(), again.read())


def test_the_command_packs(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "to"
    words = ["data", "prepare", str(tree), str(target), "--size", "32", "--packed"]
    assert main([*words, "--quiet"]) == 0
    assert capsys.readouterr().out.startswith(f"14 images in {target}: ")
    pytest.importorskip("tqdm")
    prepare(tree, target, size=32, packed=True, progress=True)
    assert "14/14" in capsys.readouterr().err

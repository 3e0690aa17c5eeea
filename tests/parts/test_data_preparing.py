"""Trees made small: what is written, what is left as it was, and what a kill leaves behind."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fastmerge.cli import main
from fastmerge.data import preparing
from fastmerge.data.decoding import BadImageError, BadImageWarning
from fastmerge.data.preparing import prepare
from image_files import pixels, spoil, write_odd_images, write_tree

Image = pytest.importorskip("PIL.Image")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tree(tmp_path) -> Path:
    return write_tree(tmp_path / "from", train_ant=6, train_cat=4, val_ant=3)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_images_get_small_and_keep_their_names_and_shapes(tree, tmp_path):
    summary = prepare(tree, tmp_path / "to", size=32)
    assert files(tmp_path / "to") == ["prepared.json", *files(tree)]
    small = 0
    for name in files(tree):
        with Image.open(tree / name) as before, Image.open(tmp_path / "to" / name) as after:
            assert after.format == "JPEG"
            assert min(after.size) == min(32, min(before.size))
            small += min(before.size) <= 32
            assert after.width / after.height == pytest.approx(before.width / before.height, rel=0.03)
            expected = np.asarray(before.resize(after.size, Image.Resampling.LANCZOS)).astype(int)
            assert abs(np.asarray(after) - expected).mean() < 6
    assert (summary.images, summary.there, summary.bad) == (13, 0, {})
    assert summary.copied == small > 0
    assert summary.bytes_after == sum((tmp_path / "to" / name).stat().st_size for name in files(tree))


def test_small_jpegs_are_copied_and_other_kinds_become_upright_rgb(tmp_path):
    sizes = write_odd_images(tmp_path / "from" / "train" / "a")
    summary = prepare(tmp_path / "from", tmp_path / "to", size=100)
    written = tmp_path / "to" / "train" / "a"
    assert len(files(written)) == len(sizes) == 12
    for name, size in sizes.items():
        path = written / (name if name.endswith(".jpg") else f"{name}.jpg")
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size[::-1]) == ("JPEG", "RGB", size)
            assert image.getexif().get(0x112, 1) == 1
            expected = pixels(0)[..., :1] if "16bit" in name else pixels(0)
            if "rotated" in name:
                expected = np.rot90(expected, -1)
            # A palette and a single channel are further from the original than a JPEG is.
            assert abs(np.asarray(image).mean(2) - expected.mean(2)).mean() < 15
    progressive = tmp_path / "from" / "train" / "a" / "03_progressive.jpg"
    assert (written / "03_progressive.jpg").read_bytes() == progressive.read_bytes()
    assert (summary.copied, summary.resized) == (1, 11)


def test_quality_is_that_asked_for(tree, tmp_path):
    for quality in (20, 95):
        prepare(tree, tmp_path / str(quality), size=30, quality=quality)
    name = files(tree)[0]
    low, high = ((tmp_path / str(quality) / name).stat().st_size for quality in (20, 95))
    assert low < 0.7 * high


def test_what_is_done_and_whole_is_skipped(tree, tmp_path):
    target = tmp_path / "to"
    prepare(tree, target, size=32)
    whole = {name: (target / name).read_bytes() for name in files(tree)}
    names = files(tree)
    (target / names[0]).unlink()
    (target / names[1]).write_bytes(b"")
    (target / names[2]).write_bytes(whole[names[2]][:-9])
    os.utime(tree / names[3], ns=(time.time_ns() + 10**9,) * 2)
    summary = prepare(tree, target, size=32)
    assert (summary.there, summary.resized + summary.copied) == (9, 4)
    assert {name: (target / name).read_bytes() for name in names} == whole


def test_a_kill_leaves_no_half_file_and_the_next_run_goes_on(tmp_path):
    folder = tmp_path / "from" / "train" / "a"
    folder.mkdir(parents=True)
    for number in range(200):
        Image.fromarray(pixels(number, (150, 200))).save(folder / f"{number:03}.jpg", quality=95)
    target = tmp_path / "to" / "train" / "a"
    code = "import sys, time; from fastmerge.data import preparing; from fastmerge.cli import main; "
    code += "small = preparing.small_jpeg; preparing.small_jpeg = lambda *image: (time.sleep(0.1), small(*image))[1]; "
    code += "main(sys.argv[1:])"  # so slow that this process, on a busy machine, comes in time
    command = [sys.executable, "-c", code, "data", "prepare", str(tmp_path / "from"), str(tmp_path / "to")]
    command += ["--size", "100", "--workers", "2", "--quiet"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + 60
        while len(list(target.glob("*.jpg"))) < 3:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    done = sorted(target.glob("*.jpg"))
    assert 3 <= len(done) < 200
    for path in done:
        with Image.open(path) as image:
            image.load()
    (target / ".199.jpg.partial").write_bytes(b"half")
    before = {path: path.stat().st_mtime_ns for path in done}
    summary = prepare(tmp_path / "from", tmp_path / "to", size=100)
    assert (summary.there, summary.resized) == (len(done), 200 - len(done))
    assert len(files(target)) == 200  # nothing half is left
    assert {path: path.stat().st_mtime_ns for path in done} == before


def test_a_file_that_could_not_be_written_is_not_there(tree, tmp_path, monkeypatch):
    def half(file: str, partial: str, size: int, quality: int) -> bool:
        Path(partial).write_bytes(b"\xff\xd8 half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(preparing, "_write", half)
    with pytest.raises(OSError, match="No space left"):
        prepare(tree, tmp_path / "to", size=32)
    assert files(tmp_path / "to") == ["prepared.json"]
    monkeypatch.undo()
    assert prepare(tree, tmp_path / "to", size=32).there == 0


@pytest.mark.parametrize("kind", ["truncated", "last byte", "empty", "text", "header"])
def test_bad_images_are_named(tree, tmp_path, kind):
    bad = spoil(tree / "train" / "cat" / "002.jpg", kind)
    with pytest.raises(BadImageError, match=r"cat/002.jpg can't be read as an image"):
        prepare(tree, tmp_path / "to", size=32)
    with pytest.warns(BadImageWarning, match=r"cat/002.jpg can't be read as an image"):
        summary = prepare(tree, tmp_path / "to", size=32, on_bad_image="skip")
    assert list(summary.bad) == [str(bad)]
    assert summary.images == 12
    there = {name for name in files(tree) if tree / name != bad}
    assert set(files(tmp_path / "to")) == there | {"prepared.json"}


def test_what_does_not_work_is_refused(tree, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no directory .*nowhere"):
        prepare(tmp_path / "nowhere", tmp_path / "to")
    for target in (tree, tree / "small", tmp_path):
        with pytest.raises(ValueError, match="a target outside the source"):
            prepare(tree, target)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no images"):
        prepare(tmp_path / "empty", tmp_path / "to")
    for options in ({"size": 0}, {"quality": 101}, {"workers": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}={next(iter(options.values()))}"):
            prepare(tree, tmp_path / "to", **options)
    Image.new("RGB", (9, 9)).save(tree / "val" / "ant" / "x.png")
    Image.new("RGB", (9, 9)).save(tree / "val" / "ant" / "x.png.jpg")
    with pytest.raises(ValueError, match=r"x.png and .*x.png.jpg would both become"):
        prepare(tree, tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_a_target_belongs_to_one_process_and_one_size(tree, tmp_path):
    target = tmp_path / "to"
    prepare(tree, target, size=32)
    with pytest.raises(ValueError, match=r"to was prepared with size 32, not 48; choose another target"):
        prepare(tree, target, size=48)
    other = shutil.copytree(tree, tmp_path / "other")  # images of the same names
    (other / preparing.RECORD).write_text("another program's")
    with pytest.raises(ValueError, match=rf"to was prepared with source {tree}, not {other}; choose another target"):
        prepare(other, target, size=32)
    with (target / preparing.RECORD).open() as record:
        fcntl.flock(record, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="being prepared by another process"):
            prepare(tree, target, size=32)
    assert json.loads((target / preparing.RECORD).read_text()) == {"source": str(tree), "size": 32, "quality": 90}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder)}


def test_source_and_target_exchanged_are_refused(tree, tmp_path, capsys):
    """What stands in the second place may be somebody's originals."""
    small = tmp_path / "to"
    prepare(tree, small, size=32)
    before = contents(shutil.copytree(tree, tmp_path / "copy"))
    assert main(["data", "prepare", str(small), str(tree), "--size", "24"]) == 2
    assert "source and target are the wrong way round" in capsys.readouterr().err
    prepare(small, tmp_path / "smaller", size=24)  # what is prepared may be a source
    assert main(["data", "prepare", str(tmp_path / "smaller"), str(tree)]) == 2
    assert f"{tree} holds files that were not prepared (train, val)" in capsys.readouterr().err
    shutil.rmtree(tree)
    with pytest.raises(ValueError, match=r"to was prepared from .*from; source and target are the wrong way round"):
        prepare(small, tree, size=24)
    assert not tree.exists()
    shutil.copytree(tmp_path / "copy", tree)
    assert contents(tree) == before


@pytest.mark.parametrize("record", [None, ""])
def test_nothing_is_touched_in_a_folder_of_others(tree, tmp_path, record):
    target = tmp_path / "to"
    (target / "train" / "ant").mkdir(parents=True)
    for name in ("train-00001.tar", "train/ant/000.jpg", "train/ant/.000.jpg.partial", ".val-x.tar"):
        (target / name).write_bytes(b"mine")
    if record is not None:
        (target / preparing.RECORD).write_text(record)
    before = contents(target)
    with pytest.raises(
        ValueError, match=r"to holds files that were not prepared \(\.val-x\.tar, train, train-00001.tar"
    ):
        prepare(tree, target, size=32)
    assert contents(target) == before


@pytest.mark.parametrize("target", ["to", "."])
def test_only_own_partial_files_are_removed(tree, tmp_path, monkeypatch, target):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    prepare(tree, target, size=32)
    own, others = (Path(target, "train", "ant", name) for name in (".000.jpg.partial", ".mine.jpg.partial"))
    own.write_bytes(b"half")
    others.write_bytes(b"mine")
    assert prepare(tree, target, size=32).there == 13
    assert not own.exists()
    assert others.read_bytes() == b"mine"


def test_what_changed_in_the_source_is_done_again(tree, tmp_path):
    """Also where the new image is dated before the old one, as restored files and those of archives are."""
    target, name = tmp_path / "to", "train/ant/000.jpg"
    prepare(tree, target, size=32)
    before = (target / name).read_bytes()
    (tree / name).write_bytes((tree / "train/ant/001.jpg").read_bytes())
    os.utime(tree / name, (10**9, 10**9))
    (tree / "val/ant/001.jpg").unlink()
    with pytest.warns(
        UserWarning, match=r"to holds 1 images that .*from does not have, and they stay: .*val/ant/001.jpg"
    ):
        summary = prepare(tree, target, size=32)
    assert (summary.there, summary.resized + summary.copied) == (11, 1)
    assert summary.stale == [str(target / "val/ant/001.jpg")]
    assert (target / name).read_bytes() == (target / "train/ant/001.jpg").read_bytes() != before


def test_a_damaged_record_is_named(tree, tmp_path):
    (tmp_path / "to").mkdir()
    for text, reason in (('{"size": 3', "Expecting "), ("[1]", "it holds a list")):
        (tmp_path / "to" / preparing.RECORD).write_text(text)
        with pytest.raises(
            ValueError, match=rf"to/prepared.json is damaged \({reason}.*; prepare into an empty folder"
        ):
            prepare(tree, tmp_path / "to", size=32)


@pytest.mark.filterwarnings("always::fastmerge.data.decoding.BadImageWarning")  # the command prints them
def test_the_command_tells_what_came_of_it(tree, tmp_path, capsys):
    spoil(tree / "val" / "ant" / "001.jpg", "truncated")
    command = ["data", "prepare", str(tree), str(tmp_path / "to"), "--size", "32", "--workers", "1"]
    assert main(command) == 2
    assert "ant/001.jpg can't be read as an image" in capsys.readouterr().err
    assert main([*command, "--on-bad-image", "skip"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"12 images in {tmp_path / 'to'}: ")
    assert "1 files can't be read as images and are left out:\n" in printed.out
    assert "val/ant/001.jpg: " in printed.out
    assert "fastmerge: warning: " in printed.err
    assert main([*command, "--on-bad-image", "skip"]) == 0
    assert "0 resized, 0 copied as they were, 12 there already" in capsys.readouterr().out


def test_a_bar_shows_how_far_it_is(tree, tmp_path, capsys):
    pytest.importorskip("tqdm")
    prepare(tree, tmp_path / "to", size=32, progress=True)
    assert "13/13" in capsys.readouterr().err
    prepare(tree, tmp_path / "to", size=32, progress=False)
    assert capsys.readouterr().err == ""

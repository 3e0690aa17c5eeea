"""``fastmerge data check``: what it says of whole and of damaged data, and its exit status."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fastmerge.cli import main
from image_files import pixels, spoil, write_odd_images, write_tree

Image = pytest.importorskip("PIL.Image")
ROOT = Path(__file__).resolve().parents[2]
GOOD = r"{} images, decoded whole in \d+\.\d s(, \d+ images/s)?: all can be read\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = write_tree(tmp_path / "tree", train_ant=6, train_cat=4, val_ant=3, val_cat=2)
    for split in ("train", "val"):
        write_odd_images(root / split / "odd")
    return root


def test_good_images_of_every_kind_pass(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(tree), "--workers", "2"]) == 0
    printed = capsys.readouterr()
    assert re.fullmatch(GOOD.format(15 + 24), printed.out)
    assert printed.err == ""


def test_each_bad_file_has_a_line_with_the_reason(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    middle = spoil(tree / "train" / "ant" / "002.jpg", "middle")
    short = spoil(tree / "val" / "cat" / "001.jpg", "truncated")
    png = tree / "train" / "odd" / "05_transparent.png"
    png.write_bytes(png.read_bytes()[:-500])
    strange = tree / "train" / "cat" / os.fsdecode(b"a\n\xff.jpg")
    strange.write_bytes(b"")
    assert main(["data", "check", str(tree), "--quiet"]) == 1
    *lines, total = capsys.readouterr().out.splitlines()
    starts = [
        f"{middle}: broken data stream",
        f"{tree}/train/cat/a\\n\\udcff.jpg: it is empty",
        f"{png}: ",
        f"{short}: ",
    ]
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True)), lines
    assert all(len(line) > len(start) + 5 for line, start in zip(lines[2:], starts[2:], strict=True))
    assert re.fullmatch(r"40 images, decoded whole in .*: 4 can't be read", total)


@pytest.mark.parametrize(
    ("suffix", "damage", "status"),
    [
        (".png", "bit", 1),
        (".png", "end", 1),
        (".webp", "end", 1),
        (".bmp", "end", 1),
        (".bmp", "bit", 0),  # docs/data.md says what can't be found
        (".ppm", "end", 1),
        (".tif", "end", 1),
    ],
)
def test_damage_by_format(suffix: str, damage: str, status: int, tmp_path: Path, capsys) -> None:
    tree = write_tree(tmp_path / "tree", suffix, train_ant=2, val_ant=1)
    file = tree / "val" / "ant" / f"000{suffix}"
    whole = file.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]
    file.write_bytes(whole[:-50] if damage == "end" else flipped)
    assert main(["data", "check", str(tree), "--workers", "1"]) == status
    printed = capsys.readouterr().out
    assert printed.startswith(f"{file}: ") if status else re.fullmatch(GOOD.format(3), printed)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_read(save, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, labels = tmp_path / "x.npz", np.arange(5)
    images = np.stack([pixels(number, (20, 20)) for number in range(5)])
    save(file, train_images=images, train_labels=labels, test_images=images[:2], test_labels=labels[:2])
    assert main(["data", "check", str(file)]) == 0
    assert re.fullmatch(GOOD.format(7), capsys.readouterr().out)
    whole = file.read_bytes()
    for damaged in (whole[:3000] + bytes(100) + whole[3100:], whole[:-40], whole[:20] + b"x" * 20 + whole[40:], b"no"):
        file.write_bytes(damaged)
        assert main(["data", "check", str(file)]) == 1
        line, total = capsys.readouterr().out.splitlines()
        assert re.match(rf"{file}: (can't be read: .|is no .npz file)", line)
        assert total.endswith(": 1 can't be read")


def test_cifar_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test"):
        content = {"data": np.zeros((3, 3072), np.uint8), "fine_labels": [0, 1, 2]}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    assert main(["data", "check", str(tmp_path)]) == 0
    assert "CIFAR's files have no checksums" in capsys.readouterr().out
    (folder / "test").write_bytes((folder / "test").read_bytes()[:-30])
    assert main(["data", "check", str(tmp_path)]) == 1
    assert capsys.readouterr().out.startswith(f"{tmp_path}: {folder}/test can't be read as a file of CIFAR: ")


def test_what_is_no_data_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train").mkdir()
    for path, message in ((tmp_path / "nowhere", "there is no file"), (tmp_path, "there is no .*val; a tree needs")):
        assert main(["data", "check", str(path)]) == 2
        printed = capsys.readouterr()
        assert re.search(message, printed.err)
        assert printed.out == ""


def test_an_interrupt_leaves_what_was_found(tmp_path: Path) -> None:
    """Ctrl-C ends it within moments; the files that it came by have been named."""
    tree = write_tree(tmp_path / "tree", train_ant=1, val_ant=1)
    large = tree / "train" / "ant" / "large.jpg"
    Image.fromarray(pixels(1, (1500, 1500))).save(large, quality=95)
    for number in range(400):
        (large.parent / f"m{number:03}.jpg").hardlink_to(large)
    spoil(tree / "train" / "ant" / "000.jpg", "middle")
    command = [sys.executable, "-m", "fastmerge", "data", "check", str(tree), "--workers", "1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        rest, error = process.communicate(timeout=60)
        assert time.monotonic() - started < 5
    assert "000.jpg: broken data stream" in line
    assert rest == "not finished; 1 of the images so far can't be read\n"
    assert error == "fastmerge: interrupted\n"
    assert process.returncode == 130


def test_a_bar_shows_how_far_it_is(tree: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    spoil(tree / "train" / "ant" / "002.jpg", "middle")
    assert main(["data", "check", str(tree)]) == 1
    printed = capsys.readouterr()
    assert "39/39" in printed.err
    assert "img/s" in printed.err
    assert printed.out.startswith(f"{tree}/train/ant/002.jpg: ")

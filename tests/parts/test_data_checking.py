"""What a look at the headers of all images finds, and what it leaves alone."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmerge.data import decoding, preparing
from fastmerge.data.decoding import BadImageError, bad_files
from fastmerge.data.preparing import check_images
from image_files import spoil, write_odd_images, write_tree

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "tree", train_ant=70, train_cat=6, val_ant=4, val_cat=5)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", ["truncated", "last byte", "empty", "text", "header"])
def test_each_kind_of_damage_is_found_by_name(tree: Path, split: str, kind: str) -> None:
    file = spoil(tree / split / "ant" / "003.jpg", kind)
    with pytest.raises(BadImageError, match=rf"{split}/ant/003.jpg can't be read as an image: .*; on_bad_image='skip'"):
        check_images(tree)
    found = check_images(tree, "skip")
    assert found is not None
    assert found.bad == bad_files([str(file)])
    assert found.files == 85


def test_all_are_named_and_counted(tree: Path) -> None:
    files = [spoil(tree / "train" / "ant" / f"{number:03}.jpg", "empty") for number in range(22)]
    some = ", ".join(str(file) for file in files[1:20])
    with pytest.raises(BadImageError, match=r"000.jpg .*: it is empty, and 21 more of 85 images can't: ") as error:
        check_images(tree)
    assert f" can't: {some}, ...; on_bad_image='skip' leaves such files out" in str(error.value)
    found = check_images(tree, "skip")
    assert found is not None
    assert list(found.bad) == [str(file) for file in files]
    lines = str(found).splitlines()
    assert re.fullmatch(
        r"85 images, headers read in \d+\.\d s, \d+ images/s: 22 can't be read and are left out:", lines[0]
    )
    assert lines[1] == f"  {files[0]}: it is empty"
    assert lines[-1] == "  and 2 more"
    assert len(lines) == 22


def test_good_images_of_every_kind_are_let_through_without_decoding(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_odd_images(tree / "train" / "odd")
    write_odd_images(tree / "val" / "odd")
    decoded = []
    read = decoding.read_image

    def spy(file: str) -> Any:
        decoded.append(Path(file).name)
        return read(file)

    monkeypatch.setattr(decoding, "read_image", spy)
    told: list[tuple[int, int]] = []
    found = check_images(tree, tell=lambda done, total, bad: told.append((done, total)))
    assert found is not None
    assert re.fullmatch(r"109 images, headers read in .* s, \d+ images/s: all can be read", str(found))
    assert told == [(64, 109), (88, 109), (109, 109)]
    assert decoded == ["11_trailing.jpg"] * 2


def test_decoding_finds_damage_in_the_middle(tree: Path, every_kind: list[Path]) -> None:
    """What headers and ends don't tell."""
    files = [spoil(tree / split / "ant" / "002.jpg", "middle") for split in ("train", "val")]
    assert check_images(tree, "skip").bad.keys().isdisjoint(map(str, files))
    told: list[tuple[int, int, dict[str, str]]] = []
    found = check_images(tree, "skip", lambda *values: told.append(values), "whole", workers=2)
    assert found is not None
    assert found.bad == bad_files([str(file) for file in [*every_kind, *files]])
    assert sorted(found.bad) == sorted(map(str, [*every_kind, *files]))
    assert told[-1][:2] == (109, 109)
    assert {file: reason for _, _, bad in told for file, reason in bad.items()} == found.bad
    text = (
        r"109 images, decoded whole in \d+\.\d s, \d+ images/s: 7 can't be read and are left out, but for damaged JPEGs"
    )
    assert re.match(text, str(found))
    with pytest.raises(
        BadImageError, match=r"train/.*, and 6 more of 109 images can't: .*val/ant/002.jpg, .*04.png; on_bad"
    ):
        check_images(tree, check="whole")


@pytest.fixture
def every_kind(tree: Path) -> list[Path]:
    """Damaged files of each kind, a PNG among them, beside good ones of each kind."""
    write_odd_images(tree / "train" / "odd")
    write_odd_images(tree / "val" / "odd")
    kinds = ["truncated", "last byte", "empty", "text"]
    files = [spoil(tree / "train" / "cat" / f"00{number}.jpg", kind) for number, kind in enumerate(kinds)]
    png = tree / "val" / "odd" / "04.png"
    png.write_bytes(png.read_bytes()[:-1000])
    return [*files, png]


def test_without_pillow_nothing_is_decoded(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="decoding images needs Pillow: pip install pillow"):
        check_images(tree, check="whole")


def test_arrays_are_read_anyway(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros(1))
    assert check_images(tmp_path / "x.npz") is None


def test_without_pillow_it_says_so(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing.importlib.util, "find_spec", lambda name: None)
    found = check_images(tree)
    assert str(found) == "85 images, whose headers were not read: that needs Pillow (pip install pillow)"


def test_an_interrupt_ends_it_at_once(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C during a look at a million files does not wait for the rest."""
    looked: list[str] = []
    monkeypatch.setattr(preparing, "_CHUNK", 1)
    monkeypatch.setattr(preparing, "_THREADS", 1)
    monkeypatch.setattr(preparing, "cores", lambda: 1)

    def interrupt(done: int, total: int, bad: dict[str, str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(preparing, "_DECODED", 1)
    for check, name in (("headers", "check_header"), ("whole", "read_image")):
        looked.clear()
        monkeypatch.setattr(preparing, name, slow(looked))
        with pytest.raises(KeyboardInterrupt):
            check_images(tree, tell=interrupt, check=check)
        assert len(looked) < 10


def slow(looked: list[str]) -> Any:
    def check(file: str) -> None:
        looked.append(file)
        time.sleep(0.02)

    return check

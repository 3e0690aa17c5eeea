"""Files that can't be read: always named, and left out where that was asked for."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fastmerge.cli import main
from fastmerge.data.augmentation import Augmentation
from fastmerge.data.decoding import BadImageError, BadImageWarning, read_image
from fastmerge.data.loading import image_loaders
from fastmerge.data.trees import load_folder
from fastmerge.experiments.recipes import RECIPES, resnet18_imagewoof
from image_files import pixels, spoil, write_odd_images, write_tree

pytest.importorskip("PIL")
KINDS = ["truncated", "last byte", "empty", "text", "header"]


@pytest.fixture
def tree(tmp_path) -> Path:
    return write_tree(tmp_path, train_ant=11, train_cat=11, val_ant=10, val_cat=9)


@pytest.fixture(params=["dali", "torch", "torch with workers"])
def loader(request) -> str:
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return request.param


def make(tree: Path, loader: str, on_bad_image: str = "skip", batch_size: int = 4, **options):
    workers = {"dali": 1, "device": 0, "torch": 0, "torch with workers": 2}[loader]
    options = {"image_size": 16, "augmentation": "imagenet", "workers": workers} | options
    return image_loaders(tree, batch_size, loader=loader.split()[0], on_bad_image=on_bad_image, **options)


def labels(loader) -> list[int]:
    return [label for _, targets in loader for label in targets.tolist()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_image_stops_the_run_by_name(tree, loader, kind):
    spoil(tree / "val" / "ant" / "006.jpg", kind)
    val = make(tree, loader, "raise").val
    batches = iter(val)
    next(batches)  # what comes before it is read
    with pytest.raises(BadImageError, match=r"val/ant/006.jpg can't be read as an image: .*on_bad_image='skip'"):
        list(batches)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_image_is_left_out_with_a_warning_once(tree, loader, kind):
    bad = str(spoil(tree / "val" / "ant" / "006.jpg", kind))
    clean = make(tree, loader, "raise", batch_size=1)
    loaders = make(tree, loader)
    with pytest.warns(BadImageWarning, match=r"ant/006.jpg can't be read as an image and is left out: ") as caught:
        images, targets = zip(*loaders.val, strict=True)
    assert len(caught) == 1
    assert torch.cat(targets).tolist() == [0] * 9 + [1] * 9
    assert list(loaders.bad_images.found) == [bad]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = torch.cat([images for images, _ in loaders.val])  # nothing new is found in the next pass
    assert torch.equal(torch.cat(images), again)
    # The images around it are what they are without it.
    clean_images = []
    with pytest.raises(BadImageError):
        clean_images.extend(image for image, _ in clean.val)
    assert torch.equal(again[:6], torch.cat([image for image, _ in _until_bad(clean.val)]))


def _until_bad(loader):
    try:
        yield from loader
    except BadImageError:
        return


def test_training_goes_on_around_bad_images(tree, loader):
    bad = [spoil(tree / "train" / "cat" / f"{number:03}.jpg", kind) for number, kind in enumerate(KINDS)]
    train = make(tree, loader, batch_size=11).train  # of which more than one is left each time
    with pytest.warns(BadImageWarning) as caught:
        seen = [labels(train) for _ in range(3)]
    assert len(caught) == len(bad)
    assert [sorted(epoch) for epoch in seen] == [[0] * 11 + [1] * 6] * 3
    assert seen[0] != seen[1]


def test_a_jpeg_cut_short_is_found_wherever_the_crop_lies(tree, loader):
    # A decoder that needs the upper part alone would not come to where the file ends.
    image = pytest.importorskip("PIL.Image")
    file = tree / "train" / "ant" / "003.jpg"
    image.fromarray(pixels(3, (400, 400))).save(file, quality=95)
    file.write_bytes(file.read_bytes()[:-400])
    for epoch in range(4):
        train = make(tree, loader, augmentation=Augmentation(scale=(0.01, 0.02))).train
        train.set_epoch(epoch)
        with pytest.warns(BadImageWarning, match=r"003.jpg can't be read as an image"):
            assert sorted(labels(train)) == [0] * 10 + [1] * 11


def test_a_batch_of_bad_images_alone_is_left_out(tree, loader):
    for number in range(4, 8):
        spoil(tree / "val" / "ant" / f"{number:03}.jpg", "truncated")
    loaders = make(tree, loader)
    with pytest.warns(BadImageWarning):
        assert [len(targets) for _, targets in loaders.val] == [4, 4, 4, 3]


@pytest.mark.parametrize("name", ["dali", "torch", "device"])
def test_a_single_image_that_is_left_of_a_batch_is_not_trained_on(tree, name):
    """BatchNorm could not; to score it is another matter."""
    if name == "dali":
        pytest.importorskip("nvidia.dali")
    for split, number in (("train", 0), ("val", 0)):
        spoil(tree / split / "ant" / f"{number:03}.jpg", "text")

    def sizes() -> list[list[int]]:
        loaders = make(tree, name, augmentation="small", image_size=8, batch_size=2)
        of_two = loaders.again(2, 0, 0, 2)  # processes, which meet in every step
        return [
            [len(targets) for _, targets in each] for each in (loaders.train, loaders.val, of_two.train, of_two.train)
        ]

    with pytest.warns(BadImageWarning):
        train, val, *of_two = sizes()
    assert train == [2] * 10
    assert val == [1, *[2] * 8, 1]
    assert [len(each) for each in of_two] == [5, 5]
    assert any(1 in each for each in of_two)


def test_a_step_that_other_ranks_wait_for_is_not_left_out(tree, loader):
    for file in (tree / "train").rglob("*.jpg"):
        spoil(file, "text")
    train = make(tree, loader, shards=2).train
    with (
        pytest.warns(BadImageWarning),
        pytest.raises(ValueError, match="with several processes each needs one in every step"),
    ):
        list(train)


def test_a_bad_file_under_way_when_a_pass_is_broken_off(tree, loader):
    spoil(tree / "val" / "ant" / "006.jpg", "text")
    val = make(tree, loader).val
    next(iter(val))
    with pytest.warns(BadImageWarning):
        assert len(labels(val)) == 18


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 images to train on, grey, CMYK and PNG ones among them, of which one is cut short and one damaged."""
    image = pytest.importorskip("PIL.Image")
    root = tmp_path_factory.mktemp("thousand")
    write_tree(root, train_ant=1, train_cat=1, val_ant=2, val_cat=2)
    small = image.fromarray(pixels(7, (24, 20)))
    kinds = {".jpg": small, "-grey.jpg": small.convert("L"), "-cmyk.jpg": small.convert("CMYK"), ".png": small}
    for number in range(998):
        suffix = list(kinds)[1 + number // 100 % 3 if number % 100 == 50 else 0]
        kinds[suffix].save(root / "train" / "ant" / f"{number + 1:04}{suffix}")
    spoil(root / "train" / "ant" / "0123.jpg", "truncated")
    spoil(root / "train" / "ant" / "0777.jpg", "header")
    return root


BAD = ["train/ant/0123.jpg", "train/ant/0777.jpg"]


def test_a_thousand_images_with_two_bad_ones(thousand, loader):
    train = make(thousand, loader, "raise", batch_size=64).train
    with pytest.raises(BadImageError, match=r"train/ant/(0123|0777).jpg can't be read as an image"):
        list(train)
    loaders = make(thousand, loader, batch_size=64)
    with pytest.warns(BadImageWarning) as caught:
        batches = list(loaders.train)
    assert len(caught) == 2
    assert sum(len(targets) for _, targets in batches) == 998
    assert all(images.isfinite().all() for images, _ in batches)
    assert sorted(loaders.bad_images.found) == [str(thousand / name) for name in BAD]


@pytest.mark.filterwarnings("always::fastmerge.data.decoding.BadImageWarning")  # the command prints them
@pytest.mark.filterwarnings("ignore:.*P.g>0.:UserWarning")
def test_a_run_says_which_file_and_stops_or_goes_on(thousand, loader, tmp_path, monkeypatch, capsys):
    def network(classes: int, width: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4 * width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes)
        )

    recipe = replace(resnet18_imagewoof(), make_network=network, image_size=16, batch_size=250, held_out=0.001)
    monkeypatch.setitem(RECIPES, recipe.name, lambda: recipe)
    workers = ["--loader", loader.split()[0], "--workers", "2" if "workers" in loader else "1"]
    words = [
        "run",
        recipe.name,
        "--data",
        str(thousand),
        "--strategy",
        "one",
        "--replicates",
        "1",
        "--budget",
        "1e-6",
        *workers,
    ]
    assert main([*words, "--out", str(tmp_path / "stops"), "--on-bad-image", "raise"]) == 2
    error = capsys.readouterr().err
    assert any(f"{thousand / name} can't be read as an image: " in error for name in BAD)
    assert "on_bad_image='skip' leaves such files out" in error
    assert main([*words, "--out", str(tmp_path / "goes on"), "--on-bad-image", "skip"]) == 0
    error = capsys.readouterr().err
    assert f"loader {loader.split()[0]}: 1004 image files are decoded" in error
    assert all(f"{thousand / name} can't be read as an image and is left out: " in error for name in BAD)
    results = json.loads((tmp_path / "goes on" / "results.json").read_text())
    assert list(results["left_out"]) == [str(thousand / name) for name in BAD]
    assert "- images_left_out: 2" in (tmp_path / "goes on" / "report.md").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_trees_decoded_at_once(tree, kind):
    spoil(tree / "val" / "ant" / "006.jpg", kind)
    with pytest.raises(BadImageError, match=r"ant/006.jpg can't be read"):
        load_folder(tree, 8)
    with pytest.warns(BadImageWarning, match=r"ant/006.jpg can't be read"):
        arrays = load_folder(tree, 8, on_bad_image="skip")
    assert arrays.test_labels.tolist() == [0] * 9 + [1] * 9
    with pytest.warns(BadImageWarning):
        device = image_loaders(tree, 4, image_size=8, augmentation="small", loader="device", on_bad_image="skip")
    assert labels(device.val) == [0] * 9 + [1] * 9


def test_loaders_leave_the_same_images_out_of_the_same_batches(tree):
    bad = [spoil(tree / "train" / "cat" / f"{number:03}.jpg", "text") for number in (2, 3, 7)]

    def two_epochs(loader: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        train = make(tree, loader, augmentation="small", image_size=8).train
        return [batch for _ in range(2) for batch in train]

    found = {}
    for loader in ("device", "torch"):
        with pytest.warns(BadImageWarning) as caught:
            found[loader] = two_epochs(loader)
        assert len(caught) == len(bad)
    assert [len(targets) for _, targets in found["torch"]] != [4] * 10
    for (images, targets), (theirs, same) in zip(found["device"], found["torch"], strict=True):
        assert torch.equal(images, theirs)
        assert torch.equal(targets, same)


def test_batches_of_bad_images_alone_on_the_device(tree):
    for number in range(4, 8):
        spoil(tree / "val" / "ant" / f"{number:03}.jpg", "text")
    for file in (tree / "train").rglob("*.jpg"):
        spoil(file, "text")
    with pytest.warns(BadImageWarning):
        loaders = make(tree, "device", augmentation="small", image_size=8)
    assert [len(targets) for _, targets in loaders.val] == [4, 4, 4, 3]
    assert list(loaders.train) == []
    with pytest.raises(ValueError, match="with several processes each needs one in every step"):
        list(loaders.again(4, 0, 0, 2).train)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("text", "its content is none of JPEG, PNG, "),
        ("truncated", "truncated"),
        ("empty", "it is empty"),
    ],
)
def test_reasons_say_what_is_wrong(tree, kind, reason):
    with pytest.raises(BadImageError, match=f"001.jpg can't be read as an image: .*{reason}") as error:
        read_image(str(spoil(tree / "val" / "ant" / "001.jpg", kind)))
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)  # it may come from another process


@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")
def test_loaders_refuse_the_same_images(tmp_path, monkeypatch):
    """Of formats that are not promised, of numbers of unknown range, and of more pixels than Pillow takes for honest."""
    image = pytest.importorskip("PIL.Image")
    tree = write_tree(tmp_path, ".png", train_ant=3, val_ant=10)
    monkeypatch.setattr(image, "MAX_IMAGE_PIXELS", 2000)
    colour = image.fromarray(pixels(0))
    colour.save(tree / "val" / "ant" / "001.jpg", format="JPEG2000")
    image.fromarray(pixels(0)[..., 0].astype("float32") / 255).save(tree / "val" / "ant" / "002.tif")
    large = pixels(1, (50, 81))
    image.fromarray(large[:, :80]).save(tree / "val" / "ant" / "largest.png")
    image.fromarray(large).save(tree / "val" / "ant" / "too large.png")
    expected = ["000.png", "001.jpg", "002.tif", "005.png", "too large.png"]  # two of the tree's have 120 x 41 pixels
    found = {}
    for loader in ("torch", "device", "dali"):
        if loader == "dali":
            pytest.importorskip("nvidia.dali")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BadImageWarning)
            loaders = make(tree, loader, augmentation="none")
            assert len(labels(loaders.val)) == 14 - len(expected)
        found[loader] = loaders.bad_images.found
        assert sorted(os.path.basename(file) for file in found[loader]) == expected
        assert found[loader] == found["torch"]
    monkeypatch.undo()
    with pytest.raises(BadImageError, match=r"001.jpg can't be read as an image: its content is none of JPEG, "):
        list(make(tree, "dali", "raise", augmentation="none").val)


def test_colours_that_dali_takes_otherwise_are_converted(tmp_path):
    pytest.importorskip("nvidia.dali")
    image = pytest.importorskip("PIL.Image")
    tree = write_tree(tmp_path, ".tif", train_ant=1, val_ant=2)
    bands = image.fromarray(pixels(0)).split()
    for mode in ("LAB", "YCbCr"):
        image.merge(mode, bands).save(tree / "val" / "ant" / f"{mode}.tif")
    image.fromarray(pixels(0)).convert("CMYK").save(tree / "val" / "ant" / "CMYK.tif")
    both = [make(tree, loader, "raise", augmentation="none").val for loader in ("dali", "torch")]
    for _ in range(2):
        for (images, _), (expected, _) in zip(*both, strict=True):
            assert (images - expected).abs().max() < 0.02


EPS = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize("reader", ["check", "prepare", "dali", "device", "torch", "torch with workers"])
def test_no_image_starts_another_program(tree, tmp_path_factory, monkeypatch, capsys, reader):
    """Pillow reads EPS by starting Ghostscript, whatever a file's name says."""
    programs = tmp_path_factory.mktemp("bin")
    started = programs / "started"
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {started}\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    (tree / "val" / "ant" / "000.jpg").write_text(EPS)
    if reader == "check":
        assert main(["data", "check", str(tree)]) == 1
        assert "ant/000.jpg: its content is none of JPEG, " in capsys.readouterr().out
    elif reader == "prepare":
        assert main(["data", "prepare", str(tree), str(programs / "to")]) == 2
        assert "ant/000.jpg can't be read as an image: its content is none of " in capsys.readouterr().err
    else:
        if reader == "dali":
            pytest.importorskip("nvidia.dali")
        with pytest.raises(BadImageError, match=r"ant/000.jpg can't be read as an image: its content is none of"):
            list(make(tree, reader, "raise", augmentation="none").val)
    assert not started.exists()


def test_a_pipe_is_waited_for_by_nobody(tree, tmp_path_factory, capsys):
    pipe = tree / "val" / "ant" / "pipe.jpg"
    os.mkfifo(pipe)
    with pytest.raises(BadImageError, match=r"pipe.jpg can't be read as an image: it is no regular file"):
        read_image(str(pipe))
    for words in (["check", str(tree)], ["prepare", str(tree), str(tmp_path_factory.mktemp("to"))]):
        assert main(["data", *words]) == 2
        assert f"{pipe} is no regular file" in capsys.readouterr().err
    for loader in ("dali", "torch", "device"):
        with pytest.raises(ValueError, match=r"pipe.jpg is no regular file; a tree holds image files: remove it"):
            make(tree, loader, augmentation="none")


def test_what_dali_alone_can_not_read_is_converted_and_cleaned_up(tmp_path, monkeypatch):
    pytest.importorskip("nvidia.dali")
    write_odd_images(tmp_path / "train" / "a")
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    val = make(tmp_path, "dali", "raise", augmentation="none").val
    expected = make(tmp_path, "torch", "raise", augmentation="none").val
    for (images, _), (theirs, _) in zip(val, expected, strict=True):
        assert (images - theirs).abs().max() < 0.02
    assert len(list(tmp_path.glob("fastmerge-*/*.png"))) == 1
    del val, images
    assert not list(tmp_path.glob("fastmerge-*"))


def test_an_unreadable_file_is_a_bad_image(tree, loader):
    if os.geteuid() == 0:
        (tree / "val" / "ant" / "006.jpg").unlink()
        (tree / "val" / "ant" / "006.jpg").symlink_to("nowhere")
    else:
        (tree / "val" / "ant" / "006.jpg").chmod(0)
    with pytest.raises(BadImageError, match=r"ant/006.jpg can't be read as an image: (No such file|Permission denied)"):
        labels(make(tree, loader, "raise").val)

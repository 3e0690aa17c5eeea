"""``--dry-run``: the plan of a merge and of a recipe, and what it finds out before anything is trained."""

from __future__ import annotations

import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

import ddp_recipe
from cli_files import arguments
from fastmerge.big_student import BigStudent
from fastmerge.cli import main
from fastmerge.cli.dry_run import describe
from fastmerge.experiments.recipes import RECIPES
from fastmerge.merging.estimate import Estimate, Part
from image_files import spoil, write_tree


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folders = {"train_ant": 6, "train_cat": 6, "val_ant": 4, "val_cat": 5}
    return write_tree(tmp_path_factory.mktemp("tree"), **folders)


@pytest.fixture
def recipe(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of a dry run: teachers of 4 epochs, a merge of 2 and fine-tuning of 2; a validation every second epoch."""
    monkeypatch.setitem(RECIPES, "resnet18-imagewoof", lambda: ddp_recipe.recipe(test_every=2))
    given = ["--data", str(tree), "--out", str(tmp_path / "out"), "--replicates", "3", "--loader", "device"]
    return ["run", "resnet18-imagewoof", *given, "--dry-run"]


def table(printed: str) -> list[tuple[str, int, int]]:
    rows = [re.split(r"  +", line) for line in printed.splitlines()]
    return [(row[0], int(row[1]), int(row[2])) for row in rows if len(row) == 5 and row[1].isdigit()]


def test_a_recipe_is_planned_and_nothing_is_trained(recipe, tmp_path, capsys) -> None:
    assert main([*recipe, "--strategy", "student,bo3,one-big", "--link-at", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert table(printed) == [
        ("teachers: training", 36, 2),
        ("teachers: validation", 18, 3),
        ("student: merge, block-diagonal", 3, 2),
        ("student: merge, linked", 3, 2),
        ("student: validation of the big student", 3, 3),
        ("student: fine-tune", 6, 2),
        ("student: validation of the student", 3, 3),
        ("one-big: training", 36, 2),
        ("one-big: validation", 18, 3),
    ]
    found, hint, why = printed.splitlines()[:3]
    assert re.fullmatch(r"21 images, headers read in \d+\.\d s, \d+ images/s: all can be read", found)
    data = recipe[recipe.index("--data") + 1]
    assert hint == f"damage within files is found by: fastmerge data check {data} (or --check-images whole)"
    assert why.startswith("loader device: ")
    assert not list((tmp_path / "out").iterdir())


def test_strategies_at_equal_cost_are_planned(recipe, capsys) -> None:
    """With as many epochs as the cost leaves; what methods take beside their fine-tuning is not timed."""
    assert main([*recipe, "--strategy", "restart,cyclic-swa,distill,repair,one-cosine"]) == 0
    trained = [row[:2] for row in table(capsys.readouterr().out) if row[0].endswith(": training")]
    assert trained == [
        ("teachers: training", 24),
        ("restart: training", 12),
        ("cyclic-swa: training", 24),
        ("distill: training", 6),  # each epoch asks two teachers
        ("repair: training", 12),
        ("one-cosine: training", 108),
    ]


def test_every_image_is_looked_at(recipe, tmp_path, capsys) -> None:
    """One that no timed step comes by."""
    large = write_tree(tmp_path / "tree", train_ant=6, train_cat=6, val_ant=4, val_cat=40)
    file = spoil(large / "val" / "cat" / "039.jpg", "truncated")
    recipe[recipe.index("--data") + 1] = str(large)
    words = [*recipe, "--strategy", "one", "--loader", "torch", "--workers", "1"]
    assert main(words) == 2
    assert f"{file} can't be read as an image" in capsys.readouterr().err
    assert main([*words, "--on-bad-image", "skip"]) == 0
    printed = capsys.readouterr()
    assert re.match(rf"56 images, headers read in .*: 1 can't be read and are left out:\n  {file}: ", printed.out)


def test_every_image_is_decoded_where_that_is_asked_for(recipe, tmp_path, capsys) -> None:
    large = write_tree(tmp_path / "tree", train_ant=6, train_cat=6, val_ant=4, val_cat=40)
    recipe[recipe.index("--data") + 1] = str(large)
    words = [*recipe, "--strategy", "one", "--loader", "torch", "--workers", "1", "--check-images", "whole"]
    assert main(words) == 0
    found, why = capsys.readouterr().out.splitlines()[:2]
    assert re.fullmatch(r"56 images, decoded whole in \d+\.\d s, \d+ images/s: all can be read", found)
    assert why.startswith("loader torch: ")
    files = [spoil(large / "val" / "cat" / f"{number:03}.jpg", "middle") for number in (38, 39)]
    assert main(words[:-2]) == 0  # no timed step comes by them, and their headers are whole
    capsys.readouterr()
    assert main(words) == 2
    assert f"{files[0]} can't be read as an image: broken data" in (error := capsys.readouterr().err)
    assert f"and 1 more of 56 images can't: {files[1]}; on_bad_image='skip'" in error
    assert main([*words, "--on-bad-image", "skip"]) == 0
    printed = capsys.readouterr().out
    assert re.match(r"56 images, decoded whole in .*: 2 can't be read and are left out, but for damaged JPEGs", printed)
    assert all(f"\n  {file}: broken data stream" in printed for file in files)


def test_a_merge_looks_at_every_image_too(place, tree, tmp_path, capsys) -> None:
    copied = shutil.copytree(tree, tmp_path / "tree")
    spoil(copied / "train" / "ant" / "004.jpg", "text")
    words = arguments()
    words[words.index("--data") + 1] = str(copied)
    for more in ([], ["--check-images", "whole"]):
        assert main([*words, "--dry-run", *more]) == 2
        assert "004.jpg can't be read as an image: its content is none of" in capsys.readouterr().err


def test_a_share_of_several_processes_is_timed(recipe, capsys) -> None:
    assert main([*recipe, "--strategy", "one", "--processes", "2", "--bandwidth", "0.001", "--accumulate", "2"]) == 0
    printed = capsys.readouterr().out
    assert table(printed) == [("one: training", 36, 4), ("one: validation", 18, 5)]  # by parts of one image
    nbytes = 4 * sum(parameter.numel() for parameter in ddp_recipe.network(2, 1).parameters())
    seconds = 36 * 2 * nbytes / 1e6  # two processes send as much as there is, once per step
    assert f"up to {seconds:.2g} s more where gradients" in printed


def test_the_batch_size_is_that_of_all_processes(recipe, capsys) -> None:
    assert main([*recipe, "--strategy", "one", "--processes", "2", "--batch-size", "2"]) == 0
    assert table(capsys.readouterr().out)[0] == ("one: training", 36, 4)  # 8 images one by one, by two
    assert main([*recipe, "--processes", "2", "--batch-size", "5"]) == 2
    assert "a batch of 5 can't be shared out evenly to 2 processes" in capsys.readouterr().err


def test_messages_of_a_ring() -> None:
    part = Part("training", epochs=10, steps=100, seconds=0.5, gradients=1000)
    assert part.messages(1, 1.0) == 0
    assert part.messages(4, bandwidth=500.0, accumulate=5) == pytest.approx(10 * 20 * 1.5 * 2)
    text = describe(Estimate([part, Part("validation", 1, 10, 1.0)], kept=2**29), 4, 500.0, 5)
    assert "checkpoints take up to 0.50 GiB" in text
    assert "about 8 min with 4 processes, and up to 10 min more" in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--processes", "3"], "a batch of 4 can't be shared out evenly to 3 processes"),
        (["--data", "nowhere"], "nowhere"),
        (["--out", "taken"], "taken"),
        (["--bandwidth", "0"], "--bandwidth needs a number above 0"),
        (["--strategy", "luck"], "unknown strategy luck"),
        (["--autocast", "bfloat16", "--loader", "dali", "--device", "abacus"], "abacus"),
    ],
)
def test_what_can_not_be_is_found_out(recipe, tmp_path, monkeypatch, capsys, more, message) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("a file")
    assert main([*recipe, *more]) == 2
    assert message in capsys.readouterr().err


def test_a_disk_without_room_is_found_out(recipe, place, monkeypatch, capsys) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("fastmerge.cli.dry_run.shutil.disk_usage", lambda path: usage(9, 9, 1000))
    for words in ([*recipe, "--strategy", "student"], [*arguments(), "--dry-run"]):
        assert main(words) == 2
        assert re.search(r"checkpoints need up to \d.\d GiB in .*out, where 0.0 GiB are free", capsys.readouterr().err)


def test_room_is_for_what_a_run_keeps(recipe, tmp_path, monkeypatch) -> None:
    """Two checkpoints of each teacher, and of the merge a third, which is being written; with momentum and buffers."""
    rooms: list[int] = []
    monkeypatch.setattr("fastmerge.cli.dry_run.check_room", lambda path, needed: rooms.append(needed))
    assert main([*recipe, "--strategy", "student"]) == 0
    big = BigStudent(*(ddp_recipe.network(2, 1) for _ in range(2)), example_inputs=torch.zeros(2, 3, 16, 16))
    big.link()
    large, small = (4 * sum(p.numel() for p in net.parameters()) for net in (big, ddp_recipe.network(2, 1)))
    buffers = sum(buffer.nbytes for buffer in big.buffers())
    assert rooms == [3 * (2 * 2 * 2 * small + 3 * (2 * large + buffers))]


def test_it_is_for_one_process_and_processes_are_for_it(recipe, capsys) -> None:
    words = [word for word in recipe if word != "--dry-run"]
    assert main([*words, "--processes", "2"]) == 2
    assert "--processes needs --dry-run" in capsys.readouterr().err
    assert main([*words, "--check-images", "headers"]) == 2
    assert "--check-images needs --dry-run" in capsys.readouterr().err
    assert main(["run", "sine", "--dry-run"]) == 2
    assert "sine has its data in memory; --dry-run is only for recipes that read images" in capsys.readouterr().err


def test_a_merge_with_several_processes(place, capsys) -> None:
    assert main([*arguments(), "--dry-run", "--processes", "2"]) == 0
    printed = capsys.readouterr().out
    assert table(printed)[:2] == [("merge, block-diagonal", 1, 3), ("merge, linked", 1, 3)]  # 24 of 49 images in eights
    assert " with 2 processes, and up to " in printed
    assert re.match(
        r"cost: \d+ epochs of training one network, by counted operations \(2 of ", printed.splitlines()[-1]
    )


def test_recipes_over_loaders_train_on_the_gpu_where_there_is_one(recipe, monkeypatch) -> None:
    joined: list[str] = []

    def join(device: str) -> None:
        joined.append(device)
        raise ValueError

    monkeypatch.setattr("fastmerge.cli.torchrun.join_processes", join)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for words in (recipe, [*recipe, "--device", "cpu"], ["run", "sine"]):
        assert main(words) == 2
    assert joined == ["cuda", "cpu", "cpu"]


def test_the_bytes_that_the_docs_name() -> None:
    make = RECIPES["resnet18-imagenet"]().make_network
    teachers = [make(1000, 1) for _ in range(2)]
    big = BigStudent(*teachers, example_inputs=torch.zeros(2, 3, 64, 64))
    found = [megabytes(teachers[0]), megabytes(big)]
    big.link()
    found.append(megabytes(big))
    norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in teachers[0].modules())
    text = " ".join((Path(__file__).parents[2] / "docs" / "scaling.md").read_text().split())
    teacher, apart, linked = (f"{value:.0f} MB" for value in found)
    assert f"ResNet-18 sends {teacher} a step; the big student sends {apart} block-diagonal and {linked} linked" in text
    first, second, third = (f"{2 * value / 1e4 * 1e3:.0f}" for value in found)  # at 10 GB/s, for many processes
    assert f"that takes {first}, {second} and {third} ms" in text
    assert f"ResNet-18 has {norms} of them: {2 * norms} waits" in text


def megabytes(network: torch.nn.Module) -> float:
    return sum(parameter.nbytes for parameter in network.parameters()) / 1e6

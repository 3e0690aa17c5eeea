"""The command line in several processes: each reads its share of the images, and together they read every one once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ddp_merge
from ddp_merge import near
from fastmerge.weights import save_weights
from gloo import command, counted, together
from image_files import spoil, write_tree

pytestmark = pytest.mark.filterwarnings("ignore:.*P.g>0.:UserWarning")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine images for validation, which two processes can't share evenly."""
    folders = {"train_ant": 6, "train_cat": 6, "val_ant": 4, "val_cat": 5}
    return write_tree(tmp_path_factory.mktemp("tree"), **folders)


def words(tree: Path, out: Path, loader: str, *more: str) -> list[str]:
    teachers = [str(tree / f"{seed}.safetensors") for seed in (1, 2)]
    for seed, path in enumerate(teachers, start=1):
        save_weights(ddp_merge.coloured(seed), Path(path))
    given = ["--model", "ddp_merge:coloured", "--teachers", *teachers, "--data", str(tree), "--out", str(out)]
    given += [
        "--image-size",
        "16",
        "--augmentation",
        "cifar",
        "--loader",
        loader,
        "--workers",
        "0",
        "--batch-size",
        "4",
    ]
    return ["merge", *given, "--merge-epochs", "1", "--finetune-epochs", "1", "--seed", "0", "--quiet", *more]


@pytest.mark.parametrize(
    ("loader", "sets"), [("torch", 1), ("device", 1), pytest.param("torch", 2, marks=pytest.mark.slow)]
)
def test_every_validation_image_counts_once(tree: Path, tmp_path: Path, loader: str, sets: int) -> None:
    more = ["--heads", "concatenate", "--data", str(tree)] if sets > 1 else []
    done = together(2, counted, words(tree, tmp_path / "two", loader, *more))
    assert [done[rank][0] for rank in (0, 1)] == [0, 0], done
    assert done[1][1:3] == ("", "")
    assert done[0][1].count(f"loader {loader}: ") == 1
    *_, alone = counted(0, 1, words(tree, tmp_path / "one", loader, *more))
    assert sorted(set(alone)) == [9 * sets, 12 * sets]  # images of validation and of training, in each pass
    assert [sum(each) for each in zip(done[0][3], done[1][3], strict=True)] == alone
    two, one = (json.loads((tmp_path / out / "history.json").read_text()) for out in ("two", "one"))
    assert two["config"]["processes"] == 2
    teachers = [] if sets > 1 else ["teacher 0", "teacher 1"]  # are not scored alone where their classes differ
    for border in (*teachers, "big student, gates open"):
        assert two["borders"][border] == near(one["borders"][border]), border


def test_a_bad_image_is_named_by_the_process_that_reads_it(tree: Path, tmp_path: Path) -> None:
    broken = tmp_path / "tree"
    shutil.copytree(tree, broken)
    spoil(broken / "val" / "ant" / "001.jpg", "text")  # the second image, which is the second process's
    done = together(2, command, words(broken, tmp_path / "out", "torch"))
    assert done[1][0] == 2
    assert "val/ant/001.jpg can't be read as an image" in done[1][2]
    assert done[0][0] == 1
    assert "process 0 of 2 lost another one" in done[0][2]
    assert done[0][2].endswith(f"; go on with: fastmerge merge --out {tmp_path / 'out'} --resume\n")
    assert "go on with" not in done[1][2]


@pytest.mark.filterwarnings("always::fastmerge.data.decoding.BadImageWarning")
def test_bad_images_of_all_processes_stand_in_the_history(tree: Path, tmp_path: Path) -> None:
    broken = tmp_path / "tree"
    shutil.copytree(tree, broken)
    files = [str(spoil(broken / "val" / "ant" / f"00{number}.jpg", "text")) for number in (0, 1)]  # one of each process
    done = together(2, command, [*words(broken, tmp_path / "out", "torch"), "--on-bad-image", "skip"])
    assert [done[rank][0] for rank in (0, 1)] == [0, 0], done
    assert [f"{file} can't be read" in done[rank][2] for rank, file in enumerate(files)] == [True, True]
    history = json.loads((tmp_path / "out" / "history.json").read_text())
    assert list(history["left_out"]) == files
    assert history["config"]["images_left_out"] == 2


def test_other_bad_input_is_told_by_one_process(tree: Path, tmp_path: Path) -> None:
    done = together(2, command, [*words(tree, tmp_path / "out", "torch"), "--batch-size", "3"])
    assert [status for status, _, _ in done.values()] == [2, 2]
    assert [("can't be shared out" in done[rank][2]) for rank in (0, 1)] == [True, False]


def test_stacks_are_shared_out_with_the_same_results(tmp_path: Path) -> None:
    given = ["run", "sine", "--budget", "0.0001", "--replicates", "3", "--quiet", "--workers", "1"]
    found = []
    for size, out in ((2, tmp_path / "two"), (1, tmp_path / "one")):
        done = together(size, command, [*given, "--out", str(out)])
        assert [status for status, _, _ in done.values()] == [0] * size, done
        assert all(done[rank][1] == "" for rank in range(1, size))
        results = json.loads((out / "results.json").read_text())
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        log = [json.dumps(line | {"images_per_second": 0.0}) for line in lines]
        weights = load_file(out / "student-2.safetensors")
        found.append(({name: one["values"] for name, one in results["strategies"].items()}, sorted(log), weights))
    (values, log, weights), (expected, told, theirs) = found
    assert values == expected
    assert log == told
    assert all(torch.equal(weights[name], value) for name, value in theirs.items())

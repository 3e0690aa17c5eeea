"""Recipes over loaders by several processes: teachers one after another or side by side, and a process that dies."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import ddp_recipe
from ddp_recipe import tensors
from gloo import together
from image_files import write_tree

NEAR = {"rtol": 1e-3, "atol": 1e-5}  # float32, in another order of summation
SAME = {"rtol": 0.0, "atol": 0.0}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folders = {"train_ant": 6, "train_cat": 6, "val_ant": 4, "val_cat": 5}
    return write_tree(tmp_path_factory.mktemp("tree"), **folders)


@pytest.fixture(scope="module")
def alone(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (found,) = together(1, ddp_recipe.trained, tree, tmp_path_factory.mktemp("alone")).values()
    return found


def assert_close(found: dict[str, Any], alone: dict[str, Any], teachers: dict[str, float]) -> None:
    assert isinstance(found, dict), found
    for one, other in zip(found["teachers"], alone["teachers"], strict=True):
        torch.testing.assert_close(tensors(one), tensors(other), **teachers)
    torch.testing.assert_close(tensors(found["student"]), tensors(alone["student"]), **NEAR)
    assert found["value"] == pytest.approx(alone["value"], abs=0.12)  # one image of nine


@pytest.mark.parametrize(("size", "parallel"), [(2, False), (2, True), (4, True)])
def test_processes_train_what_one_would(alone, tree, tmp_path, size: int, parallel: bool) -> None:
    found = together(size, ddp_recipe.trained, tree, tmp_path, parallel)
    for rank in range(size):
        # a teacher that one process trains alone is the same to the bit
        assert_close(found[rank], alone, SAME if size == 2 and parallel else NEAR)
        assert all((found[rank]["student"][name] == value).all() for name, value in found[0]["student"].items())
    epochs = [(each["stage"], each["network"], each["epoch"]) for each in alone["told"]]
    assert sorted((each["stage"], each["network"], each["epoch"]) for each in found[0]["told"]) == sorted(epochs)
    assert len(set(epochs)) == len(epochs) == 12
    assert found[1]["told"] == []


def test_teachers_that_can_not_be_side_by_side_follow_one_another(alone, tree, tmp_path) -> None:
    with pytest.warns(UserWarning, match="a multiple of 2 processes; with 1 the teachers train one after another"):
        assert_close(ddp_recipe.trained(0, 1, tree, tmp_path, True), alone, NEAR)


@pytest.mark.parametrize(
    ("parallel", "epochs"), [(False, 3), (True, 2), (False, 10)], ids=["teachers", "side by side", "merge"]
)
def test_a_process_that_dies_ends_the_others_and_any_number_go_on(alone, tree, tmp_path, parallel, epochs) -> None:
    found = together(2, ddp_recipe.killed, tree, tmp_path, parallel, epochs, missing=1)
    assert found[0].startswith("ProcessLostError: process 0 of 2 lost another one, which ended or hangs ("), found
    files = sorted(path.parent.name for path in tmp_path.rglob("*.safetensors"))
    assert files
    if not parallel:
        assert re.search(r"; the last checkpoint is \S+\.safetensors$", found[0])
    first, second = together(2, ddp_recipe.trained, tree, tmp_path, parallel).values()
    assert_close(first, alone, NEAR)
    assert_close(second, alone, NEAR)
    # what was finished is there for one process too, and nothing of it is trained again
    assert ddp_recipe.trained(0, 1, tree, tmp_path)["told"] == []


def test_one_process_goes_on_where_two_stopped(alone, tree, tmp_path) -> None:
    together(2, ddp_recipe.killed, tree, tmp_path, True, 3, missing=1)
    assert_close(ddp_recipe.trained(0, 1, tree, tmp_path), alone, NEAR)


def test_a_teacher_that_diverges_ends_the_replicate_in_all_processes(tree, tmp_path) -> None:
    found = together(2, ddp_recipe.diverging, tree, tmp_path)
    said = "resnet18-imagewoof: every replicate of student diverged; a learning rate may be too high"
    assert set(found.values()) == {f"FloatingPointError: {said}"}

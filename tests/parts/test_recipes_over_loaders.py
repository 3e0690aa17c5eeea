"""Recipes whose images don't fit in memory: their choices and budgets, and from the command line to the files."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastmerge.cli import main
from fastmerge.data import loading
from fastmerge.data.augmentation import Augmentation
from fastmerge.experiments import lab
from fastmerge.experiments.recipes import RECIPES, Recipe
from fastmerge.experiments.run import run
from fastmerge.merging import compiling

# So short a stage leaves the gates where they are.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*P.g>0.:UserWarning",
    "ignore::DeprecationWarning:torch",  # what importing the compiler gives
)


@pytest.fixture(params=["resnet20-cifar100", "resnet18-imagewoof", "resnet18-imagenet"])
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return RECIPES[request.param]()


def small_network(classes: int, width: int) -> nn.Module:
    layers = [nn.Conv2d(3, 4 * width, 3, padding=1), nn.BatchNorm2d(4 * width), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width, classes))


def shrunk(recipe: Recipe, size: int = 32) -> Recipe:
    return replace(recipe, image_size=size, batch_size=8, held_out=0.2)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = pytest.importorskip("PIL.Image")
    root, random = tmp_path_factory.mktemp("tree"), np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for index, name in enumerate(("beagle", "dingo")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 128, (40, 48, 3), np.uint8) + 127 * index
                image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{number}.png")
    return root


def slowed(recipe: Recipe) -> Recipe:
    """Steps of two images would make ResNet-18 diverge at the rates of the paper's batches."""
    plans = {
        name: replace(getattr(recipe, name), lr=0.01) for name in ("teacher", "long", "third") if getattr(recipe, name)
    }
    return replace(recipe, merge=replace(recipe.merge, lr=0.01, finetune_lr=0.01), **plans)


@pytest.mark.parametrize(
    "recipe",
    ["resnet20-cifar100", "resnet18-imagewoof", pytest.param("resnet18-imagenet", marks=pytest.mark.slow)],
    indirect=True,
)
def test_from_the_command_line_to_the_files(recipe, tree, tmp_path, monkeypatch, capsys) -> None:
    """With the recipe's own network, on images that are small."""
    monkeypatch.setitem(RECIPES, recipe.name, lambda: slowed(shrunk(recipe)))
    words = ["--data", str(tree), "--budget", "0.001", "--replicates", "1", "--out", str(tmp_path), "--quiet"]
    assert main(["run", recipe.name, *words, "--device", "cpu", "--loader", "torch", "--workers", "1"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["strategies"]) == ["student", "bo3", "one"]
    assert all(0 <= strategy["values"][0] <= 1 for strategy in results["strategies"].values())
    long = recipe.scaled(0.001).epochs
    assert {name: strategy["epochs"] for name, strategy in results["strategies"].items()} == {
        "student": long,
        "bo3": 6,
        "one": long,
    }
    assert results["config"]["loader"] == "torch"
    assert results["config"]["train_samples"] == 10
    history = json.loads((tmp_path / "history.json").read_text())
    assert history["stages"] == {"student": {"merge": long - 2, "fine-tune": long - 1}}
    assert history["curves"]["student"]["epochs"] == [*range(2, long - 1, 2), long - 1, long]
    assert history["curves"]["one"]["epochs"] == list(range(1, long + 1))
    assert history["curves"]["bo3"]["epochs"] == [3, 6]
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    figures = {"strategy", "replicates", "stage", "network", "epoch", "lr", "train_loss", "images_per_second"}
    assert all(figures <= each.keys() for each in log)
    merged = [each for each in log if each["stage"] == "merge"]
    gates = {"lam", "gate_loss", "open_probability", "linked"}
    assert (
        merged == [each for each in log if gates & each.keys()] == [each for each in log if gates <= each.keys()] != []
    )
    assert all({"test_loss", "test_accuracy"} <= each.keys() for each in merged)
    student = recipe.make_network(2, 1)
    load = pytest.importorskip("safetensors.torch").load_file
    student.load_state_dict(load(tmp_path / "student-0.safetensors"))
    assert "| student" in (tmp_path / "report.md").read_text()
    printed = capsys.readouterr()
    assert printed.out.startswith("strategy")
    assert printed.err.splitlines()[0].startswith("fastmerge: loader torch: ")


def small_recipe(**changes) -> Recipe:
    recipe = shrunk(RECIPES["resnet18-imagewoof"](), 24)
    options = {name: changes.pop(name) for name in list(changes) if hasattr(recipe.merge, name)}
    recipe = replace(recipe, make_network=small_network, augmentation=Augmentation(shift=1), **changes)
    return replace(recipe, merge=replace(recipe.merge, **options))


def run_small(tree: Path, **options):
    chosen = options.pop("strategies", ["student", "bo3", "one-big"])
    recipe = options.pop("recipe", small_recipe())
    defaults = {"replicates": 2, "budget": 0.02, "data_path": tree, "progress": False, "loader": "device"}
    return run(recipe, chosen, **(defaults | options))


def test_the_seed_decides(tree: Path) -> None:
    values = [run_small(tree, seed=seed, replicates=1)["strategies"] for seed in (0, 0)]
    assert [strip(each) for each in values[:1]] == [strip(each) for each in values[1:]]


def strip(strategies: dict) -> dict:
    return {name: strategy["values"] for name, strategy in strategies.items()}


@pytest.mark.parametrize("loader", ["device", "torch"])
def test_images_are_listed_and_read_once_in_a_run(tree: Path, monkeypatch: pytest.MonkeyPatch, loader: str) -> None:
    """Not once for each network; where they stay on the device they are decoded once, too."""
    counts: Counter[str] = Counter()

    def counted(module, name: str):
        original = getattr(module, name)

        def count(*arguments):
            counts[name] += 1
            return original(*arguments)

        monkeypatch.setattr(module, name, count)

    counted(loading, "find_trees")
    counted(loading, "read_tree")
    strategies = run_small(tree, loader=loader, workers=0)["strategies"]
    assert len(strategies) == 3
    assert counts == {"find_trees": 1} | ({"read_tree": 3} if loader == "device" else {})


def test_arrays_are_read_once_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = {f"{split}_images": np.zeros((12, 24, 24, 3), np.uint8) for split in ("train", "test")}
    np.savez(tmp_path / "x.npz", **images, train_labels=np.arange(12) % 2, test_labels=np.arange(12) % 2)
    reads: list[Path] = []
    load = loading.load_npz
    monkeypatch.setattr(loading, "load_npz", lambda path: reads.append(path) or load(path))
    run_small(tmp_path / "x.npz")
    assert reads == [tmp_path / "x.npz"]


def test_the_test_images_are_looked_at_as_often_as_asked_for(tree: Path, tmp_path: Path) -> None:
    told: list[dict] = []
    recipe = small_recipe(test_every=100)  # two epochs of 0.02 of 600
    strategies = run_small(tree, recipe=recipe, replicates=1, out=tmp_path, note=told.append)["strategies"]
    assert strip(strategies) == strip(run_small(tree, replicates=1)["strategies"])
    curves = json.loads((tmp_path / "history.json").read_text())["curves"]
    assert curves["student"]["epochs"] == [4, 8, 10, 12]
    assert curves["bo3"]["epochs"] == [6, 12]
    assert curves["one-big"]["epochs"] == [2, 4, 6, 8, 10, 12]
    looked = [(each["stage"], each["epoch"]) for each in told if "test_accuracy" in each]
    assert looked[:4] == [("teacher", 2), ("teacher", 4), ("teacher", 2), ("teacher", 4)] or looked[0][0] == "one-big"
    assert len(looked) < len(told)


def test_the_merge_stage_follows_its_plan(tree: Path) -> None:
    told: list[dict] = []
    recipe = small_recipe(merge_milestones=(50,))
    run_small(tree, recipe=recipe, strategies=["student"], replicates=1, note=told.append)
    rates = [each["lr"] for each in told if each["stage"] == "merge"]
    assert rates == pytest.approx([0.01, 0.001])


def test_networks_start_and_read_differently_and_teachers_are_shared(tree, monkeypatch) -> None:
    starts, orders = [], []
    train = lab.train_by

    def spy(options, network, train_loader, *rest, title, **more):
        orders.append(tuple(train_loader.batches.of(0)[0].tolist()))
        starts.append((title, network[0].weight.shape[0], network[0].weight.sum().item()))
        return train(options, network, train_loader, *rest, title=title, **more)

    monkeypatch.setattr(lab, "train_by", spy)
    run_small(tree)
    assert sorted((title, width) for title, width, _ in starts) == [
        ("one-big 0 0", 8),
        ("one-big 1 0", 8),
        *((f"teacher {replicate} {number}", 4) for replicate in (0, 1) for number in (0, 1, 2)),
    ]
    assert len({start for _, _, start in starts}) == 8
    assert len(set(orders)) == 6  # the long run reads as the first teacher does


def test_what_was_finished_is_not_trained_again(tree, tmp_path, monkeypatch) -> None:
    told = []
    first = run_small(tree, checkpoint_dir=tmp_path, note=told.append)
    assert {(each["strategy"], each["stage"]) for each in told} == {
        ("teachers", "teacher"),
        ("student", "merge"),
        ("student", "finetune"),
        ("one-big", "one-big"),
    }
    assert len(told) == 2 * (3 * 4 + 2 + 2 + 12)
    again = []
    assert strip(run_small(tree, checkpoint_dir=tmp_path, resume=True, note=again.append)["strategies"]) == strip(
        first["strategies"]
    )
    assert not again
    with pytest.raises(ValueError, match="holds the checkpoints"):
        run_small(tree, checkpoint_dir=tmp_path)


def test_an_interrupted_run_goes_on(tree, tmp_path) -> None:
    whole = strip(run_small(tree)["strategies"])
    count = 0

    def stop(values) -> None:
        nonlocal count
        count += 1
        if count == 12 + 12 + 1:  # in the merge
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_small(tree, checkpoint_dir=tmp_path, checkpoint_seconds=0.0, note=stop)
    assert strip(run_small(tree, checkpoint_dir=tmp_path, resume=True)["strategies"]) == whole


def test_options_reach_every_stage(tree, monkeypatch) -> None:
    """The merge compacts, each stage is compiled, and a step reads its images in two parts."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    said, sizes, compacted = [], [], []
    monkeypatch.setattr(compiling.LOG, "info", lambda text, *parts: said.append(text % parts))
    merge, train = lab.merge_by, lab.train_by

    def spy_merge(*arguments, **more):
        student, history = merge(*arguments, **more)
        compacted.extend(history.compactions)
        return student, history

    def spy_train(options, network, loader, *rest, **more):
        sizes.append(loader.batches.batch_size)
        return train(options, network, loader, *rest, **more)

    monkeypatch.setattr(lab, "merge_by", spy_merge)
    monkeypatch.setattr(lab, "train_by", spy_train)
    recipe = small_recipe(compact_at=0.0)
    run_small(tree, recipe=recipe, strategies=["student"], replicates=1, accumulate=2, compile=True)
    assert sizes == [4, 4]
    assert [each["epoch"] for each in compacted] == [1]
    assert [line for line in said if line.startswith("compiled")] == [
        f"compiled {name}: 1 graph" for name in 2 * ["Sequential"] + ["the big student, linked", "Sequential"]
    ]


def test_a_replicate_that_diverges_is_left_out(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = lab.train_by

    def diverging(*arguments, title, **more):
        if title.split()[1] == "1":
            raise FloatingPointError("the loss became nan")
        return train(*arguments, title=title, **more)

    monkeypatch.setattr(lab, "train_by", diverging)
    with pytest.warns(UserWarning, match="teachers, replicate 1: the loss became nan"):
        results = run_small(tree, strategies=["student"])
    values = results["strategies"]["student"]["values"]
    assert np.isfinite(values).tolist() == [True, False]
    failed = pytest.raises(FloatingPointError, match="every replicate of student diverged")
    with failed, pytest.warns(UserWarning, match="loss"):
        run_small(tree, strategies=["student"], recipe=small_recipe(weight_decay=float(2**60)))


def test_cifar_is_read_from_torchvisions_folder_and_from_arrays(tmp_path: Path) -> None:
    """With the recipe's own changes of images, which stay in memory."""
    recipe = replace(RECIPES["resnet20-cifar100"](), make_network=small_network)
    folder, arrays = tmp_path / "cifar-100-python", {}
    folder.mkdir()
    for split, count in (("train", 150), ("test", 30)):
        pixels = np.random.default_rng(0).integers(0, 256, (count, 3072), np.uint8)
        labels = [number % 100 for number in range(count)]
        (folder / split).write_bytes(pickle.dumps({"data": pixels, "fine_labels": labels}, protocol=2))
        arrays |= {f"{split}_images": pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), f"{split}_labels": labels}
    np.savez(tmp_path / "arrays.npz", **arrays)
    options = {"recipe": recipe, "strategies": ["one"], "replicates": 1, "budget": 0.001, "loader": "auto"}
    found = [run_small(tmp_path, data_path=path, **options) for path in (tmp_path, tmp_path / "arrays.npz")]
    assert found[0]["config"]["loader"] == "device"
    assert (found[0]["config"]["train_samples"], found[0]["config"]["test_samples"]) == (135, 30)
    assert strip(found[0]["strategies"]) == strip(found[1]["strategies"])
    np.savez(
        tmp_path / "small.npz",
        **arrays | {f"{split}_images": arrays[f"{split}_images"][:, :28] for split in ("train", "test")},
    )
    with pytest.raises(ValueError, match=r"the images of .*small.npz are 28 pixels high; image_size is only for trees"):
        run_small(tmp_path, data_path=tmp_path / "small.npz", **options)


def test_bad_input(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resnet18-imagewoof needs data: a tree"):
        run_small(tree, data_path=None)
    with pytest.raises(ValueError, match=r"at most 1 classes; .* has 2"):
        run_small(tree, recipe=small_recipe(most_classes=1))
    grey = {"images": np.zeros((2, 24, 24), np.uint8), "labels": np.arange(2)}
    np.savez(tmp_path / "grey.npz", **{f"{split}_{k}": v for split in ("train", "test") for k, v in grey.items()})
    with pytest.raises(ValueError, match=r"needs images of 3 channels; those of .*grey\.npz have 1"):
        run_small(tree, data_path=tmp_path / "grey.npz")
    with pytest.raises(ValueError, match="unknown strategy luck"):
        run_small(tree, strategies=["luck"])
    for options, word in (
        ({"loader": "dali"}, "--loader"),
        ({"accumulate": 2}, "--accumulate"),
        ({"autocast": torch.bfloat16, "compile": True}, "--autocast, --compile"),
        ({"teachers_in_parallel": True}, "--teachers-in-parallel"),
    ):
        with pytest.raises(ValueError, match=f"recipe sine trains stacks .* it takes no {word}"):
            run(RECIPES["sine"](), ["one"], **options)

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

from fastmerge import BigStudent
from fastmerge.cli import main
from fastmerge.data import folders, loading, making
from fastmerge.data.augmentation import Augmentation
from fastmerge.merging import compiling
from fastmerge.merging.execution import Execution
from fastmerge.recipes import OVER_LOADERS, RECIPES
from fastmerge.reporting.paper import paper_mean
from fastmerge.schedules import QuadraticLambda, fitting_gate_lr
from fastmerge.training import loader_networks
from fastmerge.training.loader_recipe import LoaderRecipe, Plan
from fastmerge.training.running import run_recipe, varied

# So short a stage leaves the gates where they are.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*P.g>0.:UserWarning",
    "ignore::DeprecationWarning:torch",  # what importing the compiler gives
)


@pytest.fixture(params=OVER_LOADERS)
def recipe(request: pytest.FixtureRequest) -> LoaderRecipe:
    return OVER_LOADERS[request.param]()


def epochs_of(recipe: LoaderRecipe) -> tuple[int, ...]:
    return tuple(plan.epochs for plan in (recipe.teacher, recipe.merge, recipe.finetune, recipe.long, recipe.third))


def test_imagenet_is_the_papers() -> None:
    recipe = OVER_LOADERS["resnet18-imagenet"]()
    assert epochs_of(recipe) == (20, 20, 90, 150, 50)
    assert (recipe.lam_start, recipe.lam_step, recipe.weight_decay, recipe.batch_size) == (0.3, 0.2, 1e-4, 256)
    assert (recipe.teacher.lr, recipe.merge.lr, recipe.finetune.lr) == (0.1, 0.1, 0.07)


def test_imagewoof_is_the_papers() -> None:
    recipe = OVER_LOADERS["resnet18-imagewoof"]()
    assert epochs_of(recipe) == (200, 100, 100, 600, 200)
    assert (recipe.lam_start, recipe.lam_step, recipe.weight_decay, recipe.batch_size) == (0.01, 0.05, 0.0, 32)
    assert {plan.lr for plan in (recipe.teacher, recipe.merge, recipe.finetune, recipe.long)} == {0.01}


def test_cifar100_is_the_papers() -> None:
    recipe = OVER_LOADERS["resnet20-cifar100"]()
    assert epochs_of(recipe) == (300, 150, 150, 900, 300)
    assert (recipe.lam_start, recipe.lam_step, recipe.gate_lr, recipe.link_at) == (0.05, 0.05, None, 0.0)
    assert fitting_gate_lr(150 * 390) == varied(recipe, paper=True).gate_lr == 0.2
    assert (recipe.batch_size, recipe.momentum, recipe.weight_decay) == (128, 0.9, 1e-4)
    plans = (recipe.teacher, recipe.third, recipe.merge, recipe.finetune, recipe.long)
    assert [plan.milestones for plan in plans] == [(150, 225), (150, 225), (75, 105), (75, 113), (450, 675)]
    assert {plan.lr for plan in plans} == {0.1}
    assert sum(parameter.numel() for parameter in recipe.make_network(100, 1).parameters()) == 278_324


def test_names_agree(recipe: LoaderRecipe) -> None:
    assert RECIPES[recipe.name]() == recipe
    assert paper_mean(recipe.name, "student") is not None


@pytest.mark.parametrize("budget", [1.0, 0.5, 0.07, 1e-6])
def test_strategies_are_equal_at_every_budget(recipe: LoaderRecipe, budget: float) -> None:
    scaled = recipe.scaled(budget)
    teacher, merge, finetune, long, third = epochs_of(scaled)
    assert 2 * teacher + merge + finetune == long == scaled.epochs
    assert long <= 3 * third <= long + 2  # what the student is compared with never has fewer
    assert long == pytest.approx(recipe.epochs * budget, abs=6)
    assert (budget == 1.0) == (scaled == recipe)
    if scaled.merge.epochs > 1:
        assert last_lambda(scaled) == pytest.approx(last_lambda(recipe), rel=1e-4)


def last_lambda(recipe: LoaderRecipe) -> float:
    lam = QuadraticLambda(recipe.lam_start, recipe.lam_step)
    for _ in range(recipe.merge.epochs - 1):
        lam.step()
    return lam.value


def test_a_plan_warms_up_and_drops() -> None:
    plan = Plan(epochs=90, lr=0.07, milestones=(30, 60), warmup=2)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], plan.lr)
    schedule, rates = plan.schedule(optimizer), []
    for _ in range(90):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:3] == pytest.approx([1e-4, 0.03505, 0.07])
    assert [rates[epoch] for epoch in (29, 30, 59, 60, 89)] == pytest.approx([0.07, 0.007, 0.007, 0.0007, 0.0007])
    assert plan.scaled(0.1) == Plan(epochs=9, lr=0.07, milestones=(3, 6), warmup=0)


def test_unequal_strategies_are_refused(recipe: LoaderRecipe) -> None:
    with pytest.raises(ValueError, match="strategies of equal epochs: the student has"):
        replace(recipe, long=Plan(epochs=7, lr=0.1))


def test_networks_widen_and_merge(recipe: LoaderRecipe) -> None:
    x = torch.randn(2, 3, 32, 32)
    teachers = [recipe.make_network(5, 1) for _ in range(2)]
    assert BigStudent(*teachers, example_inputs=x).compress()(x).shape == recipe.make_network(5, 2)(x).shape == (2, 5)


def small_network(classes: int, width: int) -> nn.Module:
    layers = [nn.Conv2d(3, 4 * width, 3, padding=1), nn.BatchNorm2d(4 * width), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width, classes))


def shrunk(recipe: LoaderRecipe, size: int = 32) -> LoaderRecipe:
    return replace(recipe, image_size=size, batch_size=8)


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


def test_from_the_command_line_to_the_files(recipe, tree, tmp_path, monkeypatch, capsys) -> None:
    """With the recipe's own network, on images that are small."""
    monkeypatch.setitem(RECIPES, recipe.name, lambda: shrunk(recipe))
    words = ["--data", str(tree), "--budget", "0.001", "--replicates", "1", "--out", str(tmp_path), "--quiet"]
    assert main(["run", recipe.name, *words, "--device", "cpu", "--loader", "torch", "--workers", "1"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["strategies"]) == ["student", "bo3", "one"]
    assert all(0 <= strategy["values"][0] <= 1 for strategy in results["strategies"].values())
    assert {strategy["epochs"] for strategy in results["strategies"].values()} == {4}
    assert results["config"]["loader"] == "torch"
    assert results["config"]["train_samples"] == 12
    history = json.loads((tmp_path / "history.json").read_text())
    assert history["stages"] == {"student": {"merge": 2, "fine-tune": 3}}
    assert history["curves"]["student"]["epochs"] == [2, 3, 4]
    assert history["curves"]["one"]["epochs"] == [1, 2, 3, 4]
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


def small_recipe(**changes) -> LoaderRecipe:
    recipe = shrunk(OVER_LOADERS["resnet18-imagewoof"](), 24)
    return replace(recipe, make_network=small_network, augmentation=Augmentation(shift=1), **changes)


def run_small(tree: Path, **options):
    chosen = options.pop("strategies", ["student", "bo3", "one-big"])
    recipe = options.pop("recipe", small_recipe())
    defaults = {"replicates": 2, "budget": 0.02, "data_path": tree, "progress": False, "loader": "device"}
    return run_recipe(recipe, chosen, **(defaults | options))


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
    counted(folders, "read_tree")
    monkeypatch.setattr(making, "read_tree", folders.read_tree)
    strategies = run_small(tree, loader=loader, workers=0)["strategies"]
    assert len(strategies) == 3
    assert counts == {"find_trees": 1} | ({"read_tree": 2} if loader == "device" else {})


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
    assert looked[:4] == [("teacher", 2), ("teacher", 4), ("teacher", 2), ("teacher", 4)]
    assert len(looked) < len(told)


def test_the_merge_stage_follows_its_plan(tree: Path) -> None:
    told: list[dict] = []
    recipe = small_recipe(merge=Plan(epochs=100, lr=0.01, milestones=(50,)))
    run_small(tree, recipe=recipe, strategies=["student"], replicates=1, note=told.append)
    rates = [each["lr"] for each in told if each["stage"] == "merge"]
    assert rates == pytest.approx([0.01, 0.001])


def test_networks_start_and_read_differently(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts, orders = [], []
    train = loader_networks.train_network

    def spy(recipe, plan, place, loaders, width, tell, *path):
        orders.append(tuple(loaders.train.batches.of(0)[0].tolist()))
        network, history = train(recipe, plan, place, loaders, width, tell, *path)
        starts.append((path, width, network[0].weight.sum().item()))
        return network, history

    monkeypatch.setattr(loader_networks, "train_network", spy)
    run_small(tree)
    assert [path for path, _, _ in starts[:2]] == [("teacher", 0, 0), ("teacher", 0, 1)]
    assert [width for _, width, _ in starts] == [1] * 4 + [1] * 6 + [2] * 2
    assert len({start for _, _, start in starts}) == len(set(orders)) == 12


def test_what_was_finished_is_not_trained_again(tree, tmp_path, monkeypatch) -> None:
    told = []
    first = run_small(tree, checkpoint_dir=tmp_path, note=told.append)
    assert {(each["strategy"], each["stage"]) for each in told} == {
        ("student", "teacher"),
        ("student", "merge"),
        ("student", "finetune"),
        ("bo3", "bo3"),
        ("one-big", "one-big"),
    }
    assert len(told) == 2 * (2 * 4 + 2 + 2 + 3 * 4 + 12)
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
        if count == 11:  # in the merge's second stage
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_small(tree, checkpoint_dir=tmp_path, checkpoint_seconds=0.0, note=stop)
    assert strip(run_small(tree, checkpoint_dir=tmp_path, resume=True)["strategies"]) == whole


def test_options_reach_every_stage(tree, monkeypatch) -> None:
    """The merge compacts, each stage is compiled, and a step reads its images in two parts."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    said, sizes, compacted = [], [], []
    monkeypatch.setattr(compiling.LOG, "info", lambda text, *parts: said.append(text % parts))
    merge, train = loader_networks.train_merge, loader_networks.train_network

    def spy_merge(*arguments):
        student, history = merge(*arguments)
        compacted.extend(history.compactions)
        return student, history

    def spy_train(recipe, plan, place, loaders, *rest):
        sizes.append(loaders.train.batches.batch_size)
        return train(recipe, plan, place, loaders, *rest)

    monkeypatch.setattr(loader_networks, "train_merge", spy_merge)
    monkeypatch.setattr(loader_networks, "train_network", spy_train)
    execution = Execution(accumulate=2, compile=True)
    recipe = small_recipe(compact_at=0.0)
    run_small(tree, recipe=recipe, strategies=["student"], replicates=1, execution=execution)
    assert sizes == [4, 4]
    assert [each["epoch"] for each in compacted] == [1]
    assert [line for line in said if line.startswith("compiled")] == [
        f"compiled {name}: 1 graph" for name in 2 * ["Sequential"] + ["the big student, linked", "Sequential"]
    ]


def test_a_replicate_that_diverges_is_left_out(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = loader_networks.train_network

    def diverging(recipe, plan, place, loaders, width, tell, *path):
        if path[1] == 1:
            raise FloatingPointError("the loss became nan")
        return train(recipe, plan, place, loaders, width, tell, *path)

    monkeypatch.setattr(loader_networks, "train_network", diverging)
    with pytest.warns(UserWarning, match="student, replicate 1: the loss became nan"):
        results = run_small(tree, strategies=["student"])
    values = results["strategies"]["student"]["values"]
    assert np.isfinite(values).tolist() == [True, False]
    failed = pytest.raises(FloatingPointError, match="every replicate of student diverged")
    with failed, pytest.warns(UserWarning, match="loss"):
        run_small(tree, strategies=["student"], recipe=small_recipe(weight_decay=float(2**60)))


def test_cifar_is_read_from_torchvisions_folder_and_from_arrays(tmp_path: Path) -> None:
    """With the recipe's own changes of images, which stay in memory."""
    recipe = replace(OVER_LOADERS["resnet20-cifar100"](), make_network=small_network)
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
    assert (found[0]["config"]["train_samples"], found[0]["config"]["test_samples"]) == (150, 30)
    assert strip(found[0]["strategies"]) == strip(found[1]["strategies"])
    np.savez(
        tmp_path / "small.npz",
        **arrays | {f"{split}_images": arrays[f"{split}_images"][:, :28] for split in ("train", "test")},
    )
    with pytest.raises(ValueError, match=r"the images of .*small.npz are 28 high; another size is for a tree"):
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
    for options in ({"loader": "dali"}, {"execution": Execution(accumulate=2)}, {"teachers_in_parallel": True}):
        with pytest.raises(ValueError, match="sine has its data in memory"):
            run_recipe(RECIPES["sine"](), ["one"], **options)
    with pytest.raises(ValueError, match="sine has its data in memory"):
        run_recipe(RECIPES["sine"](), ["one"], loader="dali")


def test_variations() -> None:
    recipe = replace(RECIPES["digits"](), link_at=0.25, gate_schedule="budget")
    assert varied(recipe) == recipe
    papers = replace(RECIPES["digits"](), gate_lr=0.2)
    assert varied(recipe, paper=True) == papers
    assert varied(recipe, compact_at=0.5).compact_at == (0.5,)
    loaders = OVER_LOADERS["resnet18-imagewoof"]()
    assert varied(loaders, compact_at="settled") == replace(loaders, compact_at="settled")
    with pytest.raises(ValueError, match="digits stacks its networks, which drop channels together: give a fraction"):
        varied(recipe, compact_at="settled")
    with pytest.raises(ValueError, match=r"compact_at, .* in 0\.\.1, 'settled' or None; got 3"):
        varied(loaders, compact_at=3.0)
    assert varied(recipe, link_at=0.5).link_at == 0.5
    assert varied(recipe, batch_size=7) == replace(recipe, batch_size=7)
    assert varied(loaders, batch_size=7) == replace(loaders, batch_size=7)
    assert varied(recipe, paper=True, batch_size=7) == replace(papers, batch_size=7)
    with pytest.raises(ValueError, match="batch_size of at least 1; got 0"):
        varied(loaders, batch_size=0)
    assert varied(RECIPES["sine"](), gate_schedule="budget").gate_schedule == "budget"
    with pytest.raises(ValueError, match="leave them out, or --paper"):
        varied(recipe, paper=True, link_at=0.0)
    with pytest.raises(ValueError, match=r"in 0\.\.1; got 2"):
        varied(recipe, link_at=2.0)

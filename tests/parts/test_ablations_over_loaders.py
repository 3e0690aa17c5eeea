"""Ablations of recipes over loaders: the harness of those in memory, by the stages of a merge."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from tqdm import tqdm

from benchmarks import ablation_lab, ablations, experiments
from benchmarks.ablation_lab import Ablation
from benchmarks.ablation_report import section
from benchmarks.ablation_variants import BASE
from fastmerge import BigStudent
from fastmerge.experiments.recipes import RECIPES, Recipe, resnet20_cifar100
from fastmerge.merging.options import Plan

# So short a stage leaves the gates where they are.
pytestmark = pytest.mark.filterwarnings("ignore:.*P.g>0.:UserWarning")

NAME = "resnet20-cifar100"
EDITS = ["head × T", "gates folded", "recalibrated"]


def small_network(classes: int, width: int) -> nn.Module:
    first, second = nn.Conv2d(3, 8 * width, 3, 2, 1, bias=False), nn.Conv2d(8 * width, 8, 3, 2, 1, bias=False)
    return nn.Sequential(
        first,
        nn.BatchNorm2d(8 * width),
        nn.ReLU(),
        second,
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, classes),
    )


def small_recipe() -> Recipe:
    plan = Plan(epochs=4, lr=0.05)
    recipe = resnet20_cifar100()
    options = {"merge_epochs": 4, "finetune_epochs": 4, "lr": 0.05, "merge_milestones": None, "milestones": ()}
    return replace(
        recipe,
        make_network=small_network,
        teacher=plan,
        long=replace(plan, epochs=16),
        third=replace(plan, epochs=6),
        merge=replace(recipe.merge, **options),
        held_out=0.25,
    )


@pytest.fixture
def images(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    labels = {"train": np.arange(30) % 3, "test": np.arange(12) % 3}
    arrays = {f"{split}_labels": values for split, values in labels.items()}
    for split, values in labels.items():
        noise = generator.integers(0, 156, (len(values), 32, 32, 3))
        arrays[f"{split}_images"] = (noise + 49 * values[:, None, None, None]).astype(np.uint8)
    np.savez(tmp_path / "all.npz", **arrays)
    return tmp_path / "all.npz"


@pytest.fixture
def run(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(RECIPES, NAME, small_recipe)
    experiment = experiments.Experiment(0.5, 10, 2, 1, torch.bfloat16, batch_size=8)
    monkeypatch.setitem(experiments.EXPERIMENTS, NAME, experiment)
    threads = torch.get_num_threads()

    def call(*words: str, out: str = "tiny.json") -> dict[str, Any]:
        ablations.main(["--recipe", NAME, "--data", str(images), "--out", str(tmp_path / out), *words])
        return json.loads((tmp_path / out).read_text())

    yield call
    torch.set_num_threads(threads)


def students(results: dict[str, Any]) -> dict[str, Any]:
    """Everything that was measured but the seconds."""
    return {
        name: {key: {k: v for k, v in found.items() if k != "seconds"} for key, found in variant["replicates"].items()}
        for name, variant in results["variants"].items()
    }


def test_all_variants_at_the_size_of_the_experiment(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = []
    learn = ablation_lab.learn_importance

    def spy(big, plan, trainer):
        learn(big, plan, trainer)
        merged.append((plan.link_at, plan.gate_schedule, big.linked, trainer.history.compactions, type(big).__name__))

    monkeypatch.setattr(ablation_lab, "learn_importance", spy)
    results = run("--replicates", "1")
    config = results["config"]
    assert (config["name"], config["budget"], config["train_samples"]) == (NAME, 0.5, 22)
    assert (config["batch_size"], config["autocast"], config["merge"]["merge_epochs"]) == (8, "bfloat16", 2)
    names = set(results["variants"])
    assert {
        BASE,
        f"{BASE} (4)",
        "link_at 0.1",
        "gate_lr 1",
        "link_at 1",
        "compacted",
        "draw per batch",
        "budget",
        *EDITS,
    } == names - {"link_at 0.25", "link_at 0.5", f"{BASE} (2)", f"{BASE} (3)"}
    assert len(merged) == len(names) - len(EDITS)
    assert {link_at: linked for link_at, _, linked, _, _ in merged}[1.0] is False
    assert sum(schedule == "budget" for _, schedule, _, _, _ in merged) == 1
    assert [len(compactions) for _, _, _, compactions, _ in merged if compactions] == [1]
    assert sum(kind == "OneDrawPerBatch" for *_, kind in merged) == 1
    assert all(len(variant["replicates"]) == 1 for variant in results["variants"].values())
    shared = [results["variants"][name]["replicates"]["0"]["open_probability"] for name in (BASE, *EDITS)]
    assert all(each == shared[0] for each in shared)
    assert "22 training samples" in section(results)


def test_edits_change_what_is_compressed_and_nothing_before(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compressed: dict[str, nn.Module] = {}
    compress = Ablation.compressed

    def spy(self, bigs, variant):
        made = compress(self, bigs, variant)
        compressed[variant.name] = copy.deepcopy(made[0])
        return made

    monkeypatch.setattr(Ablation, "compressed", spy)
    run("--replicates", "1", "--variants", *EDITS)
    base = compressed[BASE].state_dict()
    differ = {
        name: {key for key, value in student.state_dict().items() if not torch.equal(value, base[key])}
        for name, student in compressed.items()
    }
    statistics = {f"{layer}.running_{what}" for layer in (1, 4) for what in ("mean", "var")}
    assert differ[BASE] == set()
    assert differ["head × T"] == {"7.weight"}
    assert differ["recalibrated"] - {"1.num_batches_tracked", "4.num_batches_tracked"} == statistics
    assert differ["gates folded"] <= {"3.weight", "7.weight"}


def test_a_killed_run_goes_on(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = ["--replicates", "2", "--variants", "link_at 1", "recalibrated"]
    whole = run(*words)

    class Killed(BaseException):
        pass

    def killed_after(epochs: int) -> Any:
        def made(place, replicates, epoch):
            counts = iter(range(1, 100))

            def count(networks: int) -> None:
                epoch(networks)
                if next(counts) == epochs:
                    raise Killed

            return Ablation(place, replicates, count)

        return made

    for epochs in (3, 8):  # while its teachers train, and in the merge stage of the second variant
        with monkeypatch.context() as patch:
            patch.setattr(ablations, "Ablation", killed_after(epochs))
            with pytest.raises(Killed):
                run(*words, out="killed.json")
    assert set(json.loads((tmp_path / "killed.json").read_text())["variants"]) == {BASE}
    again = run(*words, out="killed.json")
    assert students(again) == students(whole)
    assert again["teachers"] == whole["teachers"]


def test_teachers_of_an_experiment_are_taken(run: Any, images: Path, tmp_path: Path, capsys: Any) -> None:
    own = run("--replicates", "1", "--variants", BASE)
    experiments.save_subset(images, tmp_path / "share.npz", experiments.EXPERIMENTS[NAME])
    experiments.run_experiment(NAME, tmp_path / "share.npz", tmp_path / "student")
    checkpoints = tmp_path / "student" / "checkpoints"
    before = {path: path.stat().st_mtime_ns for path in checkpoints.rglob("*.safetensors")}
    taken = run("--replicates", "1", "--variants", BASE, "--teachers", str(checkpoints), out="taken.json")
    assert {path: path.stat().st_mtime_ns for path in checkpoints.rglob("*.safetensors")} == before
    assert taken["teachers"] == own["teachers"]
    assert students(taken) == students(own)
    with pytest.raises(SystemExit):
        run("--teachers", str(tmp_path))
    assert "has none" in capsys.readouterr().err


def test_a_variant_that_diverges_is_left_out(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    finetune = ablation_lab.finetune

    def diverging(student: nn.Module, options: Any, trainer: Any) -> None:
        if trainer.setting.autocast is not None and not hasattr(diverging, "done"):
            diverging.done = True  # type: ignore[attr-defined]
            raise FloatingPointError("the loss became nan")
        finetune(student, options, trainer)

    monkeypatch.setattr(ablation_lab, "finetune", diverging)
    with pytest.warns(UserWarning, match="replicate 0, paper: the loss became nan"):
        results = run("--replicates", "1", "--variants", "recalibrated")
    assert list(results["variants"]) == ["recalibrated"]


def test_the_bar_knows_how_much_is_left(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []

    def made(**options: Any) -> Any:
        bars.append(tqdm(**options, disable=False))
        return bars[-1]

    monkeypatch.setattr(ablations, "tqdm", made)
    run("--replicates", "1", "--variants", "link_at 1")
    run("--replicates", "2", "--variants", "recalibrated")
    assert [bar.total for bar in bars] == [2 * 2 + 2 * 4, 2 * 2 + 2 + 2 + 2 * 2 + 2 + 2 * 2]
    assert [bar.n for bar in bars] == [bars[0].total, bars[1].total - 2 * 2]  # whose first teachers were there


def test_draws_are_others_and_gates_the_same(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, tuple[list[float], list[int], float]] = {}

    def stop(big: BigStudent, plan: Any, trainer: Any) -> None:
        first = trainer.train_loader.batches.of(0)[0].tolist()
        seen[len(seen)] = (
            torch.cat([p.flatten() for p in big.gate_parameters()]).tolist(),
            first,
            torch.rand(()).item(),
        )
        raise FloatingPointError("enough")

    monkeypatch.setattr(ablation_lab, "learn_importance", stop)
    with pytest.warns(UserWarning, match="enough"):
        run("--replicates", "1", "--variants", f"{BASE} (2)", "link_at 1")
    base, other, unlinked = seen.values()
    assert base[0] == other[0] == unlinked[0]
    assert base[1:] == unlinked[1:]
    assert base[1] != other[1]
    assert base[2] != other[2]

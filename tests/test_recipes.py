"""The recipes: their choices, their budgets, and that each can run."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastmerge.big_student import BigStudent
from fastmerge.recipes import IN_MEMORY, RECIPES
from fastmerge.recipes.lenet_imagewoof import lenet_imagewoof
from fastmerge.recipes.sine import curve, sine
from fastmerge.reporting.paper import paper_mean
from fastmerge.schedules import PAPERS_GATE_LR, QuadraticLambda, fitting_gate_lr
from fastmerge.training.running import varied
from fastmerge.training.strategies import run

SHAPES = {"sine": (1,), "digits": (1, 8, 8), "lenet-imagewoof": (3, 28, 28)}


@pytest.fixture(params=IN_MEMORY)
def recipe(request):
    return IN_MEMORY[request.param]()


def test_names_agree(recipe):
    assert recipe is not RECIPES[recipe.name]()
    assert recipe == RECIPES[recipe.name]()
    if recipe.name != "digits":
        assert paper_mean(recipe.name, "student") is not None


@pytest.mark.parametrize("budget", [1.0, 0.5, 0.031, 1e-6])
def test_strategies_are_equal_at_every_budget(recipe, budget):
    scaled = recipe.scaled(budget).fitted(1000)
    merge = sum(part.epochs for _, part in scaled.merge_parts())
    student = 2 * scaled.teacher_stage().epochs + merge + scaled.finetune_stage().epochs
    assert student == 3 * scaled.teacher_stage().epochs == scaled.long_stage().epochs == scaled.epochs
    assert scaled.epochs == pytest.approx(recipe.epochs * budget, abs=6)
    assert merge == scaled.merge_stage().epochs == scaled.finetune_stage().epochs == scaled.unit
    assert scaled.test_every >= 1


def test_a_full_budget_changes_nothing(recipe):
    assert recipe.scaled(1.0) == recipe


@pytest.mark.parametrize("budget", [0.5, 0.1, 0.03])
def test_budget_scales_milestones_and_lambda_ends_where_it_would_have(budget):
    recipe = lenet_imagewoof()
    scaled = recipe.scaled(budget)
    for name in ("teacher_milestones", "long_milestones", "finetune_milestones"):
        assert list(getattr(scaled, name)) == pytest.approx([m * budget for m in getattr(recipe, name)], abs=0.5)
    assert last_lambda(scaled) == pytest.approx(last_lambda(recipe), rel=1e-4)


def last_lambda(recipe) -> float:
    lam = QuadraticLambda(recipe.lam_start, recipe.lam_step)
    for _ in range(recipe.unit - 1):
        lam.step()
    return lam.value


def test_learning_rate_drops_after_a_milestone():
    stage = sine().teacher_stage()
    assert [stage.lr_at(epoch) for epoch in (0, 249, 250, 299)] == pytest.approx([0.01, 0.01, 0.001, 0.001])


def test_sine_is_the_papers():
    recipe = sine()
    assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.gate_lr) == (900, 32, 0.01, 0.1)
    assert (recipe.lam_start, recipe.lam_step, recipe.momentum) == (0.01, 0.05, 0.9)
    assert (recipe.teacher_milestones, recipe.long_milestones, recipe.finetune_milestones) == ((250,), (800,), (100,))
    assert sum(p.numel() for p in recipe.make_network(1).parameters()) == 301
    assert len(recipe.load_data(None, 0).train_inputs) == 10_000
    x, true = curve()
    assert x.shape == true.shape == (500, 1)


def test_networks_run_widen_and_merge(recipe):
    x = torch.randn(4, *SHAPES[recipe.name])
    narrow, wide = recipe.make_network(1), recipe.make_network(2)
    assert narrow(x).shape == wide(x).shape
    first = next(iter(narrow.parameters())).shape[0]
    assert next(iter(wide.parameters())).shape[0] == 2 * first
    big = BigStudent(narrow, recipe.make_network(1), example_inputs=x)
    assert all(group.size * 2 == big.gates[group.name].channels for group in big.groups)
    assert big.compress()(x).shape == narrow(x).shape


def test_data_sets_fit_the_networks(recipe, tmp_path):
    data = recipe.load_data(imagewoof(tmp_path) if recipe.name == "lenet-imagewoof" else None, 0)
    outputs = recipe.make_network(1)(data.normalise(data.train_inputs[:3]))
    assert recipe.criterion(outputs, data.train_targets[:3]).isfinite()
    assert (data.classes is None) == (recipe.metric == "test_loss")


def imagewoof(folder, count=20, size=28, channels=3, classes=10):
    generator = np.random.default_rng(0)
    path = folder / "data.npz"
    images = {
        f"{split}_images": generator.integers(0, 256, (count, size, size, channels), np.uint8)
        for split in ("train", "test")
    }
    np.savez(path, **images, train_labels=np.arange(count) % classes, test_labels=np.arange(count) % classes)
    return path


def test_imagewoof_reads_a_tree_too(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for split in ("train", "val"):
        for name in ("beagle", "dingo"):
            (tmp_path / split / name).mkdir(parents=True)
            image.new("RGB", (40, 30), (9, 8, 7)).save(tmp_path / split / name / "1.jpg")
    data = lenet_imagewoof().load_data(tmp_path, 0)
    assert data.train_inputs.shape == (2, 3, 28, 28)
    assert data.train_targets.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 32}, "28x28 images with 3 channels .* 32x32 with 3"),
        ({"channels": 1}, "28x28 with 1"),
        ({"classes": 11}, "at most 10 classes; .* 11 classes"),
    ],
)
def test_imagewoof_refuses_other_data(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        lenet_imagewoof().load_data(imagewoof(tmp_path, **options), 0)


def test_paths_are_asked_for_or_refused(tmp_path):
    with pytest.raises(ValueError, match="lenet-imagewoof needs data"):
        lenet_imagewoof().load_data(None, 0)
    for name in ("sine", "digits"):
        with pytest.raises(ValueError, match="takes no path"):
            IN_MEMORY[name]().load_data(tmp_path, 0)


def test_imagewoof_runs_augmented(tmp_path):
    recipe = replace(lenet_imagewoof(), gate_lr=3.0, epochs=6)
    with pytest.warns(UserWarning, match=r"P\[g>0\]"):  # three steps are not enough
        results = run(recipe, ["student"], replicates=1, workers=1, progress=False, data_path=imagewoof(tmp_path))
    assert 0 <= results["strategies"]["student"]["values"][0] <= 1
    assert results["config"]["augment"].endswith("flip_and_shift")


def test_milestones_of_the_merge_stage_hold_across_linking():
    recipe = replace(lenet_imagewoof(), epochs=900, lr=0.1, merge_milestones=(75, 105), link_at=0.6).fitted(9025)
    (first, before), (second, after) = recipe.merge_parts()
    assert (first, before.epochs, second, after.epochs) == (0, 90, 90, 60)
    assert [before.lr_at(74), before.lr_at(75)] == pytest.approx([0.1, 0.01])
    assert [after.lr_at(0), after.lr_at(14), after.lr_at(15)] == pytest.approx([0.01, 0.01, 0.001])


def test_every_group_of_digits_ends_near_its_share_with_a_budget():
    pytest.importorskip("sklearn")
    recipe = replace(IN_MEMORY["digits"](), gate_schedule="budget", stack=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of gates that did not arrive
        results = run(recipe, ["student"], replicates=2, budget=0.2, workers=1, progress=False)
    assert results["config"]["gate_schedule"] == "budget"


def test_gates_learn_faster_in_a_short_merge_stage():
    recipe = lenet_imagewoof()
    assert recipe.fitted(9025).gate_lr == PAPERS_GATE_LR  # the paper's steps
    short = recipe.scaled(0.01).fitted(9025)
    assert short.gate_lr == fitting_gate_lr(10 * 283)
    assert short.gate_lr > PAPERS_GATE_LR
    assert [part.gate_lr for _, part in short.merge_parts()] == [short.gate_lr]
    assert replace(recipe, gate_lr=0.3).scaled(0.01).fitted(9025).gate_lr == 0.3
    assert varied(recipe, paper=True).scaled(0.01).fitted(9025).gate_lr == PAPERS_GATE_LR
    assert varied(sine(), paper=True).gate_lr == sine().gate_lr
    with pytest.raises(ValueError, match="gate_lr, which fitted"):
        recipe.merge_stage()


def test_a_run_says_what_its_gates_learned_with(tmp_path):
    recipe = replace(lenet_imagewoof(), epochs=6)
    with pytest.warns(UserWarning, match=r"P\[g>0\]"):
        results = run(recipe, ["student"], replicates=1, workers=1, progress=False, data_path=imagewoof(tmp_path))
    assert results["config"]["gate_lr"] == fitting_gate_lr(1)


@pytest.mark.parametrize("epochs", [0, 5, 100])
def test_epochs_must_add_up(epochs):
    with pytest.raises(ValueError, match="divide by 6"):
        replace(sine(), epochs=epochs)


def test_the_merge_stage_is_cut_where_the_network_changes_shape():
    recipe = replace(lenet_imagewoof(), epochs=900, link_at=0.5, compact_at=(0.75, 0.5, 0.999)).fitted(9025)
    assert [(first, part.epochs) for first, part in recipe.merge_parts()] == [(0, 75), (75, 37), (112, 38)]
    assert recipe.compact_from == [75, 112]  # nothing is left to drop for at the end of the stage
    assert [(first, part.epochs) for first, part in recipe.scaled(1e-6).merge_parts()] == [(0, 1)]


@pytest.mark.parametrize("compact_at", [(0.0,), (0.5, 1.0), (float("nan"),)])
def test_compaction_is_within_the_merge_stage(compact_at):
    with pytest.raises(ValueError, match="compact_at takes fractions of the merge stage, between 0 and 1"):
        replace(sine(), compact_at=compact_at)

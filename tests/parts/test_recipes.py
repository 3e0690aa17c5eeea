"""The recipes: their choices, their budgets, and that each can run."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastmerge.big_student import BigStudent
from fastmerge.experiments.recipes import RECIPES, Recipe, curve, lenet_imagewoof, sine
from fastmerge.experiments.run import run
from fastmerge.merging.options import Plan
from fastmerge.reporting.tables import paper_mean
from fastmerge.schedules import PAPERS_GATE_LR, QuadraticLambda, fitting_gate_lr
from image_files import noise_arrays, write_tree

SHAPES = {"sine": (1,), "digits": (1, 8, 8), "lenet-imagewoof": (3, 28, 28)}


@pytest.fixture(params=RECIPES)
def every(request) -> Recipe:
    return RECIPES[request.param]()


@pytest.fixture(params=SHAPES)
def recipe(request) -> Recipe:
    return RECIPES[request.param]()


def test_names_agree(every):
    assert RECIPES[every.name]() == every
    if every.name != "digits":
        assert paper_mean(every.name, "student") is not None
    assert every.in_memory == (every.name in SHAPES)


def epochs_of(recipe: Recipe) -> tuple[int, ...]:
    merge = recipe.merge
    return recipe.teacher.epochs, merge.merge_epochs, merge.finetune_epochs, recipe.long.epochs, recipe.best_of.epochs


@pytest.mark.parametrize("budget", [1.0, 0.5, 0.07, 0.031, 1e-6])
def test_strategies_are_equal_at_every_budget(every, budget):
    scaled = every.scaled(budget)
    teacher, merge, finetune, long, third = epochs_of(scaled)
    assert 2 * teacher + merge + finetune == long == scaled.epochs
    assert long <= 3 * third <= long + 2  # what the student is compared with never has fewer
    if every.name != "resnet18-imagenet":
        assert teacher == third == 2 * merge == 2 * finetune
    assert long == pytest.approx(every.epochs * budget, abs=6)
    assert (budget == 1.0) == (scaled == every)
    assert scaled.test_every >= 1
    if merge > 1:
        assert last_lambda(scaled) == pytest.approx(last_lambda(every), rel=1e-4)


@pytest.mark.parametrize("budget", [0.5, 0.1, 0.03])
def test_budget_scales_milestones(budget):
    recipe = lenet_imagewoof()
    scaled = recipe.scaled(budget)
    for before, after in (
        (recipe.teacher, scaled.teacher),
        (recipe.long, scaled.long),
        (recipe.merge.finetune_plan, scaled.merge.finetune_plan),
    ):
        assert list(after.milestones) == pytest.approx([m * budget for m in before.milestones], abs=0.5)


def last_lambda(recipe: Recipe) -> float:
    lam = QuadraticLambda(recipe.merge.lam_start, recipe.merge.lam_step)
    for _ in range(recipe.merge.merge_epochs - 1):
        lam.step()
    return lam.value


def test_a_plan_warms_up_and_drops() -> None:
    plan = Plan(epochs=90, lr=0.07, milestones=(30, 60), warmup=2)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], plan.lr)
    schedule, rates = plan.schedule(optimizer), []
    for _ in range(90):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:3] == pytest.approx([1e-4, 0.03505, 0.07])
    assert [rates[epoch] for epoch in (29, 30, 59, 60, 89)] == pytest.approx([0.07, 0.007, 0.007, 0.0007, 0.0007])
    assert plan.scaled(0.1) == Plan(epochs=9, lr=0.07, milestones=(3, 6), warmup=0)


def test_unequal_strategies_are_refused(every):
    with pytest.raises(ValueError, match="strategies of equal epochs: the student has"):
        replace(every, long=Plan(epochs=7, lr=0.1))


@pytest.mark.parametrize("changes", [{"held_out": 0.0}, {"held_out": 1.0}, {"batch_size": 0}])
def test_wrong_numbers_are_refused(every, changes):
    with pytest.raises(ValueError, match=r"held_out is a fraction|batch_size of at least 1"):
        replace(every, **changes)


def test_sine_is_the_papers():
    recipe = sine()
    assert epochs_of(recipe) == (300, 150, 150, 900, 300)
    merge = recipe.merge
    assert (recipe.batch_size, merge.lr, merge.gate_lr) == (32, 0.01, 0.1)
    assert (merge.lam_start, merge.lam_step, merge.momentum) == (0.01, 0.05, 0.9)
    assert (recipe.teacher.milestones, recipe.long.milestones, merge.milestones) == ((250,), (800,), (100,))
    assert sum(p.numel() for p in recipe.make_network(0, 1).parameters()) == 301
    assert len(recipe.load_data(None, 0).train_inputs) == 10_000
    x, true = curve()
    assert x.shape == true.shape == (500, 1)


def test_imagenet_is_the_papers():
    recipe = RECIPES["resnet18-imagenet"]()
    assert epochs_of(recipe) == (20, 20, 90, 150, 50)
    merge = recipe.merge
    assert (merge.lam_start, merge.lam_step, merge.weight_decay, recipe.batch_size) == (0.3, 0.2, 1e-4, 256)
    assert (recipe.teacher.lr, merge.lr, merge.finetune_plan.lr, merge.warmup) == (0.1, 0.1, 0.07, 2)


def test_imagewoof_is_the_papers():
    recipe = RECIPES["resnet18-imagewoof"]()
    assert epochs_of(recipe) == (200, 100, 100, 600, 200)
    merge = recipe.merge
    assert (merge.lam_start, merge.lam_step, merge.weight_decay, recipe.batch_size) == (0.01, 0.05, 0.0, 32)
    assert {recipe.teacher.lr, merge.lr, merge.finetune_plan.lr, recipe.long.lr} == {0.01}


def test_cifar100_is_the_papers():
    recipe = RECIPES["resnet20-cifar100"]()
    assert epochs_of(recipe) == (300, 150, 150, 900, 300)
    merge = recipe.merge
    assert (merge.lam_start, merge.lam_step, merge.gate_lr, merge.link_at) == (0.05, 0.05, None, 0.0)
    assert fitting_gate_lr(150 * 390) == recipe.varied(paper=True).merge.gate_lr == 0.2
    assert (recipe.batch_size, merge.momentum, merge.weight_decay) == (128, 0.9, 1e-4)
    plans = (recipe.teacher, recipe.best_of, merge.merge_plan, merge.finetune_plan, recipe.long)
    assert [plan.milestones for plan in plans] == [(150, 225), (150, 225), (75, 105), (75, 113), (450, 675)]
    assert {plan.lr for plan in plans} == {0.1}
    assert sum(parameter.numel() for parameter in recipe.make_network(100, 1).parameters()) == 278_324


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in SHAPES])
def test_networks_of_images_widen_and_merge(name):
    recipe, x = RECIPES[name](), torch.randn(2, 3, 32, 32)
    teachers = [recipe.make_network(5, 1) for _ in range(2)]
    assert BigStudent(*teachers, example_inputs=x).compress()(x).shape == recipe.make_network(5, 2)(x).shape == (2, 5)


def test_networks_run_widen_and_merge(recipe):
    x = torch.randn(4, *SHAPES[recipe.name])
    narrow, wide = recipe.make_network(10, 1), recipe.make_network(10, 2)
    assert narrow(x).shape == wide(x).shape
    first = next(iter(narrow.parameters())).shape[0]
    assert next(iter(wide.parameters())).shape[0] == 2 * first
    big = BigStudent(narrow, recipe.make_network(10, 1), example_inputs=x)
    assert all(group.size * 2 == big.gates[group.name].channels for group in big.groups)
    assert big.compress()(x).shape == narrow(x).shape


def test_data_sets_fit_the_networks(recipe, tmp_path):
    data = recipe.load_data(imagewoof(tmp_path) if recipe.name == "lenet-imagewoof" else None, 0)
    outputs = recipe.make_network(10, 1)(data.normalise(data.train_inputs[:3]))
    assert recipe.criterion(outputs, data.train_targets[:3]).isfinite()
    assert (data.classes is None) == (recipe.metric == "test_loss")


def imagewoof(folder, count=20, size=28, channels=3, classes=10):
    np.savez(folder / "data.npz", **noise_arrays(count, count, (size, size, channels), classes))
    return folder / "data.npz"


def test_imagewoof_reads_a_tree_too(tmp_path):
    tree = write_tree(tmp_path, train_beagle=1, train_dingo=1, val_beagle=1, val_dingo=1)
    data = lenet_imagewoof().load_data(tree, 0)
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
            RECIPES[name]().load_data(tmp_path, 0)


def short(recipe: Recipe, **options) -> Recipe:
    recipe = recipe.scaled(1e-6)
    return replace(recipe, merge=replace(recipe.merge, **options))


def test_imagewoof_runs_augmented(tmp_path):
    recipe = short(lenet_imagewoof(), gate_lr=3.0)
    with pytest.warns(UserWarning, match=r"P\[g>0\]"):  # three steps are not enough
        results = run(recipe, ["student"], replicates=1, workers=1, progress=False, data_path=imagewoof(tmp_path))
    assert 0 <= results["strategies"]["student"]["values"][0] <= 1
    assert results["config"]["augment"].endswith("flip_and_shift")
    assert results["config"]["merge"]["gate_lr"] == 3.0


def test_every_group_of_digits_ends_near_its_share_with_a_budget():
    pytest.importorskip("sklearn")
    recipe = replace(RECIPES["digits"]().varied(gate_schedule="budget"), stack=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of gates that did not arrive
        results = run(recipe, ["student"], replicates=2, budget=0.2, workers=1, progress=False)
    assert results["config"]["merge"]["gate_schedule"] == "budget"


def test_variations():
    recipe = RECIPES["digits"]().varied(link_at=0.25, gate_schedule="budget")
    assert recipe.varied() == recipe
    papers = replace(recipe, merge=replace(RECIPES["digits"]().merge, gate_lr=PAPERS_GATE_LR, recalibrate=False))
    assert recipe.varied(paper=True) == papers
    assert recipe.varied(compact_at=0.5).merge.compact_at == 0.5
    assert recipe.varied(compact_at="settled").merge.compact_at == "settled"
    assert recipe.varied(link_at=0.5).merge.link_at == 0.5
    assert recipe.varied(batch_size=7) == replace(recipe, batch_size=7)
    assert recipe.varied(paper=True, batch_size=7) == replace(papers, batch_size=7)
    assert sine().varied(paper=True).merge.gate_lr == sine().merge.gate_lr
    for wrong, message in (
        ({"compact_at": 3.0}, r"compact_at, .* in 0\.\.1, 'settled' or None; got 3"),
        ({"batch_size": 0}, "batch_size of at least 1; got 0"),
        ({"paper": True, "link_at": 0.0}, "leave them out, or leave out --paper"),
        ({"link_at": 2.0}, r"in 0\.\.1; got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe.varied(**wrong)

"""Strategies end to end, on networks and data so small that it takes seconds."""

import json
import math
import shutil
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastmerge.data.dataset import StackedBatches
from fastmerge.experiments import lab
from fastmerge.experiments.place import Place, seed_for
from fastmerge.experiments.strategies import STRATEGIES
from fastmerge.experiments.strategies import strategy as registered
from fastmerge.merging import stages
from fastmerge.merging.options import Plan
from fastmerge.networks import SineMLP
from fastmerge.weights import load_weights
from tiny_recipes import four_classes, images_recipe, points_recipe, run_quietly, tiny_images

AT_EQUAL_EPOCHS = ["student", "bo3", "one", "bo3-big", "one-big"]


RECIPES = {"points": (points_recipe(), 0), "images": (images_recipe(), 4)}  # and seeds


pytestmark = pytest.mark.usefixtures("no_gate_warnings")


@pytest.fixture(scope="module")
def runs():
    return {}


@pytest.fixture
def whole_run(runs, tmp_path_factory, no_gate_warnings):
    """``whole_run(kind)``: a run of all strategies at equal epochs, its directory and seconds, shared between tests."""

    def find(kind):
        if kind not in runs:
            recipe, seed = RECIPES[kind]
            out, start = tmp_path_factory.mktemp(kind), time.perf_counter()
            results = run_quietly(recipe, AT_EQUAL_EPOCHS, out=out, seed=seed)
            runs[kind] = results, out, time.perf_counter() - start
        return runs[kind]

    return find


@pytest.mark.parametrize("kind", RECIPES)
def test_all_strategies_and_their_files(whole_run, kind):
    recipe, _ = RECIPES[kind]
    results, out, seconds = whole_run(kind)
    # A stack's are not each of its networks'; student and bo3 share two teachers.
    assert sum(strategy["seconds"] for strategy in results["strategies"].values()) < 1.3 * seconds
    assert results["recipe"] == recipe.name
    assert results["metric"] == recipe.metric
    assert set(results["strategies"]) == set(AT_EQUAL_EPOCHS)
    for strategy in results["strategies"].values():
        assert len(strategy["values"]) == 3
        assert len(set(strategy["values"])) > 1 or recipe.metric == "test_accuracy"
        assert all(math.isfinite(value) for value in strategy["values"])
        assert strategy["epochs"] == 12
        assert strategy["seconds"] > 0
    costs = {name: strategy["cost"] for name, strategy in results["strategies"].items()}
    assert costs["bo3"] == costs["one"] == 12
    assert 12 + 2 * 0.5 < costs["student"] < 12 + 2 * 4  # an epoch of the linked big student costs more than one
    assert 1.5 * 12 < costs["one-big"] == costs["bo3-big"] < 4.5 * 12
    written = json.loads((out / "results.json").read_text())
    assert written["strategies"] == results["strategies"]
    assert written["config"]["batch_size"] == recipe.batch_size
    assert written["config"]["replicates"] == 3

    history = json.loads((out / "history.json").read_text())
    assert history["stages"] == {"student": {"merge": 8, "fine-tune": 10}}
    curves = history["curves"]
    assert curves["student"]["epochs"] == [4, 8, 10, 12]
    assert curves["bo3"]["epochs"] == curves["bo3-big"]["epochs"] == [6, 12]
    assert curves["one"]["epochs"] == [2, 4, 6, 8, 10, 12]
    for strategy, curve in curves.items():
        assert np.shape(curve[recipe.metric]) == (len(curve["epochs"]), 3)
        assert curve[recipe.metric][-1] == pytest.approx(results["strategies"][strategy]["values"], rel=1e-5)
    assert history["gates"]["epochs"] == [1, 2]
    assert len(history["gates"]["lam"]) == 2
    assert all(np.shape(rows) == (2, 3) for rows in history["gates"]["open_probability"].values())
    borders = history["replicates"]["borders"]
    assert list(borders) == [
        "teacher 0",
        "teacher 1",
        "big student, gates open",
        "big student",
        "compressed",
        "student",
    ]
    assert borders["student"] == results["strategies"]["student"]["values"]
    for kept in history["replicates"]["kept"]:
        assert {name: sum(counts) for name, counts in kept.items()} == group_sizes(recipe)


def group_sizes(recipe):
    if recipe.metric == "test_loss":
        return {"hidden": 100}
    return {"conv1": 3, "conv2": 6, "fc1": 12, "fc2": 12}


def test_saved_students_have_the_values_of_the_results(whole_run):
    results, out, _ = whole_run("images")
    data = tiny_images(None, seed_for(4, "data"))
    for index, value in enumerate(results["strategies"]["student"]["values"]):
        network = four_classes(4, 1)
        load_weights(network, out / f"student-{index}.safetensors")
        right = network.eval()(data.test_inputs).argmax(1) == data.test_targets
        assert right.double().mean().item() == pytest.approx(value)
    assert not (out / "student-3.safetensors").exists()


def test_predictions_are_those_of_the_saved_students(whole_run):
    _, out, _ = whole_run("points")
    arrays = np.load(out / "curves.npz")
    assert set(arrays) == {"x", "true", *AT_EQUAL_EPOCHS}
    assert all(arrays[name].shape == (3, *arrays["x"].shape) for name in AT_EQUAL_EPOCHS)
    np.testing.assert_allclose(arrays["true"], np.sin(10 * np.pi * arrays["x"]), atol=1e-4)
    network = SineMLP()
    load_weights(network, out / "student-2.safetensors")
    with torch.no_grad():
        drawn = network(torch.from_numpy(arrays["x"])[:, None])[:, 0]
    np.testing.assert_allclose(arrays["student"][2], drawn.numpy(), rtol=1e-4, atol=1e-5)


def test_the_seed_decides_and_nothing_else(whole_run, forked_jobs):
    def values(**options):
        return run_quietly(points_recipe(), **options)["strategies"]["student"]["values"]

    first = whole_run("points")[0]["strategies"]["student"]["values"]
    assert values() == first  # no strategy takes part in another
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the gates, which in another process are not patched away
        assert values(workers=2) == first
    assert values(replicates=2) == first[:2]  # stacks are of two, so the first is the same
    assert values(seed=1, replicates=2) != first[:2]


def a_lab(seed=0, replicates=(0, 1)) -> lab.Lab:
    place = Place(recipe=points_recipe(), data=None, device=torch.device("cpu"), seed=seed).opened_here()
    return lab.Lab(place, replicates, "test")


def test_networks_of_a_number_start_and_read_alike_and_others_do_not():
    def starts(its, number):
        return [network.hidden.bias[0].item() for network in its.fresh(number)]

    def reads(its, order, number):
        return [row.tolist() for row in next(iter(its.loaders(order, number).train))[0][:, :, 0]]

    first, other = a_lab(), a_lab(seed=1)
    assert starts(first, 0) == starts(a_lab(), 0)
    assert starts(first, 0)[1:] == starts(a_lab(replicates=(1,)), 0)  # whatever it is trained beside
    assert reads(first, "fresh", 0) == reads(a_lab(), "fresh", 0)
    each = [*starts(first, 0), *starts(first, 1), *starts(first, 2), *starts(other, 0)]
    assert len(set(each)) == 8
    orders = [
        *reads(first, "fresh", 0),
        *reads(first, "fresh", 1),
        *reads(first, "after", 0),
        *reads(other, "fresh", 0),
    ]
    assert len({tuple(order) for order in orders}) == 8


def test_strategies_are_paired_and_a_new_one_is_a_function():
    """Within a replicate all start from the same teachers, which are trained once, and read the same data."""
    seen = {}
    try:

        @registered("restart again", teachers=1)
        def restart(its, teachers):
            seen["restart again"] = teachers[0].networks
            return its.train(teachers[0].networks, Plan(epochs=8, lr=0.01), "restart again", after=teachers)

        @registered("look", teachers=2)
        def look(its, teachers):
            seen["look"] = [teacher.networks for teacher in teachers]
            return its.best(teachers)

        told = []
        results = run_quietly(points_recipe(), ["restart again", "look"], replicates=2, note=told.append)["strategies"]
    finally:
        for name in ("restart again", "look"):
            STRATEGIES.pop(name, None)
    assert seen["restart again"] is seen["look"][0]
    assert {(each["strategy"], each["stage"], each["network"]) for each in told} == {
        ("teachers", "teacher", 0),
        ("teachers", "teacher", 1),
        ("restart again", "restart again", 0),
    }
    assert {name: (each["epochs"], each["cost"]) for name, each in results.items()} == {
        "restart again": (12, 12),
        "look": (8, 8),
    }
    assert all(len(each["values"]) == 2 for each in results.values())


def test_a_run_leaves_the_callers_random_numbers_alone():
    state = torch.get_rng_state()
    run_quietly(points_recipe(), replicates=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_strategy_reads_the_same_number_of_samples(monkeypatch):
    """The accounting by what is trained on, not by what the recipe says; double width counts like single."""
    read = {}
    iterate = StackedBatches.__iter__

    def counted(self):
        for inputs, targets in iterate(self):
            read[strategy] = read.get(strategy, 0) + inputs.shape[0] * inputs.shape[1]
            yield inputs, targets

    monkeypatch.setattr(StackedBatches, "__iter__", counted)
    monkeypatch.setattr(lab.Lab, "loaders", lambda self, *order: self.place.loaders(self.replicates, *order))
    for strategy in AT_EQUAL_EPOCHS:
        run_quietly(points_recipe(link_at=0.5), [strategy], replicates=1)
    first = 16  # merge() looks at one batch before it begins
    assert read == {name: 12 * 36 + (first if name == "student" else 0) for name in AT_EQUAL_EPOCHS}


@pytest.mark.parametrize("recipe", [points_recipe(), images_recipe()], ids=["points", "images"])
def test_best_of_three_is_chosen_on_held_out_training_data(recipe, monkeypatch):
    """Not on the test data, on which another may be the best."""
    scores, columns = [], []
    score, best = lab.Lab.scores, lab.Lab.best

    def remembered(self, *arguments):
        scores.append(score(self, *arguments))
        return scores[-1]

    def listed(self, its):
        columns.extend(its)
        return best(self, its)

    monkeypatch.setattr(lab.Lab, "scores", remembered)
    monkeypatch.setattr(lab.Lab, "best", listed)
    values = run_quietly(recipe, ["bo3"], replicates=2)["strategies"]["bo3"]["values"]
    ranks = [
        [(-each.accuracy if recipe.metric == "test_accuracy" else each.loss, each.loss) for each in s] for s in scores
    ]
    for row in range(2):
        chosen = min(range(3), key=lambda number, row=row: ranks[number][row])
        assert values[row] == columns[chosen].values[row]
    held = a_lab().loaders("held out").held_out
    assert len(held.data.test_inputs) == 4
    train = a_lab().loaders("fresh").train.data.train_inputs
    assert not (held.data.test_inputs == train.T).any()


def test_linking_later_still_gives_a_student(tmp_path):
    results = run_quietly(images_recipe(link_at=0.5), out=tmp_path, replicates=1)
    assert all(math.isfinite(value) for value in results["strategies"]["student"]["values"])
    history = json.loads((tmp_path / "history.json").read_text())
    assert history["gates"]["epochs"] == [1, 2]
    lam = history["gates"]["lam"]
    assert lam[1] == pytest.approx(lam[0] + 0.05 * math.sqrt(lam[0]))  # λ goes on where it was


def test_a_strategy_that_diverges_everywhere_is_an_error(tmp_path):
    recipe = points_recipe()
    recipe = replace(recipe, long=replace(recipe.long, lr=1e6))
    with (
        pytest.warns(UserWarning, match=r"sine, one: the loss of replicate \d is no longer finite after epoch \d+;"),
        pytest.raises(FloatingPointError, match="every replicate of one diverged"),
    ):
        run_quietly(recipe, ["one"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_replicate_that_diverges_is_left_out(tmp_path, monkeypatch):
    """The others get the numbers that they have without it."""
    recipe = replace(points_recipe(), stack=1)
    whole = run_quietly(recipe)["strategies"]["student"]["values"]
    fresh = lab.Lab.fresh

    def broken(self, number=0, width=1):
        made = fresh(self, number, width)
        if number == 1 and 2 in self.replicates:
            torch.nn.init.constant_(made[self.replicates.index(2)].output.weight, math.inf)
        return made

    monkeypatch.setattr(lab.Lab, "fresh", broken)
    for stack in (1, 3):
        with pytest.warns(UserWarning, match="the loss of replicate 2 is no longer finite after epoch 1"):
            values = run_quietly(replace(recipe, stack=stack), out=tmp_path)["strategies"]["student"]["values"]
        assert np.isfinite(values).tolist() == [True, True, False]
        assert stack == 3 or values[:2] == whole[:2]
        assert json.loads((tmp_path / "results.json").read_text())["strategies"]["student"]["values"][2] is None
        assert (tmp_path / "student-1.safetensors").exists()
        assert not (tmp_path / "student-2.safetensors").exists()


def test_an_interrupt_leaves_an_earlier_run_as_it_was(whole_run, tmp_path, monkeypatch):
    shutil.copytree(whole_run("points")[1], tmp_path, dirs_exist_ok=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "origins", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_quietly(points_recipe(), ["student"], out=tmp_path, seed=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_fewer_replicates_leave_no_students_of_an_earlier_run(whole_run, tmp_path):
    shutil.copytree(whole_run("points")[1], tmp_path, dirs_exist_ok=True)
    assert len(list(tmp_path.glob("student-*"))) == 3
    run_quietly(points_recipe(), ["one"], out=tmp_path, replicates=1)
    assert not list(tmp_path.glob("student-*"))
    assert set(np.load(tmp_path / "curves.npz")) == {"x", "true", "one"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"strategies": ["student", "two"]},
            "unknown strategy two; there are student, bo3, one, bo3-big,",
        ),
        ({"strategies": ["one", "ours"]}, "sine has no classes; strategies ours are only for classifiers"),
        ({"strategies": []}, "at least one strategy"),
        ({"strategies": ["one", "one"]}, "each once"),
        ({"replicates": 0}, "replicates"),
        ({"seed": -1}, "seed"),
        ({"budget": 0.0}, "budget must be above 0"),
        ({"device": "cuda:99"}, "can't use device cuda:99"),
        ({"device": "toaster"}, "can't use device toaster"),
    ],
)
def test_wrong_arguments_are_refused_before_training(changes, message):
    with pytest.raises(ValueError, match=message):
        run_quietly(points_recipe(), **changes)

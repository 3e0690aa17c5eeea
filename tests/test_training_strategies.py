"""Strategies end to end, on networks and data so small that it takes seconds."""

import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastmerge.checkpoints import load_weights
from fastmerge.data.dataset import Dataset
from fastmerge.networks.lenet import small_lenet
from fastmerge.networks.sine_mlp import SineMLP
from fastmerge.recipes.sine import sine
from fastmerge.training import jobs, plain_strategies, stacked, student_strategy
from fastmerge.training.recipe import Recipe
from fastmerge.training.strategies import STRATEGIES, run


def tiny_points(path, seed, on_bad_image="raise"):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(60, 1, generator=generator)
    return Dataset(x[:40], torch.sin(6 * x[:40]), x[40:], torch.sin(6 * x[40:]))


def tiny_images(path, seed, on_bad_image="raise"):
    """Images of one bright column each, which is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(60) % 4
    images = 0.3 * torch.randn(60, 1, 8, 8, generator=generator)
    images[torch.arange(60), 0, :, 2 * labels] += 1
    return Dataset(images[:40], labels[:40], images[40:], labels[40:])


def four_classes(width):
    return small_lenet(4, width)


def points_recipe(**changes) -> Recipe:
    return replace(sine(), load_data=tiny_points, epochs=12, batch_size=16, test_every=2, stack=2, **changes)


def images_recipe(**changes) -> Recipe:
    return replace(
        points_recipe(curve=None),
        name="columns",
        metric="test_accuracy",
        make_network=four_classes,
        load_data=tiny_images,
        criterion=F.cross_entropy,
        lr=0.1,
        batch_size=20,
        stack=3,
        **changes,
    )


def run_quietly(recipe, strategies=("student",), **options):
    return run(recipe, strategies, **{"replicates": 3, "workers": 1, "progress": False, **options})


@pytest.fixture
def no_gate_warnings(monkeypatch):
    """In so few steps no gate gets anywhere."""
    monkeypatch.setattr(student_strategy, "gate_warnings", lambda *arguments: [])


pytestmark = pytest.mark.usefixtures("no_gate_warnings")


@pytest.mark.parametrize("recipe", [points_recipe(), images_recipe()], ids=["points", "images"])
def test_all_strategies_and_their_files(tmp_path, recipe):
    results = run_quietly(recipe, STRATEGIES, out=tmp_path)
    assert results["recipe"] == recipe.name
    assert results["metric"] == recipe.metric
    assert set(results["strategies"]) == set(STRATEGIES)
    for strategy in results["strategies"].values():
        assert len(strategy["values"]) == 3
        assert len(set(strategy["values"])) > 1 or recipe.metric == "test_accuracy"
        assert all(math.isfinite(value) for value in strategy["values"])
        assert strategy["epochs"] == 12
        assert strategy["seconds"] > 0
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["strategies"] == results["strategies"]
    assert written["config"]["batch_size"] == recipe.batch_size
    assert written["config"]["replicates"] == 3

    history = json.loads((tmp_path / "history.json").read_text())
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
    assert list(borders) == ["teacher 0", "teacher 1", "big student", "compressed", "student"]
    assert borders["student"] == results["strategies"]["student"]["values"]
    for kept in history["replicates"]["kept"]:
        assert {name: sum(counts) for name, counts in kept.items()} == group_sizes(recipe)


def group_sizes(recipe):
    if recipe.metric == "test_loss":
        return {"hidden": 100}
    return {"conv1": 3, "conv2": 6, "fc1": 12, "fc2": 12}


def test_saved_students_have_the_values_of_the_results(tmp_path):
    recipe = images_recipe()
    results = run_quietly(recipe, out=tmp_path, seed=4)
    data = tiny_images(None, jobs.seed_for(4, "data"))
    for index, value in enumerate(results["strategies"]["student"]["values"]):
        network = four_classes(1)
        load_weights(network, tmp_path / f"student-{index}.safetensors")
        right = network.eval()(data.test_inputs).argmax(1) == data.test_targets
        assert right.double().mean().item() == pytest.approx(value)
    assert not (tmp_path / "student-3.safetensors").exists()


def test_predictions_are_those_of_the_saved_students(tmp_path):
    run_quietly(points_recipe(), ("student", "bo3"), out=tmp_path)
    arrays = np.load(tmp_path / "curves.npz")
    assert set(arrays) == {"x", "true", "student", "bo3"}
    assert arrays["bo3"].shape == arrays["student"].shape == (3, *arrays["x"].shape)
    np.testing.assert_allclose(arrays["true"], np.sin(10 * np.pi * arrays["x"]), atol=1e-4)
    network = SineMLP()
    load_weights(network, tmp_path / "student-2.safetensors")
    with torch.no_grad():
        drawn = network(torch.from_numpy(arrays["x"])[:, None])[:, 0]
    np.testing.assert_allclose(arrays["student"][2], drawn.numpy(), rtol=1e-4, atol=1e-5)


def test_the_seed_decides_and_nothing_else():
    recipe = points_recipe()

    def values(strategies=("student",), **options):
        return run_quietly(recipe, strategies, **options)["strategies"]["student"]["values"]

    first = values()
    assert values(strategies=("student", "bo3")) == first  # no strategy takes part in another
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the gates, which in another process are not patched away
        assert values(workers=2) == first
    assert values(replicates=2) == first[:2]  # stacks are of two, so the first is the same
    assert values(seed=1) != first


def test_no_two_networks_start_or_read_alike():
    def job(strategy, seed=0):
        return jobs.Job(strategy, (0, 1), points_recipe(), seed, torch.device("cpu"))

    def starts(job):
        return [network.hidden.bias[0].item() for network in job.fresh_networks(3, 1)]

    def orders(job):
        return [torch.randperm(1000, generator=generator)[0].item() for generator in job.orders((0, 1), 3, "teachers")]

    assert starts(job("bo3")) == starts(job("bo3"))
    assert len({*starts(job("bo3")), *starts(job("student")), *starts(job("bo3", seed=1))}) == 18
    assert orders(job("bo3")) == orders(job("bo3"))
    assert (
        len({*orders(job("bo3")), *orders(job("student")), *orders(job("bo3", seed=1))}) > 15
    )  # of 1000, some may meet


def test_a_run_leaves_the_callers_random_numbers_alone():
    state = torch.get_rng_state()
    run_quietly(points_recipe(), replicates=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_strategy_reads_the_same_number_of_samples(monkeypatch):
    """The accounting by what is trained on, not by what the recipe says; double width counts like single."""
    read = {}
    epoch = stacked.StackedBatches.epoch

    def counted(self):
        for inputs, targets in epoch(self):
            read[strategy] = read.get(strategy, 0) + inputs.shape[0] * inputs.shape[1]
            yield inputs, targets

    monkeypatch.setattr(stacked.StackedBatches, "epoch", counted)
    for strategy in STRATEGIES:
        run_quietly(points_recipe(link_at=0.5), [strategy], replicates=1)
    assert read == dict.fromkeys(STRATEGIES, 12 * 40)


def test_best_of_three_takes_the_best(monkeypatch):
    scores = []
    score = plain_strategies.score

    def remembered(*arguments):
        scores.append(score(*arguments))
        return scores[-1]

    monkeypatch.setattr(plain_strategies, "score", remembered)
    for recipe, best in ((points_recipe(), min), (images_recipe(), max)):
        results = run_quietly(recipe, ["bo3"], replicates=2)
        last = scores[-1][recipe.metric].view(2, 3).tolist()
        assert results["strategies"]["bo3"]["values"] == [best(row) for row in last]
        assert recipe.metric == "test_accuracy" or all(min(row) < max(row) for row in last)


def test_linking_later_still_gives_a_student(tmp_path):
    results = run_quietly(images_recipe(link_at=0.5), out=tmp_path, replicates=1)
    assert all(math.isfinite(value) for value in results["strategies"]["student"]["values"])
    history = json.loads((tmp_path / "history.json").read_text())
    assert history["gates"]["epochs"] == [1, 2]
    lam = history["gates"]["lam"]
    assert lam[1] == pytest.approx(lam[0] + 0.05 * math.sqrt(lam[0]))  # λ goes on where it was


def test_a_strategy_that_diverges_everywhere_is_an_error(tmp_path):
    with (
        pytest.warns(UserWarning, match=r"replicate \d is no longer finite after epoch \d+ of stage long run"),
        pytest.raises(FloatingPointError, match="every replicate of one diverged"),
    ):
        run_quietly(points_recipe(lr=1e6), ["one"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_replicate_that_diverges_is_left_out(tmp_path, monkeypatch):
    """The others get the numbers that they have without it."""
    recipe = points_recipe()
    whole = run_quietly(recipe)["strategies"]["student"]["values"]
    fresh = jobs.Job._fresh_network

    def broken(self, replicate, network, width):
        made = fresh(self, replicate, network, width)
        if (replicate, network) == (2, 1):
            torch.nn.init.constant_(made.output.weight, math.inf)
        return made

    monkeypatch.setattr(jobs.Job, "_fresh_network", broken)
    with pytest.warns(UserWarning, match="replicate 2 is no longer finite after epoch 1 of stage teachers"):
        values = run_quietly(recipe, out=tmp_path)["strategies"]["student"]["values"]
    assert values[:2] == whole[:2]
    assert math.isnan(values[2])
    assert json.loads((tmp_path / "results.json").read_text())["strategies"]["student"]["values"][2] is None
    assert (tmp_path / "student-1.safetensors").exists()
    assert not (tmp_path / "student-2.safetensors").exists()


def test_an_interrupt_leaves_an_earlier_run_as_it_was(tmp_path, monkeypatch):
    run_quietly(points_recipe(), ["student"], out=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(student_strategy, "origins", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_quietly(points_recipe(), ["student"], out=tmp_path, seed=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_fewer_replicates_leave_no_students_of_an_earlier_run(tmp_path):
    run_quietly(points_recipe(), ["student"], out=tmp_path)
    run_quietly(points_recipe(), ["one"], out=tmp_path, replicates=1)
    assert not list(tmp_path.glob("student-*"))
    assert set(np.load(tmp_path / "curves.npz")) == {"x", "true", "one"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategies": ["student", "two"]}, "unknown strategy two; there are student, bo3, one, bo3-big, one-big"),
        ({"strategies": []}, "at least one strategy"),
        ({"strategies": ["one", "one"]}, "each once"),
        ({"replicates": 0}, "replicates"),
        ({"seed": -1}, "seed"),
        ({"budget": 0.0}, "budget must be above 0"),
        ({"device": "cuda:99"}, "can't train on device cuda:99"),
        ({"device": "toaster"}, "can't train on device toaster"),
    ],
)
def test_wrong_arguments_are_refused_before_training(changes, message):
    with pytest.raises(ValueError, match=message):
        run_quietly(points_recipe(), **changes)

"""Strategies at equal cost: what they start from, what they may spend, and what they learn from."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fastmerge import methods
from fastmerge.experiments.column import Column
from fastmerge.experiments.lab import Lab
from fastmerge.experiments.place import Place
from fastmerge.experiments.recipes import Recipe
from fastmerge.experiments.run import teacher
from fastmerge.experiments.strategies import STRATEGIES
from fastmerge.merging.options import Plan
from fastmerge.schedules import PAPERS_GATE_LR
from fastmerge.stack import Stack
from tiny_recipes import images_recipe, run_quietly

pytestmark = pytest.mark.usefixtures("no_gate_warnings")


def longer(**changes) -> Recipe:
    """Of 24 epochs, so that a merge leaves something to fine-tune for."""
    recipe = images_recipe().scaled(2)
    return replace(recipe, **{"test_every": 100} | changes)


def a_lab(recipe: Recipe, replicates: tuple[int, ...] = (0, 1)) -> Lab:
    place = Place(recipe=recipe, data=None, device=torch.device("cpu"), seed=0).opened_here()
    return Lab(place, replicates, "test")


@pytest.fixture(scope="module")
def taught() -> tuple[Lab, list[Column]]:
    """A lab and the three teachers of two replicates."""
    lab = a_lab(longer())
    return lab, [teacher(lab, number) for number in range(3)]


def follow(taught: tuple[Lab, list[Column]], name: str) -> Column:
    lab, teachers = taught
    return STRATEGIES[name].run(lab, teachers[: STRATEGIES[name].teachers(lab.recipe)])


@pytest.mark.parametrize(
    "name", ["ours", "ours-3", "restart", "cyclic-swa", "distill", "distill-fresh", "repair", "zipit-distill"]
)
def test_all_spend_what_one_long_network_does(taught, name: str) -> None:
    """Not more, and less by no more than an epoch, whatever their epochs are."""
    before = [copy.deepcopy(column.networks[0].state_dict()) for column in taught[1]]
    column = follow(taught, name)
    assert len(column.values) == 2
    assert all(math.isfinite(value) for value in column.values)
    assert 23 - 1e-6 <= column.cost <= 24 + 1e-6
    assert column.epochs <= 24
    for each, state in zip(taught[1], before, strict=True):  # which other strategies start from
        assert all(torch.equal(tensor, state[key]) for key, tensor in each.networks[0].state_dict().items())


class Planned(Lab):
    """Notes what would be trained, and what it would cost."""

    def train(self, networks, plan, stage="training", number=0, after=(), teachers=(), **options) -> Column:
        self.seen.append((stage, plan.epochs))
        return self._of_cost(networks, after, plan.epochs, plan.epochs + len(teachers) / 3)

    def merge(self, teachers, stage="student", number=0, **options) -> Column:
        lengths = options["merge_epochs"], options["finetune_epochs"]
        self.seen.append((stage, number, len(teachers), *lengths))
        cost = self.merging_cost(len(teachers), **options) + lengths[1] + len(teachers) / 3
        return self._of_cost(teachers[0].networks, teachers, sum(lengths), cost)

    def _of_cost(self, networks, before, epochs, cost) -> Column:
        epochs, cost = epochs + sum(each.epochs for each in before), cost + sum(each.cost for each in before)
        return Column(list(networks), [0.5], epochs=epochs, cost=cost)


def test_many_teachers_share_what_two_have() -> None:
    """Teachers are shorter the more they are, the merge stage of all at once too; pairs are merged with pairs."""
    lab = a_lab(longer().scaled(2), (0,))
    lab = Planned(lab.place, (0,), "test")
    lab.seen = []
    column = STRATEGIES["recursive-4"].run(lab, [])
    assert 47 - 1e-6 <= column.cost <= 48 + 1e-6
    assert lab.seen[:4] == [("test, teacher", 8)] * 4
    one, other, last = lab.seen[4:]
    assert one[:4] == ("recursive-4-4", 0, 2, 1)
    assert other == ("recursive-4-4", 1, 2, 1, one[4])
    assert last[:4] == ("recursive-4", 0, 2, 1)
    assert abs(last[4] - 2 * one[4]) <= 2
    lab.seen = []
    column = STRATEGIES["ours-4"].run(lab, [])
    assert 47 - 1e-6 <= column.cost <= 48 + 1e-6
    assert lab.seen[:4] == [("test, teacher", 8)] * 4
    assert lab.seen[4][:4] == ("ours-4", 0, 4, 1)
    assert lab.costs(4)[1] > lab.costs(2)[1] > 2


def test_the_cost_is_what_was_counted_while_it_trained(taught) -> None:
    """Teachers that are asked once take a forward pass each; where images change at random, one an epoch."""
    lab, teachers = taught
    column = lab.train(
        teachers[0].networks, Plan(epochs=4, lr=0.1), "counted", after=teachers[:1], teachers=teachers[:2]
    )
    assert column.cost == pytest.approx(8 + 4 + 2 / 3)
    changing = a_lab(longer(augment=lambda images, noise: images))
    again = [teacher(changing, number) for number in range(2)]
    column = changing.train(again[0].networks, Plan(epochs=4, lr=0.1), "counted", after=again[:1], teachers=again)
    assert column.cost == pytest.approx(8 + 4 * (1 + 2 / 3))
    column = STRATEGIES["distill"].run(changing, again)
    assert 24 - 5 / 3 < column.cost <= 24 + 1e-6
    assert column.epochs == 16 + 4


def test_asked_once_or_at_every_step_networks_learn_the_same(taught) -> None:
    lab, teachers = taught
    plan = Plan(epochs=3, lr=0.1)
    changing = a_lab(longer(augment=lambda images, noise: images))
    columns = [
        each.train(teachers[0].networks, plan, "same", after=teachers, teachers=teachers[1:])
        for each in (lab, changing)
    ]
    plain = lab.train(teachers[0].networks, plan, "plain", after=teachers)
    for once, always, alone in zip(*(column.networks for column in (*columns, plain)), strict=True):
        for name, tensor in once.state_dict().items():
            torch.testing.assert_close(tensor, always.state_dict()[name], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(once.fc3.bias, alone.fc3.bias, atol=1e-3)


def test_a_methods_network_is_the_methods(taught) -> None:
    """Straight away, replicate by replicate, before it is fine-tuned; reports have its score."""
    lab, teachers = taught
    column = lab.apply("transplant", teachers[:2])
    assert column.epochs == 16 < column.cost < 16.1  # by a forward pass of two samples each, for the channel groups
    example = [(torch.zeros(2, 1, 8, 8), torch.zeros(2))]
    for row, network in enumerate(column.networks):
        expected = methods.transplant([each.networks[row] for each in teachers[:2]], example)
        assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in network.state_dict().items())
    tuned = follow(taught, "transplant")
    scores = [history.borders["compressed"] for history in tuned.histories]
    assert [score.accuracy for score in scores] == column.values
    assert tuned.curves[0][0] == (16, {"test_loss": scores[0].loss, "test_accuracy": column.values[0]})


def test_an_ensemble_is_the_mean_of_its_networks(taught) -> None:
    lab, teachers = taught
    column = follow(taught, "ensemble-3")
    assert column.cost == 24
    data = lab.place.dataset[0]
    x = data.normalise(data.test_inputs)
    for row, value in enumerate(column.values):
        mean = torch.stack([each.networks[row].eval()(x) for each in teachers]).mean(0)
        assert value == pytest.approx((mean.argmax(1) == data.test_targets).double().mean().item())
    assert follow(taught, "ensemble").cost == 16


def test_the_paper_is_the_papers_whatever_the_recipe_says(monkeypatch) -> None:
    seen = []
    lab = a_lab(longer())
    lab.recipe = lab.recipe.varied(link_at=0.5, distill=0.7)
    monkeypatch.setattr(lab, "merge", lambda teachers, stage, **options: seen.append(options))
    STRATEGIES["paper"].run(lab, [])
    assert {"link_at": 0.0, "distill": 0.0, "recalibrate": False, "gate_lr": 0.1}.items() <= seen[0].items()
    lab.recipe = replace(lab.recipe, merge=replace(lab.recipe.merge, gate_lr=None))
    STRATEGIES["paper"].run(lab, [])
    assert seen[1]["gate_lr"] == PAPERS_GATE_LR


def test_weight_decay_is_chosen_on_held_out_data(taught, monkeypatch) -> None:
    lab = taught[0]
    columns = []
    train, ranks = Lab.train, [[(2.0, 0.0)] * 2, [(0.0, 9.0), (1.0, 9.0)], [(1.0, 0.0)] * 2]
    monkeypatch.setattr(Lab, "train", lambda *a, **o: columns.append(train(*a, **o)) or columns[-1])
    monkeypatch.setattr(Lab, "ranks", lambda self, column: ranks[[each is column for each in columns].index(True)])
    assert follow(taught, "one-cosine") is columns[1]
    norms = [sum(float(p.detach().norm()) for p in column.networks[0].parameters()) for column in columns]
    assert norms[0] > norms[1] > norms[2]
    assert lab.recipe.long.epochs == columns[1].epochs == columns[1].cost


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x)).relu().flatten(1))


def test_averaged_snapshots_get_statistics_of_their_own() -> None:
    lab = a_lab(longer(make_network=lambda classes, width: Normed()))
    column = STRATEGIES["cyclic-swa"].run(lab, [teacher(lab, 0)])
    data = lab.place.dataset[0]
    x = data.normalise(data.train_inputs)
    for network in column.networks:
        mean = network.conv(x).mean((0, 2, 3))
        torch.testing.assert_close(network.norm.running_mean, mean, rtol=0.05, atol=0.05)
    assert column.cost == 24


def test_a_replicate_that_diverges_in_the_middle_is_left_out(taught) -> None:
    lab, teachers = taught
    networks = [teachers[0].networks[0], None]
    column = lab.train(networks, Plan(epochs=2, lr=0.1), "middle", after=teachers[:1])
    alone = lab.only([0]).train(networks[:1], Plan(epochs=2, lr=0.1), "middle", after=[teachers[0].only([0])])
    assert column.networks[1] is None
    assert math.isnan(column.values[1])
    assert column.values[0] == alone.values[0]
    assert isinstance(lab.together(teachers[0].networks), Stack)


def test_a_merge_that_would_cost_too_much_is_refused(taught) -> None:
    lab, teachers = taught
    with pytest.raises(
        ValueError, match=r"columns, test: no epoch is left for fine-tuning, since .* of the cost of 24 epochs"
    ):
        lab.merge_for(teachers[:2], "dear", merge_epochs=20)


def test_results_have_losses_and_scores_at_once(tmp_path: Path) -> None:
    found = run_quietly(longer(), ["average", "one"], replicates=2)["strategies"]
    assert [len(found["average"][key]) for key in ("values", "losses", "at_once")] == [2, 2, 2]
    assert "at_once" not in found["one"]
    assert all(loss > 0 for loss in found["one"]["losses"])

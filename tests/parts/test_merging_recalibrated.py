"""merge(): the compressed student's BatchNorm statistics are those of its own channels, and nothing else is another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import fastmerge.merging.trainer as module
from fastmerge import recalibrate
from fastmerge.experiments.recipes import RECIPES
from fastmerge.merging import merge
from small_task import SHORT, TRAIN, VAL, copies, train_loader

pytestmark = pytest.mark.filterwarnings("ignore:P.g>0. is:UserWarning", "ignore:P.g>0. did not move:UserWarning")


@pytest.fixture(scope="module")
def trained() -> list[nn.Module]:
    return [deep(seed) for seed in (1, 2)]


def deep(seed: int) -> nn.Module:
    """With a BatchNorm that reads channels among which compression chooses."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first, second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3)
        return nn.Sequential(first, nn.ReLU(), second, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))


def merged(trained: list[nn.Module], loader: Any = None, **options: Any) -> tuple[nn.Module, Any]:
    return merge(copies(trained), loader or train_loader(), **SHORT | options)


def statistics(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in network.state_dict().items() if "running" in name}


def test_statistics_are_those_of_training_data(trained: list[nn.Module]) -> None:
    plain, _ = merged(trained, finetune_epochs=0, recalibrate=False)
    student, _ = merged(trained, finetune_epochs=0)
    expected = copies([plain])[0]
    recalibrate(expected, train_loader())
    for name, value in statistics(expected).items():
        assert not torch.allclose(statistics(plain)[name], value, rtol=0.1)
        torch.testing.assert_close(statistics(student)[name], value, atol=0.02, rtol=0.05)  # of other batches
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, student.get_parameter(name))


def test_it_is_scored_with_them(trained: list[nn.Module]) -> None:
    student, history = merged(trained, finetune_epochs=0, val_loader=VAL)
    assert history.borders["compressed"] == history.borders["student"]
    with torch.no_grad():
        loss = nn.functional.cross_entropy(student(VAL[0][0]), VAL[0][1]).item()
    assert history.borders["compressed"].loss == pytest.approx(loss, rel=1e-4)


def test_fine_tuning_trains_as_without(trained: list[nn.Module]) -> None:
    """Its batches, and their random changes, are those that it would have had."""

    def loader() -> DataLoader[Any]:
        return DataLoader(TRAIN, 32, shuffle=True, generator=torch.Generator().manual_seed(5))

    for make in (train_loader, loader):
        students = [merged(trained, make(), recalibrate=chosen)[0] for chosen in (True, False)]
        for one, other in zip(*(student.parameters() for student in students), strict=True):
            assert torch.equal(one, other)


def test_some_thousand_samples_are_enough(trained: list[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []

    def count(network: nn.Module, batches: Any) -> None:
        counts.append([len(inputs[0]) for inputs, _ in batches])

    monkeypatch.setattr(module, "recalibrate", count)
    monkeypatch.setattr(module, "ENOUGH_SAMPLES", 70)
    merged(trained)
    assert counts == [[32, 32, 32]]
    monkeypatch.setattr(module, "has_statistics", lambda network: False)
    merged(trained)
    assert len(counts) == 1


def test_the_papers_recipe_leaves_it_out() -> None:
    recipe = RECIPES["resnet20-cifar100"]()
    assert recipe.merge.recalibrate
    assert not recipe.varied(paper=True).merge.recalibrate

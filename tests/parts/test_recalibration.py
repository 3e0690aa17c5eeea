"""recalibrate(): BatchNorm statistics are the mean over batches, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastmerge
from fastmerge.batch_statistics import has_statistics
from teachers import make_batch


def network() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, momentum=0.3),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(4, 2, 1),
        nn.BatchNorm2d(2),
    )
    with torch.no_grad():
        for norm in (made[1], made[5]):
            norm.running_mean.fill_(7.0)
            norm.running_var.fill_(9.0)
    return made


def test_statistics_are_means_over_batches() -> None:
    made = network().eval()
    batches = [make_batch(6, (3, 5, 5), seed=seed, dtype=torch.float32) for seed in range(3)]
    before = {name: value.clone() for name, value in made.state_dict().items()}
    fastmerge.recalibrate(made, batches)
    with torch.no_grad():
        first = [made[0](batch) for batch in batches]
    torch.testing.assert_close(made[1].running_mean, torch.stack([x.mean((0, 2, 3)) for x in first]).mean(0))
    torch.testing.assert_close(made[1].running_var, torch.stack([x.var((0, 2, 3)) for x in first]).mean(0))
    with torch.no_grad():  # the second reads what the first makes of each batch, without dropout
        normed = [nn.functional.batch_norm(x, None, None, made[1].weight, made[1].bias, training=True) for x in first]
        second = [made[4](x.relu()) for x in normed]
    torch.testing.assert_close(made[5].running_mean, torch.stack([x.mean((0, 2, 3)) for x in second]).mean(0))
    for name, value in made.state_dict().items():
        assert ("running" in name or "num_batches" in name) or torch.equal(value, before[name])
    assert made[1].momentum == 0.3
    assert not any(module.training for module in made.modules())


def test_modes_and_pairs_and_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.norm(a + b)

    made = Two().train()
    made.norm.eval()
    a, b = torch.randn(8, 3), torch.randn(8, 3)
    fastmerge.recalibrate(made, [((a, b), torch.zeros(8))])
    torch.testing.assert_close(made.norm.running_mean, (a + b).mean(0))
    assert made.training
    assert not made.norm.training


def test_without_batch_norm_nothing_is_read() -> None:
    plain = nn.Linear(2, 2)
    assert not has_statistics(plain)
    assert not has_statistics(nn.BatchNorm1d(2, track_running_stats=False))
    fastmerge.recalibrate(plain, iter(()))


def test_an_empty_loader_is_refused_and_leaves_modes() -> None:
    made = network()
    with pytest.raises(ValueError, match="at least one batch"):
        fastmerge.recalibrate(made, [])
    assert made[1].momentum == 0.3
    assert made.training


def test_statistics_that_are_not_finite_are_refused_and_the_former_are_back() -> None:
    made = network()
    before = copy.deepcopy(made.state_dict())
    x = torch.randn(8, 3, 4, 4)
    with pytest.raises(
        FloatingPointError, match=r"statistics of '1' became NaN or Inf over 2 batches; look for NaN .* loader"
    ):
        fastmerge.recalibrate(made, [x, x * float("nan")])
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    assert made[1].momentum == 0.3

"""Networks of different sizes side by side train and score as each would alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastmerge.big_student import BigStudent
from fastmerge.data.dataset import Dataset
from fastmerge.gate_budget import GateBudget
from fastmerge.networks.sine_mlp import SineMLP
from fastmerge.schedules import QuadraticLambda
from fastmerge.training.scores import score
from fastmerge.training.stack import Stack
from fastmerge.training.stacked import StackTraining
from fastmerge.training.stacked_step import open_means
from fastmerge.training.stacks import Stacks, StacksTraining
from fastmerge.training.stage import Stage

STEPS = 3  # of an epoch
STAGE = Stage("test", 3, 0.05, 16, F.mse_loss, milestones=(2,), weight_decay=0.01, gate_lr=0.2)


def points(count: int = 42) -> Dataset:
    x = torch.rand(count, 1, generator=torch.Generator().manual_seed(0))
    return Dataset(x, torch.sin(6 * x), x, x)


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def compacted(drop: int) -> BigStudent:
    """A big student whose gates have closed in some places, and which has lost those channels."""
    big = BigStudent(SineMLP(), SineMLP())
    big.link()
    (gate,) = big.gates.values()
    gate.loc.data[:drop] = -9.0
    big.compact()
    assert gate.channels == 200 - drop
    return big


def gate_names(big: BigStudent) -> set[str]:
    return {name for name, _ in big.named_parameters() if name.startswith("gates.")}


def test_networks_of_different_sizes_train_and_score_as_alone() -> None:
    torch.manual_seed(0)
    networks, data = [SineMLP(1), SineMLP(2)], points()
    together = Stacks(networks)
    records = list(StacksTraining(together, data, STAGE, generators(2), torch.Generator()).epochs())
    assert [record.epoch for record in records] == [1, 2, 3]
    for index, network in enumerate(networks):
        alone = Stack([network])
        training = StackTraining(alone, data, STAGE, [generators(2)[index]], torch.Generator())
        losses = torch.cat([record.loss for record in training.epochs()])
        assert torch.equal(torch.stack([record.loss[index] for record in records]), losses)
        assert torch.equal(together(data.test_inputs)[index], alone(data.test_inputs)[0])
        found = score(together, data, F.mse_loss)["test_loss"]
        assert found[index] == score(alone, data, F.mse_loss)["test_loss"][0]
        assert torch.equal(together.networks()[index].hidden.weight, alone.network(0).hidden.weight)


def test_dropped_channels_count_as_closed() -> None:
    big = compacted(64)
    assert torch.allclose(open_means(Stack([big]))[0], big.open_state()[0])
    assert open_means(Stack([big])).item() == pytest.approx(0.93 * 136 / 200, abs=0.01)


@pytest.mark.parametrize("schedule", ["quadratic", "budget"])
def test_a_merge_stage_goes_on_with_the_weights_of_all(schedule: str) -> None:
    """From a part of it, from one stack to several, and from a state."""
    data, bigs = points(), [compacted(64), compacted(32)]
    gates = gate_names(bigs[0])

    def fresh() -> QuadraticLambda | GateBudget:
        return QuadraticLambda(0.5, 0.5) if schedule == "quadratic" else GateBudget(9 * STEPS)

    def train(lam: Any, seed: int, state: Any = None, epochs: int = 3) -> tuple[StacksTraining, list[Any]]:
        torch.manual_seed(seed)
        training = StacksTraining(Stacks(bigs), data, STAGE, generators(2), torch.Generator(), lam, gates)
        if state is not None:
            training.load_state_dict(state)
        left = training.epochs()
        return training, [next(left) for _ in range(epochs)]

    lam = fresh()
    whole, records = train(lam, 1)
    assert [tuple(record.gate_loss.shape) for record in records] == [(2,)] * 3
    if isinstance(lam, GateBudget):
        assert lam.done == 3 * STEPS
        assert lam.multipliers is not None
        assert lam.starts is not None
        assert lam.multipliers.shape == (2, 1)
        assert lam.multipliers[0] != lam.multipliers[1]
        assert lam.starts[0] < lam.starts[1]
        kept = lam.multipliers.clone()
        train(lam, 2, epochs=1)  # the next part of the stage
        assert lam.done == 4 * STEPS
        assert (lam.multipliers - kept).abs().max() < kept.abs().max()  # each goes on from its own
    else:
        assert lam.value == records[-1].lam + 0.5 * records[-1].lam ** 0.5
    first, _ = train(fresh(), 1, epochs=2)
    state, random, other = first.state_dict(), torch.get_rng_state(), fresh()
    again, _ = train(other, 3, state, epochs=0)
    torch.set_rng_state(random)
    (last,) = again.epochs()
    assert last.epoch == 3
    assert torch.equal(last.loss, records[-1].loss)
    assert isinstance(other, GateBudget) or other.state_dict() == whole.lam.state_dict()

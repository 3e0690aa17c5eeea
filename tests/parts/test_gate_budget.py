"""The budget that steers itself: its rule written out, that it arrives, and that it goes on from a state dict."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastmerge
from fastmerge.gate_budget import GateBudget
from fastmerge.gated_network import GatedNetwork
from fastmerge.gates import GroupMeans
from fastmerge.networks import small_lenet


class GatesAlone:
    """What a budget sees of a big student."""

    open_state, open_candidates = GatedNetwork.open_state, GatedNetwork.open_candidates
    shares, target = GatedNetwork.shares, GatedNetwork.target
    is_of_teachers_widths = GatedNetwork.is_of_teachers_widths

    def __init__(self, sizes: list[int], teachers: int) -> None:
        self.gates = nn.ModuleDict({f"g{i}": fastmerge.HardConcrete(teachers * size) for i, size in enumerate(sizes)})
        self._gate_modules = tuple(self.gates.values())
        self.groups = [SimpleNamespace(name=f"g{i}", size=size) for i, size in enumerate(sizes)]
        self.num_teachers = teachers
        self.widths = {group.name: group.size for group in self.groups}
        counts = [teachers * size for size in sizes]
        self.group_means = GroupMeans(counts, counts)


def gates_alone(sizes: list[int], teachers: int = 2) -> Any:
    return GatesAlone(sizes, teachers)


def open_means(big: Any) -> Tensor:
    return big.open_state()[0]


def test_follows_its_rule() -> None:
    big = gates_alone([3, 10])
    budget = GateBudget(2000, gate_lr=0.1, momentum=0.5, anneal=0.5)
    start, m = open_means(big).detach(), torch.zeros(2)
    answer = 0.1 / 0.5 / torch.tensor([6.0, 20.0])
    for step in range(3):
        t = start + (0.5 - start) * step / 1000
        each = [gate.open_probability().detach() for gate in big.gates.values()]
        p = torch.stack([open_.mean() for open_ in each])
        s = torch.stack([(open_ * (1 - open_)).square().mean() for open_ in each])
        expected = (m * (p - t) + 2.8 * 0.015 / answer / 2 * (p - t) ** 2) / s
        assert budget.loss(big).item() == pytest.approx(expected.sum().item(), rel=1e-4, abs=1e-6)
        m = m + 0.015**2 / answer * (p - t)
        budget.step()
        torch.testing.assert_close(budget.multipliers, m)
        with torch.no_grad():
            for gate in big.gates.values():
                gate.loc += 0.1


def test_settled_gates_are_pushed_as_hard_as_others_up_to_a_limit() -> None:
    big = gates_alone([4])
    budget = GateBudget(1000)
    budget.loss(big)
    budget.done = 600  # the target is 1/2 from here on
    (gate,) = big.gates.values()
    pushes = []
    for loc in (1.0, 3.0, 30.0):
        with torch.no_grad():
            gate.loc.fill_(loc)
        slope = (gate.open_probability() * (1 - gate.open_probability())).detach().mean()
        (force,) = torch.autograd.grad(budget.loss(big), gate.loc)
        pushes.append((force.sum() * slope).item() / (open_means(big).item() - 0.5))
    assert pushes[1] < pushes[0]  # at loc 3 the limit of s is reached
    assert pushes[0] == pytest.approx(2.8 * 0.03 / (2 / 8), rel=1e-3)
    assert pushes[2] == pytest.approx(0, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 500), min_size=1, max_size=3),
    steps=st.integers(120, 500),
    teachers=st.integers(2, 4),
    pull=st.floats(0, 0.5),
    seed=st.integers(0, 2**16),
)
def test_every_group_arrives(sizes: list[int], steps: int, teachers: int, pull: float, seed: int) -> None:
    """Against a criterion that would rather keep some channels open, and is noisy."""
    generator = torch.Generator().manual_seed(seed)
    big = gates_alone(sizes, teachers)
    wishes = [pull * torch.rand(gate.channels, generator=generator) ** 3 for gate in big.gates.values()]
    optimizer = torch.optim.SGD(big.gates.parameters(), 0.2, 0.9)
    budget = GateBudget(steps)
    for _ in range(steps):
        loss = budget.loss(big)
        for gate, wish in zip(big.gates.values(), wishes, strict=True):
            noise = 1 + torch.randn(gate.channels, generator=generator)
            loss = loss - (wish * noise * gate.open_probability()).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        budget.step()
    ends = open_means(big).detach()
    margin = torch.tensor(
        [0.05 + 0.5 / (teachers * size) for size in sizes]
    )  # a single gate can't be half open for good
    assert ((ends - 1 / teachers).abs() < margin).all(), ends


def learner(seed: int = 0) -> tuple[fastmerge.BigStudent, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(seed)
    x, y = torch.randn(40, 1, 8, 8), torch.randint(10, (40,))
    return fastmerge.BigStudent(small_lenet(), small_lenet()), list(zip(x.split(10), y.split(10), strict=True))


def train(big: fastmerge.BigStudent, budget: GateBudget, batches: list[tuple[Tensor, Tensor]], optimizer: Any) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        (cross_entropy(big(x), y) + budget.loss(big)).backward()
        optimizer.step()
        budget.step()


def test_a_users_own_loop_and_its_continuation() -> None:
    big, batches = learner()
    budget, optimizer = GateBudget(16), torch.optim.SGD(big.parameters(), 0.05, 0.9)
    train(big, budget, batches * 2, optimizer)
    state, twin = copy.deepcopy(budget.state_dict()), copy.deepcopy(big)
    twin_optimizer = torch.optim.SGD(twin.parameters(), 0.05, 0.9)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other = GateBudget(1)
    other.load_state_dict(state)
    torch.manual_seed(3)
    train(big, budget, batches * 2, optimizer)
    torch.manual_seed(3)
    train(twin, other, batches * 2, twin_optimizer)
    assert budget.done == other.done == 16
    for one, two in zip(big.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(budget.multipliers, other.multipliers)
    assert budget.multipliers.ne(0).all()


def test_dropped_candidates_count_as_closed() -> None:
    big, _ = learner()
    with torch.no_grad():
        for gate in big.gates.values():
            gate.loc[: gate.channels // 3].fill_(-30)
    before = big.open_state()
    assert big.compact().dropped
    for value, expected in zip(big.open_state(), before, strict=True):
        torch.testing.assert_close(value, expected)


def test_a_step_needs_a_loss() -> None:
    with pytest.raises(RuntimeError, match="there was none"):
        GateBudget(10).step()


@pytest.mark.parametrize(
    ("steps", "options"),
    [(0, {}), (1, {"gate_lr": 0.0}), (1, {"gate_lr": float("inf")}), (1, {"momentum": 1.0}), (1, {"anneal": 0.0})],
)
def test_bad_arguments(steps: int, options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="GateBudget needs steps of at least 1"):
        GateBudget(steps, **options)

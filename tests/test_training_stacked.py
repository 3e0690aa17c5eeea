"""Stacked training equals training each network alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastmerge.big_student import BigStudent
from fastmerge.data.dataset import Dataset
from fastmerge.gate_budget import GateBudget
from fastmerge.networks.lenet import LeNet, small_lenet
from fastmerge.networks.resnet_cifar import ResNetCifar, resnet20
from fastmerge.networks.sine_mlp import SineMLP
from fastmerge.schedules import QuadraticLambda
from fastmerge.training import stacked
from fastmerge.training.stack import Stack
from fastmerge.training.stacked import train
from fastmerge.training.stacked_step import StackedStep
from fastmerge.training.stage import Stage

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 6 * 6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.bn(self.conv(x))).flatten(1))


def images(count: int = 42, size: int = 8, channels: int = 1) -> Dataset:
    x, y = torch.randn(count, channels, size, size), torch.randint(10, (count,))
    return Dataset(x, y, x, y)


def points(count: int = 42) -> Dataset:
    x = torch.rand(count, 1)
    return Dataset(x, torch.sin(6 * x), x, x)


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def alone(network: nn.Module, data: Dataset, stage: Stage, seed: int) -> list[float]:
    """Trains one network with torch's own optimizer and scheduler; returns the mean loss of each epoch."""
    optimizer = torch.optim.SGD(
        network.parameters(), lr=stage.lr, momentum=stage.momentum, weight_decay=stage.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(stage.milestones), stage.lr_decay)
    generator = torch.Generator().manual_seed(seed)
    means = []
    network.train()
    for _ in range(stage.epochs):
        total = 0.0
        for batch in torch.randperm(len(data.train_inputs), generator=generator).split(stage.batch_size):
            loss = stage.criterion(network(data.train_inputs[batch]), data.train_targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        scheduler.step()
        means.append(total / len(data.train_inputs))
    return means


@pytest.mark.parametrize(
    ("make", "data", "criterion"),
    [
        (SineMLP, points, F.mse_loss),
        (small_lenet, images, F.cross_entropy),
        (Normed, images, F.cross_entropy),
        (lambda: LeNet(3, 28), lambda: images(10, 28, 3), F.cross_entropy),  # its convolutions are split
    ],
)
def test_equals_networks_trained_alone(make, data, criterion):
    networks, data = [make() for _ in range(3)], data()
    stage = Stage("test", 4, 0.05, 16, criterion, milestones=(2, 3), momentum=0.8, weight_decay=0.01)
    stack = Stack(networks)
    records = list(train(stack, data, stage, generators(3), torch.Generator()))
    assert [record.epoch for record in records] == [1, 2, 3, 4]
    for index, network in enumerate(networks):
        before = copy.deepcopy(network.state_dict())
        means = alone(network, data, stage, index)
        torch.testing.assert_close(torch.stack([record.loss[index] for record in records]), torch.tensor(means))
        for name, value in network.state_dict().items():
            torch.testing.assert_close(stack.network(index).state_dict()[name], value, **TOLERANCE)
            assert value.ndim == 0 or not torch.equal(value, before[name])


def test_two_stacked_resnet20_equal_two_alone():
    """Running statistics are each network's own; their count of batches is one for all. In float64: twenty layers amplify
    rounding."""
    torch.manual_seed(0)
    networks = [resnet20(10).double() for _ in range(2)]
    x, y = torch.randn(24, 3, 8, 8, dtype=torch.float64), torch.randint(10, (24,))
    data = Dataset(x, y, x, y)
    stage = Stage("test", 2, 0.02, 8, F.cross_entropy, milestones=(1,), weight_decay=1e-4)
    stack = Stack(networks)
    list(train(stack, data, stage, generators(2), torch.Generator()))
    for index, network in enumerate(networks):
        before = copy.deepcopy(network.state_dict())
        alone(network, data, stage, index)
        trained = stack.network(index).state_dict()
        for name, value in network.state_dict().items():
            torch.testing.assert_close(
                trained[name], value, rtol=1e-9, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}"
            )
            assert not torch.equal(value, before[name])
        assert trained["bn1.num_batches_tracked"] == 6
    outputs = stack(data.test_inputs)
    for output, network in zip(outputs, networks, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(output, network.eval()(data.test_inputs), rtol=1e-9, atol=1e-9)


def test_no_momentum_and_no_decay_work_too():
    networks = [SineMLP() for _ in range(2)]
    stage, data = Stage("test", 2, 0.05, 16, F.mse_loss, momentum=0.0), points()
    stack = Stack(networks)
    list(train(stack, data, stage, generators(2), torch.Generator()))
    alone(networks[1], data, stage, 1)
    torch.testing.assert_close(stack.parameters["hidden.weight"][1], networks[1].hidden.weight.detach(), **TOLERANCE)


@pytest.mark.parametrize("make", [small_lenet, lambda: ResNetCifar(1, 10)], ids=["lenet", "resnet"])
def test_a_merge_stage_with_a_budget_equals_that_of_one_big_student(make):
    """Multipliers and running statistics too; same gates drawn, as below."""
    data, stage = (
        images(channels=1 if make is small_lenet else 3),
        Stage("merge", 3, 0.02, 16, F.cross_entropy, gate_lr=0.2),
    )
    big = BigStudent(make(), make(), example_inputs=data.train_inputs[:2])
    big.link()
    stack, budget, alone = Stack([big]), GateBudget(9), GateBudget(9)
    gates = {name for name, _ in big.named_parameters() if name.startswith("gates.")}
    torch.manual_seed(5)
    records = list(train(stack, data, stage, generators(1), torch.Generator(), budget, gates))
    weights = torch.optim.SGD(big.weight_parameters(), lr=0.02, momentum=0.9)
    openers = torch.optim.SGD(big.gate_parameters(), lr=0.2, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(5)
    big.train()
    for _ in range(3):
        for batch in torch.randperm(42, generator=generator).split(16):
            loss = F.cross_entropy(big(data.train_inputs[batch]), data.train_targets[batch]) + alone.loss(big)
            for optimizer in (weights, openers):
                optimizer.zero_grad()
            loss.backward()
            for optimizer in (weights, openers):
                optimizer.step()
            alone.step()
    assert budget.done == alone.done == 9
    torch.testing.assert_close(budget.multipliers[0], alone.multipliers, rtol=1e-3, atol=1e-5)
    assert alone.multipliers.ne(0).all()
    assert records[-1].lam is None
    assert records[-1].gate_loss[0].item() < records[0].gate_loss[0].item()
    trained = stack.network(0).state_dict()
    for name, value in big.state_dict().items():
        torch.testing.assert_close(
            trained[name], value, rtol=2e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


class Graphs:
    """Runs again where a device would replay: results are written into the tensors of the capture.

    Args:
        stack: whose tensors are as before after a capture, in which nothing runs.
    """

    def __init__(self, stack: Stack, waits=(), error=None, loads=False) -> None:
        self.stack, self.waits, self.error = stack, list(waits), error
        self.captures = self.replays = 0

    def aside(self, run):
        return run()

    def watched(self, run):
        return run(), self.waits

    def capture(self, run):
        self.captures += 1
        if self.error is not None:
            raise self.error
        state, drawn = copy.deepcopy(self.stack.kinds), torch.get_rng_state()
        momentum = [copy.deepcopy(optimizer.buffers) for optimizer in self.optimizers]
        results = [torch.empty_like(result) for result in run()]
        torch.set_rng_state(drawn)
        for kind, saved in zip(self.stack.kinds, state, strict=True):
            for name, tensor in kind.items():
                tensor.copy_(saved[name])
        for optimizer, saved in zip(self.optimizers, momentum, strict=True):
            for buffer, value in zip(optimizer.buffers, saved, strict=True):
                buffer.copy_(value)

        def replay():
            self.replays += 1
            for held, new in zip(results, run(), strict=True):
                held.copy_(new)

        return replay, results


def trained_by_graph(big, lam, monkeypatch, **options):
    """A stack of one big student after three epochs of 42 samples, its losses, and the stand-in for the device."""
    data, stage, found = points(), Stage("merge", 3, 0.02, 8, F.mse_loss, milestones=(1,), gate_lr=0.2), []

    class Step(StackedStep):
        def __init__(self, *arguments) -> None:
            graphs = None if options.get("eager") else Graphs(arguments[0], **options)
            super().__init__(*arguments, graphs)
            if graphs is not None:
                graphs.optimizers = self.weights, self.gates
            found.append(graphs)

    monkeypatch.setattr(stacked, "StackedStep", Step)
    stack, gates = Stack([big]), {name for name, _ in big.named_parameters() if name.startswith("gates.")}
    torch.manual_seed(5)
    training = stacked.StackTraining(stack, data, stage, generators(1), torch.Generator(), lam, gates)
    losses = []
    for record in training.epochs():
        losses.append(record.loss.item())
        if options.get("loads"):
            training.load_state_dict(copy.deepcopy(training.state_dict()))
    return stack, losses, found[0]


@pytest.mark.parametrize(("budget", "loads"), [(False, False), (True, False), (True, True)])
def test_a_graph_of_the_step_trains_as_the_step_does(budget, loads, monkeypatch):
    """With a learning rate and a weight of the gates that change, a last batch of another size, and gates that are drawn."""
    big = BigStudent(SineMLP(), SineMLP())
    results = []
    for options in ({"eager": True}, {}):
        lam = GateBudget(18) if budget else QuadraticLambda(0.5, 1.0)
        torch.manual_seed(0)
        if loads:
            options |= {"loads": True}
        results.append(trained_by_graph(big, lam, monkeypatch, **options))
    (eager, expected, _), (graphed, losses, graphs) = results
    assert losses == expected
    for name, value in eager.parameters.items():
        assert torch.equal(graphed.parameters[name], value)
    # Three epochs of five batches, and a sixth of another size; warmed up for three steps, at first or after loading.
    assert (graphs.captures, graphs.replays) == ((3, 6) if loads else (1, 12))


def test_a_step_that_can_not_be_captured_runs_without(monkeypatch):
    big = BigStudent(SineMLP(), SineMLP())
    with pytest.warns(UserWarning, match="run without: they wait for the device, at criterion.py:3"):
        _, _, graphs = trained_by_graph(big, QuadraticLambda(0.5), monkeypatch, waits=["criterion.py:3"])
    assert graphs.captures == 0
    with pytest.warns(UserWarning, match="run without: operation not permitted"):
        _, losses, graphs = trained_by_graph(
            big, QuadraticLambda(0.5), monkeypatch, error=RuntimeError("operation not permitted")
        )
    assert (graphs.captures, graphs.replays) == (1, 0)
    assert losses == trained_by_graph(big, QuadraticLambda(0.5), monkeypatch, eager=True)[1]


def test_replicates_have_budgets_of_their_own():
    data, stage = images(), Stage("merge", 2, 0.02, 16, F.cross_entropy, gate_lr=0.2)
    bigs = [BigStudent(small_lenet(), small_lenet()) for _ in range(2)]
    with torch.no_grad():
        for gate in bigs[1].gates.values():
            gate.loc -= 2
    stack, budget = Stack(bigs), GateBudget(100)
    gates = {name for name, _ in bigs[0].named_parameters() if name.startswith("gates.")}
    list(train(stack, data, stage, generators(2), torch.Generator(), budget, gates))
    torch.testing.assert_close(budget.starts[1], bigs[1].open_state()[0].detach())
    assert (budget.targets[0] - budget.targets[1]).abs().min() > 0.1
    assert (budget.multipliers[0] != budget.multipliers[1]).all()


@pytest.mark.parametrize("linked", [False, True])
def test_a_merge_stage_equals_that_of_one_big_student(linked):
    """Same gates drawn: both read the default generator, sample by sample."""
    data, lam, stage = images(), QuadraticLambda(0.5, 1.0), Stage("merge", 3, 0.02, 16, F.cross_entropy, gate_lr=0.7)
    big = BigStudent(small_lenet(), small_lenet(), example_inputs=data.train_inputs[:2])
    if linked:
        big.link()
    stack = Stack([big])
    gates = {name for name, _ in big.named_parameters() if name.startswith("gates.")}
    torch.manual_seed(5)
    records = list(train(stack, data, stage, generators(1), torch.Generator(), lam, gates))
    assert [record.lam for record in records] == pytest.approx([0.5, 0.5 + 0.5**0.5, lambda_after(0.5, 2)])

    weights = torch.optim.SGD(big.weight_parameters(), lr=0.02, momentum=0.9)
    openers = torch.optim.SGD(big.gate_parameters(), lr=0.7, momentum=0.9)
    lam, generator = QuadraticLambda(0.5, 1.0), torch.Generator().manual_seed(0)
    start = big.gate_loss().item()
    torch.manual_seed(5)
    for _ in range(3):
        for batch in torch.randperm(42, generator=generator).split(16):
            loss = F.cross_entropy(big(data.train_inputs[batch]), data.train_targets[batch]) + lam * big.gate_loss()
            for optimizer in (weights, openers):
                optimizer.zero_grad()
            loss.backward()
            for optimizer in (weights, openers):
                optimizer.step()
        lam.step()
    trained = stack.network(0)
    for (name, value), got in zip(big.named_parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(got, value, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
    assert big.gate_loss().item() < 0.98 * start  # the gates did move
    assert records[0].gate_loss[0].item() == pytest.approx(start, rel=0.2)


def lambda_after(start: float, epochs: int) -> float:
    lam = QuadraticLambda(start, 1.0)
    for _ in range(epochs):
        lam.step()
    return lam.value


def test_gates_are_free_of_weight_decay():
    big, data = BigStudent(SineMLP(), SineMLP()), points()
    locs = []
    for decay in (0.0, 0.5):
        stack = Stack([big, big])
        stage = Stage("merge", 1, 0.0, 16, F.mse_loss, weight_decay=decay, gate_lr=0.1)  # the weights stand still
        torch.manual_seed(1)
        list(train(stack, data, stage, generators(2), torch.Generator(), QuadraticLambda(1.0), {"gates.hidden.loc"}))
        locs.append(stack.parameters["gates.hidden.loc"])
    assert torch.equal(*locs)
    assert not torch.equal(locs[0][0], big.gates["hidden"].loc)


def test_replicates_of_one_big_student_draw_their_own_gates():
    big, data = BigStudent(SineMLP(), SineMLP()), points()
    stack = Stack([big, big])
    stage = Stage("merge", 1, 0.01, 16, F.mse_loss, gate_lr=0.1)
    same_order = [torch.Generator().manual_seed(0) for _ in range(2)]
    list(train(stack, data, stage, same_order, torch.Generator(), QuadraticLambda(1.0), {"gates.hidden.loc"}))
    assert not torch.equal(stack.parameters["gates.hidden.loc"][0], stack.parameters["gates.hidden.loc"][1])


def test_a_network_does_not_feel_the_others():
    """Not even one that is full of NaN."""
    network, other, data = small_lenet(), small_lenet(), images()
    broken = copy.deepcopy(other)
    with torch.no_grad():
        broken.fc1.weight.fill_(torch.nan)
    stage = Stage("test", 2, 0.05, 16, F.cross_entropy)
    states = []
    for neighbour in (other, broken):
        stack = Stack([neighbour, network])
        records = list(train(stack, data, stage, generators(2), torch.Generator()))
        states.append(stack.network(1).state_dict())
    assert records[-1].loss.isnan().tolist() == [True, False]
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))

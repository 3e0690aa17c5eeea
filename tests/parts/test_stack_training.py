"""A stack trained by the one loop equals training each of its networks alone."""

import copy
import math
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastmerge.big_student import BigStudent
from fastmerge.data.dataset import Dataset, StackedBatches
from fastmerge.evaluation import Setting
from fastmerge.gate_budget import GateBudget
from fastmerge.history import History
from fastmerge.merging import steps
from fastmerge.merging.api import merge_by, train_by, trainer_for
from fastmerge.merging.options import Options
from fastmerge.merging.replayed_step import ReplayedStep
from fastmerge.merging.stages import learn_importance
from fastmerge.networks import LeNet, ResNetCifar, SineMLP, resnet20, small_lenet
from fastmerge.schedules import QuadraticLambda
from fastmerge.stack import BigStack, Stack

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
pytestmark = pytest.mark.filterwarnings("ignore:.*P.g>0.:UserWarning")


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


def options(epochs: int, lr: float, criterion, **changes) -> Options:
    """Of plain training, as a merge's fine-tuning."""
    return Options(finetune_epochs=epochs, finetune_lr=lr, criterion=criterion, **{"milestones": ()} | changes)


def test_the_bar_of_a_stack_shows_means(capsys: pytest.CaptureFixture[str]) -> None:
    stacks = [Stack([SineMLP(1) for _ in range(2)]) for _ in range(2)]
    x = torch.rand(2, 8, 1)
    short = Options(merge_epochs=1, finetune_epochs=1, criterion=F.mse_loss, progress=True, seed=0)
    _, history = merge_by(short, stacks, [(x, torch.sin(6 * x))])
    losses = [sum(record.train.loss) / 2 for record in history.epochs]
    shown = capsys.readouterr().err
    assert all(f"loss={loss:.4f}" in shown for loss in losses)
    assert "P[g>0]=0.9" in shown


def alone(network: nn.Module, data: Dataset, given: Options, seed: int, batch_size: int = 16) -> list[float]:
    """Trains one network with torch's own optimizer and scheduler; returns the mean loss of each epoch."""
    optimizer = torch.optim.SGD(
        network.parameters(), lr=given.finetune_lr, momentum=given.momentum, weight_decay=given.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(given.milestones))
    generator = torch.Generator().manual_seed(seed)
    means = []
    network.train()
    for _ in range(given.finetune_epochs):
        total = 0.0
        for batch in torch.randperm(len(data.train_inputs), generator=generator).split(batch_size):
            loss = given.criterion(network(data.train_inputs[batch]), data.train_targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        scheduler.step()
        means.append(total / len(data.train_inputs))
    return means


def train(stack: Stack, data: Dataset, given: Options, batch_size: int = 16, orders=None) -> History:
    loader = StackedBatches(data, batch_size, orders or generators(len(stack)))
    return train_by(given, stack.train(), loader)


@contextmanager
def merging(stack: BigStack, data: Dataset, given: Options, batch_size: int = 16):
    loader = StackedBatches(data, batch_size, generators(len(stack)))
    setting = Setting(torch.device("cpu"), given.criterion)
    with trainer_for(given, setting, loader, None, History(2), None, {}, None) as trainer:
        yield trainer


def merge_stage(stack: BigStack, data: Dataset, given: Options, batch_size: int = 16) -> History:
    """The merge stage of the stack, with the draws of seed 5."""
    with merging(stack, data, given, batch_size) as trainer:
        torch.manual_seed(5)
        learn_importance(stack, given.fitted(stack, trainer.steps), trainer)
        return trainer.history


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
    given = options(4, 0.05, criterion, milestones=(2, 3), momentum=0.8, weight_decay=0.01)
    stack = Stack(networks)
    records = train(stack, data, given).epochs
    assert [record.epoch for record in records] == [1, 2, 3, 4]
    for index, network in enumerate(networks):
        before = copy.deepcopy(network.state_dict())
        means = alone(network, data, given, index)
        assert [record.train.loss[index] for record in records] == pytest.approx(means, rel=1e-5)
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
    given = options(2, 0.02, F.cross_entropy, milestones=(1,), weight_decay=1e-4)
    stack = Stack(networks)
    train(stack, data, given, 8)
    for index, network in enumerate(networks):
        before = copy.deepcopy(network.state_dict())
        alone(network, data, given, index, 8)
        trained = stack.network(index).state_dict()
        for name, value in network.state_dict().items():
            torch.testing.assert_close(
                trained[name], value, rtol=1e-9, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}"
            )
            assert not torch.equal(value, before[name])
        assert trained["bn1.num_batches_tracked"] == 6
    with torch.no_grad():
        outputs = stack(x.expand(2, *x.shape).contiguous())
        for output, network in zip(outputs, networks, strict=True):
            torch.testing.assert_close(output, network.eval()(x), rtol=1e-9, atol=1e-9)


def test_statistics_are_estimated_anew_for_each():
    networks, x = [Normed() for _ in range(2)], torch.randn(2, 40, 1, 8, 8)
    stack = Stack(networks)
    stack.recalibrate([((x[:, :20],), None), ((x[:, 20:],), None)])
    for network, each in zip(stack.networks(), x, strict=True):
        features = network.conv(each)
        torch.testing.assert_close(network.bn.running_mean, features.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_no_momentum_and_no_decay_work_too():
    networks = [SineMLP() for _ in range(2)]
    given, data = options(2, 0.05, F.mse_loss, momentum=0.0), points()
    stack = Stack(networks)
    train(stack, data, given)
    alone(networks[1], data, given, 1)
    torch.testing.assert_close(stack.skeleton.hidden.weight[1], networks[1].hidden.weight, **TOLERANCE)


def by_hand(big: BigStudent, data: Dataset, given: Options, weigh, batch_size: int = 16) -> None:
    """The merge stage of one big student, written out; ``weigh`` is a budget or λ."""
    weights = torch.optim.SGD(big.weight_parameters(), lr=given.lr, momentum=0.9)
    openers = torch.optim.SGD(big.gate_parameters(), lr=given.gate_lr, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(5)
    big.train()
    for epoch in range(given.merge_epochs):
        if not big.linked and epoch >= given.link_at * given.merge_epochs:
            big.link(weights)
        for batch in torch.randperm(len(data.train_inputs), generator=generator).split(batch_size):
            added = weigh.loss(big) if isinstance(weigh, GateBudget) else weigh * big.gate_loss()
            loss = given.criterion(big(data.train_inputs[batch]), data.train_targets[batch]) + added
            for optimizer in (weights, openers):
                optimizer.zero_grad()
            loss.backward()
            for optimizer in (weights, openers):
                optimizer.step()
            if isinstance(weigh, GateBudget):
                weigh.step()
        weigh.end_epoch()


@pytest.mark.parametrize("make", [small_lenet, lambda: ResNetCifar(1, 10)], ids=["lenet", "resnet"])
def test_a_merge_stage_with_a_budget_equals_that_of_one_big_student(make, monkeypatch):
    """Multipliers and running statistics too; same gates drawn, as below."""
    data = images(channels=1 if make is small_lenet else 3)
    given = Options(
        merge_epochs=3, lr=0.02, criterion=F.cross_entropy, gate_lr=0.2, gate_schedule="budget", recalibrate=False
    )
    big = BigStudent(make(), make(), example_inputs=data.train_inputs[:2])
    stack, single, budgets = BigStack([big]), GateBudget(9), []
    monkeypatch.setattr(Options, "gate_weight", lambda *_: budgets.append(GateBudget(9)) or budgets[0])
    records = merge_stage(stack, data, given).epochs
    by_hand(big, data, given, single)
    (budget,) = budgets
    assert budget.done == single.done == 9
    torch.testing.assert_close(budget.multipliers[0], single.multipliers, rtol=1e-3, atol=1e-5)
    assert single.multipliers.ne(0).all()
    assert records[-1].lam is None
    assert records[-1].gate_loss[0] < records[0].gate_loss[0]
    trained = stack.network(0).state_dict()
    for name, value in big.state_dict().items():
        torch.testing.assert_close(
            trained[name], value, rtol=2e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("link_at", [0.0, 0.4, 1.0])
def test_a_merge_stage_equals_that_of_one_big_student(link_at):
    """Same gates drawn: both read the default generator, sample by sample. Linking carries the momentum along."""
    data = images()
    given = Options(
        merge_epochs=3, lr=0.02, criterion=F.cross_entropy, gate_lr=0.7, lam_start=0.5, lam_step=1.0, link_at=link_at
    )
    big = BigStudent(small_lenet(), small_lenet(), example_inputs=data.train_inputs[:2])
    stack, start = BigStack([big]), big.train().gate_loss().item()
    records = merge_stage(stack, data, given).epochs
    assert [record.lam for record in records] == pytest.approx([0.5, 0.5 + 0.5**0.5, lambda_after(0.5, 2)])
    assert [record.linked for record in records] == [link_at == 0.0, link_at == 0.0, link_at < 1.0]
    by_hand(big, data, given, QuadraticLambda(0.5, 1.0))
    for (name, value), got in zip(big.named_parameters(), stack.network(0).parameters(), strict=True):
        torch.testing.assert_close(got, value, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
    assert big.gate_loss().item() < 0.98 * start  # the gates did move
    assert records[0].gate_loss[0] == pytest.approx(start, rel=0.2)


def lambda_after(start: float, epochs: int) -> float:
    lam = QuadraticLambda(start, 1.0)
    for _ in range(epochs):
        lam.step()
    return lam.value


class Graphs:
    """Runs again where a device would replay: results are written into the tensors of the capture.

    Args:
        step: whose tensors are as before after a capture, in which nothing runs.
    """

    def __init__(self, waits=(), error=None) -> None:
        self.waits, self.error = list(waits), error
        self.captures = self.replays = 0

    def aside(self, run):
        return run()

    def watched(self, run):
        return run(), self.waits

    def capture(self, run):
        self.captures += 1
        if self.error is not None:
            raise self.error
        held = [*self.step.stack.parameters(), *self.step.stack.buffers()]
        held += [value for o in self.step.optimizers for each in o.state.values() for value in each.values()]
        state, drawn = [value.detach().clone() for value in held], torch.get_rng_state()
        results = [torch.empty_like(result) for result in run()]
        torch.set_rng_state(drawn)
        with torch.no_grad():
            for value, saved in zip(held, state, strict=True):
                value.copy_(saved)

        def replay():
            self.replays += 1
            for kept, new in zip(results, run(), strict=True):
                kept.copy_(new)

        return replay, results


def trained_by_graph(big, budget, monkeypatch, eager=False, **how):
    """A stack of one big student after three epochs of 42 samples, its losses, and the stand-in for the device."""
    found = []

    def made(*arguments, **named):
        graphs = None if eager else Graphs(**how)
        step = ReplayedStep(*arguments, graphs, **named)
        if graphs is not None:
            graphs.step = step
        found.append(graphs)
        return step

    given = Options(
        merge_epochs=3,
        link_at=0.0,
        lr=0.02,
        criterion=F.mse_loss,
        merge_milestones=(1,),
        gate_lr=0.2,
        lam_start=0.5,
        lam_step=1.0,
        gate_schedule="budget" if budget else "quadratic",
    )
    monkeypatch.setattr(steps, "ReplayedStep", made)
    stack = BigStack([big])
    history = merge_stage(stack, points(), given, 8)
    return stack, [record.train.loss[0] for record in history.epochs], found[0]


@pytest.mark.parametrize("budget", [False, True])
def test_a_graph_of_the_step_trains_as_the_step_does(budget, monkeypatch):
    """With a learning rate and a weight of the gates that change, a last batch of another size, and gates that are drawn."""
    big = BigStudent(SineMLP(), SineMLP())
    results = []
    for eager in (True, False):
        torch.manual_seed(0)
        results.append(trained_by_graph(big, budget, monkeypatch, eager))
    (expected, losses, _), (graphed, graph_losses, graphs) = results
    assert graph_losses == losses
    for ours, theirs in zip(graphed.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    # Three epochs of five batches, and a sixth of another size; warmed up for three steps.
    assert (graphs.captures, graphs.replays) == (1, 12)


def test_a_step_whose_tensors_were_replaced_is_captured_anew(monkeypatch):
    """As after a checkpoint was loaded."""
    stack, data = Stack([SineMLP()]), points()
    given = options(1, 0.05, F.mse_loss)
    optimizer = given.weight_optimizer(stack, 0.05)
    graphs = Graphs()
    step = graphs.step = ReplayedStep(stack, [optimizer], Setting(torch.device("cpu"), F.mse_loss), None, graphs)
    for epoch in range(2):
        step.renew()
        for inputs, targets in list(StackedBatches(data, 8, generators(1)))[:5]:
            step((inputs,), targets)
        assert graphs.captures == epoch + 1
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_a_step_that_can_not_be_captured_runs_without(monkeypatch):
    big = BigStudent(SineMLP(), SineMLP())
    with pytest.warns(UserWarning, match="runs without: it waits for the device, at criterion.py:3"):
        _, _, graphs = trained_by_graph(big, False, monkeypatch, waits=["criterion.py:3"])
    assert graphs.captures == 0
    error = RuntimeError("operation not permitted")
    with pytest.warns(UserWarning, match="runs without: operation not permitted"):
        _, losses, graphs = trained_by_graph(big, False, monkeypatch, error=error)
    assert (graphs.captures, graphs.replays) == (1, 0)
    assert losses == trained_by_graph(big, False, monkeypatch, eager=True)[1]


def test_replicates_have_budgets_of_their_own(monkeypatch):
    data = images()
    given = Options(merge_epochs=2, lr=0.02, gate_lr=0.2, gate_schedule="budget")
    bigs = [BigStudent(small_lenet(), small_lenet()) for _ in range(2)]
    with torch.no_grad():
        for gate in bigs[1].gates.values():
            gate.loc -= 2
    budget = GateBudget(100)
    monkeypatch.setattr(Options, "gate_weight", lambda *_: budget)
    merge_stage(BigStack(bigs), data, given)
    torch.testing.assert_close(budget.starts[1], bigs[1].open_state()[0].detach())
    assert (budget.targets[0] - budget.targets[1]).abs().min() > 0.1
    assert (budget.multipliers[0] != budget.multipliers[1]).all()


def test_gates_are_free_of_weight_decay():
    big, data = BigStudent(SineMLP(), SineMLP()), points()
    locs = []
    for decay in (0.0, 0.5):
        stack = BigStack([big, big])
        given = Options(merge_epochs=1, lr=1e-30, criterion=F.mse_loss, weight_decay=decay, gate_lr=0.1, lam_start=1.0)
        merge_stage(stack, data, given)
        locs.append(stack.gates["hidden"].loc)
    assert torch.equal(*locs)
    assert not torch.equal(locs[0][0], big.gates["hidden"].loc)


def test_replicates_of_one_big_student_draw_their_own_gates():
    big, data = BigStudent(SineMLP(), SineMLP()), points()
    stack = BigStack([big, big])
    given = Options(merge_epochs=1, criterion=F.mse_loss, gate_lr=0.1, lam_start=1.0)
    loader = StackedBatches(data, 16, [torch.Generator().manual_seed(0) for _ in range(2)])
    with trainer_for(
        given, Setting(torch.device("cpu"), F.mse_loss), loader, None, History(2), None, {}, None
    ) as trainer:
        learn_importance(stack, given.fitted(stack, trainer.steps), trainer)
    assert not torch.equal(stack.gates["hidden"].loc[0], stack.gates["hidden"].loc[1])


def test_a_network_does_not_feel_the_others():
    """Not even one that is full of NaN."""
    network, other, data = small_lenet(), small_lenet(), images()
    broken = copy.deepcopy(other)
    with torch.no_grad():
        broken.fc1.weight.fill_(torch.nan)
    states = []
    for neighbour in (other, broken):
        stack = Stack([neighbour, network])
        history = train(stack, data, options(2, 0.05, F.cross_entropy))
        states.append(stack.network(1).state_dict())
    assert [math.isnan(loss) for loss in history.epochs[-1].train.loss] == [True, False]
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


def test_stacks_train_in_float32_alone():
    given = options(1, 0.05, F.mse_loss, autocast=torch.bfloat16)
    with pytest.raises(ValueError, match=r"stacked networks train without autocast; got torch\.bfloat16"):
        train(Stack([SineMLP()]), points(), given)

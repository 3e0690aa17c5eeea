"""On a GPU: captured steps against eager ones, and whole merges with and without a graph."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastmerge.kernels.cuda_graph import capture
from torch import Tensor, nn
from torch.optim import SGD

import fastmerge
from fastmerge.data.dataset import Dataset, StackedBatches
from fastmerge.evaluation import Setting
from fastmerge.gate_budget import GateBudget
from fastmerge.merging.api import train_by
from fastmerge.merging.graphed_step import MEASURED, WARM_UP, Graphed, GraphedStep
from fastmerge.merging.options import Options
from fastmerge.merging.steps import MergeStep
from fastmerge.networks import ResNetCifar
from fastmerge.schedules import GateWeight, QuadraticLambda
from fastmerge.stack import Stack
from teachers import OPEN, set_gates

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
STEPS = WARM_UP + 12


def teachers() -> list[nn.Module]:
    made = []
    for seed in range(2):
        torch.manual_seed(seed)
        made.append(ResNetCifar(blocks=1, num_classes=10).to(DEVICE))
    return made


def make_step(autocast: torch.dtype | None, lam: GateWeight | None, open_gates: bool = True) -> MergeStep:
    setting = Setting(DEVICE, F.cross_entropy, autocast, channels_last=True)
    torch.manual_seed(5)
    big = setting.place(fastmerge.BigStudent(*teachers())).train()
    set_gates(big, OPEN if open_gates else 0.0)
    optimizers = [SGD(big.weight_parameters(), 0.01, 0.9, weight_decay=1e-4), SGD(big.gate_parameters(), 0.1, 0.9)]
    return MergeStep(big, optimizers, setting, torch.amp.GradScaler("cuda", enabled=autocast is torch.float16), lam)


def batch(number: int, size: int = 32) -> tuple[tuple[Tensor, ...], Tensor]:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(size, 3, 32, 32, generator=generator).to(DEVICE, memory_format=torch.channels_last)
    return (x,), torch.randint(0, 10, (size,), generator=generator).to(DEVICE)


@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("budget", [False, True])
def test_replays_are_eager_steps(autocast: torch.dtype | None, linked: bool, budget: bool) -> None:
    """Losses along a run of changing learning rates and λ, with open gates, whose draws are all one."""
    losses: list[list[float]] = []
    for wanted in (False, True):
        step = make_step(autocast, GateBudget(40, gate_lr=0.1) if budget else QuadraticLambda(0.1))
        if linked:
            assert isinstance(step.network, fastmerge.BigStudent)
            step.network.link(step.optimizers[0])
        run: Any = GraphedStep(step, True) if wanted else step
        found = []
        for number in range(STEPS):
            step.optimizers[0].param_groups[0]["lr"] = 0.01 / (1 + number)
            if isinstance(step.lam, QuadraticLambda):
                step.lam.step()
            _, values = run(*batch(number, 20 if number % 6 == 5 else 32))
            found.append(values["loss"].item())
        losses.append(found)
        assert run.replays if wanted else True
    assert all(math.isfinite(value) for value in losses[1])
    tolerance = 1e-3 if autocast is None else 5e-2
    torch.testing.assert_close(losses[1], losses[0], rtol=tolerance, atol=tolerance)


def test_gates_draw_anew_in_every_replay() -> None:
    """The same batch again and again, with learning rates of zero: losses differ, and a seed repeats them."""
    runs = []
    for _ in range(2):
        step = make_step(None, None, open_gates=False)
        for optimizer in step.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
        graph = GraphedStep(step, True)
        torch.manual_seed(9)
        runs.append([graph(*batch(0))[1]["loss"].item() for _ in range(STEPS)])
    assert len(set(runs[0])) == STEPS
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-4, atol=1e-4)


def test_a_seed_draws_the_same_gates_with_a_graph_and_without() -> None:
    runs = []
    for wanted in (False, True):
        step = make_step(None, None, open_gates=False)
        for optimizer in step.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
        run: Any = GraphedStep(step, True) if wanted else step
        torch.manual_seed(9)
        runs.append([run(*batch(0))[1]["loss"].item() for _ in range(STEPS)])
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-3, atol=1e-3)


def test_linking_captures_anew() -> None:
    step = make_step(torch.bfloat16, QuadraticLambda(0.1))
    graph = GraphedStep(step, True)
    for number in range(STEPS):
        graph(*batch(number))
    assert graph.replays
    assert isinstance(step.network, fastmerge.BigStudent)
    step.network.link(step.optimizers[0])
    graph.renew()
    assert not graph.replays
    before = copy.deepcopy(step.network.state_dict())
    for number in range(STEPS):
        _, losses = graph(*batch(number))
        assert math.isfinite(losses["loss"].item())
    assert graph.replays
    assert any(not torch.equal(value, before[name]) for name, value in step.network.state_dict().items())


def test_what_is_measured_decides() -> None:
    graph = GraphedStep(make_step(torch.bfloat16, QuadraticLambda(0.1)))
    for number in range(WARM_UP + 2 * MEASURED + 3):
        graph(*batch(number))
    assert len(graph._eager_times) == len(graph._graph_times) == MEASURED


# So few steps leave gates where they are.
@pytest.mark.filterwarnings("ignore:P.g>0. :UserWarning")
@pytest.mark.parametrize("autocast", [None, torch.float16], ids=str)
@pytest.mark.parametrize("cuda_graph", [False, True, None])
def test_a_whole_merge(autocast: torch.dtype | None, cuda_graph: bool | None) -> None:
    batches = [(x[0].contiguous(), y) for x, y in (batch(number, 32 if number < 15 else 20) for number in range(16))]
    student, history = fastmerge.merge(
        teachers(),
        batches,
        merge_epochs=3,
        finetune_epochs=1,
        link_at=0.5,
        autocast=autocast,
        channels_last=True,
        cuda_graph=cuda_graph,
        seed=0,
        lam_step=0.05,
        progress=False,
    )
    assert all(math.isfinite(record.train.loss) for record in history.epochs)
    assert not student.training
    torch.cuda.synchronize()


@pytest.mark.parametrize("autocast", [None, torch.float16], ids=str)
def test_a_criterion_that_waits_runs_eagerly(autocast: torch.dtype | None) -> None:
    step = make_step(autocast, QuadraticLambda(0.1))
    step.setting = Setting(DEVICE, lambda output, target: F.cross_entropy(output, target) * (1 + target.sum().item()))
    graph = GraphedStep(step)
    for number in range(MEASURED + WARM_UP - 1):
        graph(*batch(number))
    with pytest.warns(UserWarning, match=r"it waits for the device, at .*test_graphed_step_gpu.py:\d+"):
        graph(*batch(49))
    assert math.isfinite(graph(*batch(50))[1]["loss"].item())


def test_work_goes_on_after_a_failed_capture() -> None:
    stream, before = torch.cuda.current_stream(), torch.cuda.get_rng_state()
    x = torch.ones(3, device=DEVICE)
    with pytest.raises(RuntimeError):
        capture(lambda: torch.rand(3, device=DEVICE) * x.sum().item(), DEVICE)
    assert torch.cuda.current_stream() == stream
    assert torch.equal(torch.cuda.get_rng_state(), before)
    first = torch.rand(3, device=DEVICE)
    torch.cuda.set_rng_state(before)
    assert torch.equal(torch.rand(3, device=DEVICE), first)
    replay, drawn = capture(lambda: torch.rand(3, device=DEVICE) * x, DEVICE)
    replay()
    values = drawn.tolist()
    replay()
    assert drawn.tolist() != values


def test_stacked_replicates_train_by_a_graph_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(64, 3, 16, 16, device=DEVICE)
    data = Dataset(x, torch.randint(10, (64,), device=DEVICE), x, x)
    options = Options(finetune_epochs=4, finetune_lr=0.05)
    networks, weights = teachers(), []
    for captured in (True, False):
        stack = Stack(networks)
        with monkeypatch.context() as patch:
            if not captured:
                patch.setattr(Graphed, "__call__", lambda self, *arguments: tuple(self._function(*arguments)))
            orders = [torch.Generator().manual_seed(seed) for seed in range(2)]
            train_by(options, stack, StackedBatches(data, 16, orders))
        weights.append(dict(stack.named_parameters()))
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=1e-4)

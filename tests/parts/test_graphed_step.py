"""The captured training step, with a stand-in for the device: what is held, copied, renewed and decided."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from fastmerge.kernels import cuda_graph
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import fastmerge
from architectures import BY_NAME, merged
from fastmerge.evaluation import Setting
from fastmerge.gate_budget import GateBudget
from fastmerge.merging.graphed_step import MEASURED, WARM_UP, CudaGraphs, GraphedStep, why_not_captured
from fastmerge.merging.steps import MergeStep, Steps
from fastmerge.schedules import GateWeight, QuadraticLambda
from teachers import set_gates

NAME = "resnet_projected_shortcut"
STEPS = WARM_UP + MEASURED + 8


class Graphs:
    """Runs again where a device would replay: results are written into the tensors of the first run.

    Args:
        eager: seconds that an eager step seems to take; a replay takes one.
        waits: lines that seem to wait for the device.
    """

    def __init__(self, eager: float = 2.0, waits: Sequence[str] = ()) -> None:
        self.waits = list(waits)
        self.eager, self.captures, self.replays, self.asides = eager, 0, 0, 0

    def aside(self, run: Callable[[], Any]) -> Any:
        self.asides += 1
        return run()

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Nothing runs before the first replay."""
        self.captures += 1
        held: list[Any] = [torch.empty(0), {"loss": torch.zeros(()), "gate_loss": torch.zeros(())}, None]

        def replay() -> None:
            self.replays += 1
            for optimizer in self.step.optimizers:
                optimizer.zero_grad()
            held[0], losses, held[2] = run()
            for name, value in losses.items():
                held[1][name].copy_(value)

        return replay, held

    def watched(self, run: Callable[[], Any]) -> tuple[Any, list[str]]:
        return run(), self.waits

    def seconds(self, run: Callable[[], Any]) -> tuple[float, Any]:
        before = self.replays
        result = run()
        return (1.0 if self.replays > before else self.eager), result


def make_step(lam: GateWeight | None) -> MergeStep:
    big = merged(NAME, dtype=torch.float32).train()
    set_gates(big, 1.0)
    optimizers = [SGD(big.weight_parameters(), 0.05, 0.9), SGD(big.gate_parameters(), 0.1, 0.9)]
    setting = Setting(torch.device("cpu"), F.cross_entropy)
    return MergeStep(big, optimizers, setting, torch.amp.GradScaler("cpu", enabled=False), lam)


def graphed(step: MergeStep, wanted: bool | None = True, **options: Any) -> tuple[GraphedStep, Graphs]:
    graphs = Graphs(**options)
    graphs.step = step  # type: ignore[attr-defined]
    return GraphedStep(step, wanted, graphs), graphs


def batch(number: int, size: int = 6) -> tuple[tuple[Tensor, ...], Tensor]:
    x = BY_NAME[NAME].inputs(size, seed=number, dtype=torch.float32)
    return x, torch.randint(0, 4, (size,), generator=torch.Generator().manual_seed(number))


WEIGHTS: dict[str, Callable[[], GateWeight | None]] = {
    "none": lambda: None,
    "quadratic": lambda: QuadraticLambda(0.5),
    "budget": lambda: GateBudget(20, gate_lr=0.1),
}


@pytest.mark.parametrize("wanted", [True, None])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_graphed_run_is_an_eager_run(kind: str, wanted: bool | None) -> None:
    """Losses and weights, with a learning rate and λ that change, a batch of another size, and linking halfway."""
    steps = [make_step(WEIGHTS[kind]()), make_step(WEIGHTS[kind]())]
    graph, graphs = graphed(steps[1], wanted)
    losses: list[list[float]] = [[], []]
    for index, (step, run) in enumerate(zip(steps, (steps[0], graph), strict=True)):
        torch.manual_seed(1)
        for number in range(STEPS + 8):
            if number == STEPS:
                assert isinstance(step.network, fastmerge.BigStudent)
                step.network.link(step.optimizers[0])
                if run is graph:
                    graph.renew()
                    assert not graph.replays
            for group in step.optimizers[0].param_groups:
                group["lr"] = 0.05 / (1 + number)
            if isinstance(step.lam, QuadraticLambda):
                step.lam.step()
            _, found = run(*batch(number, 4 if number % 5 == 4 else 6))
            losses[index].append(found["loss"].item())
    assert graphs.captures == 2
    assert graphs.replays > MEASURED
    assert graph.replays
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    for name, value in steps[0].network.state_dict().items():
        torch.testing.assert_close(steps[1].network.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    if isinstance(steps[0].lam, GateBudget):
        assert isinstance(steps[1].lam, GateBudget)
        assert steps[1].lam.done == steps[0].lam.done
        torch.testing.assert_close(steps[1].lam.multipliers, steps[0].lam.multipliers, rtol=1e-3, atol=1e-4)


def test_optimizers_are_as_before_between_steps() -> None:
    step = make_step(QuadraticLambda(0.5))
    graph, _ = graphed(step)
    before = [
        copy.deepcopy({k: v for k, v in g.items() if k != "params"}) for o in step.optimizers for g in o.param_groups
    ]
    for number in range(WARM_UP + 2):
        graph(*batch(number))
        after = [{k: v for k, v in g.items() if k != "params"} for o in step.optimizers for g in o.param_groups]
        assert after == before
        assert not any(hasattr(optimizer, "_step_supports_amp_scaling") for optimizer in step.optimizers)


@pytest.mark.parametrize(("eager", "kept"), [(2.0, True), (1.06, True), (1.04, False), (0.5, False)])
def test_the_faster_stays(eager: float, kept: bool) -> None:
    step = make_step(QuadraticLambda(0.5))
    graph, graphs = graphed(step, None, eager=eager)
    for number in range(STEPS + 4):
        graph(*batch(number))
    assert graphs.captures == 1
    assert graph.replays is kept
    assert graphs.replays == (STEPS + 4 - WARM_UP - MEASURED if kept else MEASURED)


def test_nothing_is_measured_where_a_graph_is_wanted() -> None:
    graph, graphs = graphed(make_step(None), True, eager=0.1)
    for number in range(WARM_UP + 2):
        graph(*batch(number))
    assert (graphs.asides, graphs.captures, graphs.replays) == (WARM_UP, 1, 2)


def test_losses_of_a_step_stay_when_the_next_is_taken() -> None:
    graph, _ = graphed(make_step(QuadraticLambda(0.5)))
    found = [graph(*batch(number))[1] for number in range(WARM_UP + 3)]
    values = [losses["loss"].item() for losses in found]
    assert len(set(values)) == len(values)
    assert not any(loss.requires_grad for losses in found for loss in losses.values())


class CannotBeCaptured(Graphs):
    """Gets as far as the scaler's update; what goes wrong there, ending the capture hides."""

    def capture(self, run: Callable[[], Any]) -> Any:
        message = "operation not permitted when stream is capturing\nmore"
        try:
            with mock.patch.object(torch.amp.GradScaler, "update", side_effect=RuntimeError(message)):
                run()
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")


@pytest.mark.parametrize(("wanted", "scaled"), [(True, True), (None, True), (None, False)])
def test_a_step_that_can_not_be_captured(wanted: bool | None, scaled: bool) -> None:
    step = make_step(None)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
    graph = GraphedStep(step, wanted, CannotBeCaptured())
    for number in range(WARM_UP + (0 if wanted else MEASURED)):
        graph(*batch(number))
    if wanted:
        with pytest.raises(ValueError, match="needs a step that can be captured; operation not permitted"):
            graph(*batch(50))
    else:
        with pytest.warns(UserWarning, match="runs without: operation not permitted when stream is capturing$"):
            graph(*batch(50))
        graph(*batch(51))
        assert not graph.replays
    _, losses = step(*batch(52))
    assert math.isfinite(losses["loss"].item())


@pytest.mark.parametrize("wanted", [True, None])
def test_a_step_that_waits_is_not_captured(wanted: bool | None) -> None:
    """The step that found it out is a whole one."""
    plain, step = make_step(GateBudget(20, gate_lr=0.1)), make_step(GateBudget(20, gate_lr=0.1))
    graph, graphs = graphed(step, wanted, waits=["criterion.py:12"])
    steps = WARM_UP + (0 if wanted else MEASURED)
    with (
        pytest.raises(ValueError, match="waits for the device")
        if wanted
        else pytest.warns(UserWarning, match="runs without: it waits for the device, at criterion.py:12")
    ):
        for number in range(steps):
            torch.manual_seed(number)
            graph(*batch(number))
    for number in range(steps):
        torch.manual_seed(number)
        plain(*batch(number))
    for name, value in plain.network.state_dict().items():
        torch.testing.assert_close(step.network.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    if not wanted:
        graph(*batch(50))
    assert graphs.captures == 0


def test_what_waits_is_named_by_its_line() -> None:
    def run() -> int:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("another", stacklevel=1)
        return 3

    modes: list[Any] = []
    with (
        mock.patch.multiple(
            torch.cuda, Stream=mock.Mock(), get_sync_debug_mode=lambda: 0, set_sync_debug_mode=modes.append
        ),
        pytest.warns(UserWarning, match="another") as caught,
    ):
        result, waits = CudaGraphs(torch.device("cuda")).watched(run)
    assert result == 3
    assert [place.rpartition(":")[0] for place in waits] == [__file__]
    assert modes == ["warn", 0]
    assert len(caught) == 1


def test_a_failed_capture_leaves_stream_and_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch.cuda.graph leaves them where ending a capture raises: nothing is undone."""
    state = {"stream": "current", "random numbers": "state", "allocating": False}

    class Generator:
        def clone_state(self) -> Any:
            return state["random numbers"]

        def graphsafe_set_state(self, value: Any) -> None:
            state["random numbers"] = value

    @contextlib.contextmanager
    def capturing(*args: Any, **kwargs: Any) -> Iterator[None]:
        state.update({"stream": "capture's", "random numbers": "capture's", "allocating": True})
        yield
        raise RuntimeError("operation failed")

    monkeypatch.setattr(cuda_graph, "_failed", kept := [])
    with (
        mock.patch.multiple(
            torch.cuda,
            device=lambda device: contextlib.nullcontext(),
            graph=capturing,
            CUDAGraph=mock.Mock,
            graph_pool_handle=lambda: (0, 1),
            current_stream=lambda: state["stream"],
            current_device=lambda: 0,
            set_stream=lambda stream: state.update({"stream": stream}),
            default_generators=[Generator()],
        ),
        mock.patch.multiple(
            torch._C,
            create=True,
            _cuda_endAllocateToPool=lambda device, pool: state.update({"allocating": False}),
            _cuda_releasePool=mock.Mock(),
        ),
        pytest.raises(RuntimeError, match="operation failed"),
    ):
        cuda_graph.capture(lambda: None, torch.device("cuda"))
    assert state == {"stream": "current", "random numbers": "state", "allocating": False}
    assert len(kept) == 1


def test_targets_that_are_no_tensors_run_eagerly() -> None:
    step = make_step(None)
    step.setting = Setting(torch.device("cpu"), lambda output, target: F.cross_entropy(output, target[0]) * target[1])
    graph, graphs = graphed(step)
    for number in range(WARM_UP + 3):
        x, y = batch(number)
        graph(x, [y, 0.5])
    assert graphs.captures == 0


def test_reasons_against_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    step = make_step(None)
    assert "runs on cpu" in str(why_not_captured(step))
    with pytest.raises(ValueError, match="runs on cpu"):
        GraphedStep(step, wanted=True)
    step.setting = Setting(torch.device("cuda"), F.cross_entropy)
    assert why_not_captured(step) is None
    step.optimizers.append(torch.optim.AdamW(step.network.parameters()))
    assert "AdamW needs capturable" in str(why_not_captured(step))
    step.optimizers.pop()
    step.optimizers[0].param_groups[0]["dampening"] = 0.1
    assert "SGD with dampening" in str(why_not_captured(step))
    step.optimizers[0].param_groups[0]["dampening"] = 0.0
    monkeypatch.setattr(step, "network", nn.Sequential(nn.BatchNorm2d(3, momentum=None)))
    assert "'0' averages" in str(why_not_captured(step))


def test_merge_by_this_step_is_merge_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = BY_NAME["mlp"]
    teachers = [architecture.make() for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(n, 5, generator=generator), torch.randint(0, 3, (n,), generator=generator)) for n in (8, 8, 5)
    ]

    def run(schedule: str) -> list[tuple[float, float | None]]:
        options: dict[str, Any] = {"gate_schedule": schedule, "merge_epochs": 2, "finetune_epochs": 1, "seed": 3}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # gates that did not arrive in two epochs
            _, history = fastmerge.merge(teachers, batches, progress=False, **options)
        return [(record.train.loss, record.gate_loss) for record in history.epochs]

    def step_of(trainer: Steps, network: nn.Module, optimizers: list[Optimizer], lam: GateWeight | None) -> MergeStep:
        return MergeStep(network, optimizers, trainer.setting, trainer.scaler, lam)

    for schedule in ("quadratic", "budget"):
        expected = run(schedule)
        with monkeypatch.context() as patch:
            patch.setattr(Steps, "_graphed", step_of)
            assert run(schedule) == expected


def test_on_a_cpu_merge_refuses_a_graph() -> None:
    architecture = BY_NAME["mlp"]
    teachers = [architecture.make() for _ in range(2)]
    with pytest.raises(ValueError, match="cuda_graph=True needs a CUDA device; got cpu"):
        fastmerge.merge(teachers, [(torch.randn(4, 5), torch.zeros(4, dtype=torch.int64))], cuda_graph=True)

"""What is timed is a training step: weights and gates move, and memory is what autograd keeps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo import utils as dynamo

from benchmarks import contenders, names
from benchmarks.baselines.naive_dense import naive_dense
from benchmarks.cases import Case
from benchmarks.effort import Effort
from benchmarks.memory import activation_bytes, peak_bytes
from benchmarks.race import Contender
from benchmarks.steps import Step
from fastmerge.merging import graphed_step

CASE = Case("lenet", 8, 28)


def changed(step: Any, network: torch.nn.Module) -> dict[str, bool]:
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    step()
    return {name: not torch.equal(value, before[name]) for name, value in network.named_parameters()}


@pytest.mark.parametrize("make", [contenders.naive, contenders.big], ids=["naive", "big"])
def test_a_step_moves_every_weight_and_gate(make: Callable[[Case], torch.nn.Module]) -> None:
    network = make(CASE)
    moved = changed(Step(CASE, [network]), network)
    assert all(moved.values()), moved
    assert any("gates" in name for name in moved)


def test_two_teachers_are_both_trained() -> None:
    teachers = CASE.make_teachers()
    step = Step(CASE, teachers)
    assert not torch.equal(teachers[0].conv1.weight, teachers[1].conv1.weight)
    for _ in range(2):
        assert all(changed(step, torch.nn.ModuleList(teachers)).values())


def test_without_gates_nothing_is_drawn() -> None:
    network = contenders.Ungated(contenders.big(CASE))
    x, _ = CASE.make_batch()
    assert torch.equal(network(x), network(x))
    moved = changed(Step(CASE, [network]), network)
    assert all(moved[name] == ("gates" not in name) for name in moved)


def test_every_contender_of_the_cpu_runs() -> None:
    makers = contenders.makers(CASE)
    assert next(iter(makers)) == names.NAIVE
    assert names.GRAPHED not in makers
    for name, make in makers.items():
        if "compiled" not in name:
            contender = make()
            contender.step()
            contender.check()
            assert contender.facts["flops"] > 0
            assert contender.facts["items"] == 8


@pytest.mark.filterwarnings("default")
def test_compiled_contenders_have_their_code_before_the_first_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    # Graphs are traced as for Inductor, which would take long and need a compiler.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    case = Case("sine", 8, 0)
    for name in (names.NAIVE_COMPILED, names.TEACHERS_COMPILED):
        contender = contenders.makers(case)[name]()
        for _ in range(Effort().warmup("cpu")):
            contender.step()
        graphs = dynamo.counters["stats"]["unique_graphs"]
        assert graphs >= 1  # teachers of one class share theirs
        for _ in range(3):
            contender.step()
        assert dynamo.counters["stats"]["unique_graphs"] == graphs
        contender.check()
        torch.compiler.reset()
        dynamo.counters.clear()


def test_activations_are_what_autograd_keeps() -> None:
    """Of conv → ReLU → pool twice and three linear layers: their inputs, the pooled places, and what gates need."""
    teachers = CASE.make_teachers()
    step = Step(CASE, teachers[:1])
    step()
    kept = activation_bytes(step)
    # conv1's ReLU and pooled outputs with their places (int64), conv2's likewise, and the linear layers' inputs.
    first, second = 8 * 6 * 28 * 28, 8 * 16 * 10 * 10
    floats = first + first // 4 + second + second // 4 + 8 * (120 + 84)
    places = first // 4 + second // 4
    assert 4 * floats + 8 * places <= kept <= 1.05 * (4 * floats + 8 * places)
    assert peak_bytes(step) is None
    naive = Step(CASE, [naive_dense(teachers).train()])
    naive()
    assert activation_bytes(naive) > 2 * kept


def test_the_graphed_step_is_the_training_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class Eager:
        """Runs where a CUDA graph would be captured and replayed."""

        def aside(self, run: Callable[[], Any]) -> Any:
            return run()

        def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
            return (lambda: None), run()

        def watched(self, run: Callable[[], Any]) -> tuple[Any, list[str]]:
            return run(), []

    whole = graphed_step.GraphedStep.__init__
    monkeypatch.setattr(graphed_step.GraphedStep, "__init__", lambda self, s, wanted: whole(self, s, wanted, Eager()))
    network = contenders.big(CASE)
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    contender: Contender = contenders.graphed(CASE, [network], dense=False)
    contender.check()
    assert not any(torch.equal(value, before[name]) for name, value in network.named_parameters())

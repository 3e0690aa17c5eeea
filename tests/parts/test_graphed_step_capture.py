"""Nothing in a captured step waits for the device or copies numbers from the host, neither of which a CUDA graph can hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

import fastmerge
from fastmerge.evaluation import Setting
from fastmerge.gate_budget import GateBudget
from fastmerge.merging.graphed_step import _capturable
from fastmerge.merging.steps import MergeStep
from fastmerge.networks import ResNetCifar
from fastmerge.schedules import QuadraticLambda

SIDE = 8  # pixels of the images: half precision takes long on a CPU
# .item() and what asks for it; shapes that depend on values; tensors made of Python numbers, which lie on the host.
FORBIDDEN = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal.default", "lift_fresh")


class Watching(TorchDispatchMode):
    """Notes the operations that a capture would refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).removeprefix("aten.")
        by_mask = name == "index.Tensor" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_mask or name.startswith(FORBIDDEN):
            self.found.add(name)
        return function(*args, **(kwargs or {}))


def make_step(linked: bool, budget: bool) -> MergeStep:
    teachers = [ResNetCifar(blocks=1, num_classes=10) for _ in range(2)]
    big = fastmerge.BigStudent(*teachers, example_inputs=torch.randn(2, 3, SIDE, SIDE)).train()
    big.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizers = [SGD(big.weight_parameters(), 0.01, 0.9, weight_decay=1e-4), SGD(big.gate_parameters(), 0.1, 0.9)]
    if linked:
        big.link(optimizers[0])
    setting = Setting(torch.device("cpu"), F.cross_entropy, torch.float16, channels_last=True)
    lam = GateBudget(40, gate_lr=0.1) if budget else QuadraticLambda(0.1)
    return MergeStep(big, optimizers, setting, torch.amp.GradScaler("cpu", enabled=True), lam)


@pytest.mark.parametrize("budget", [False, True], ids=["lambda", "budget"])
@pytest.mark.parametrize("linked", [False, True], ids=["block-diagonal", "linked"])
def test_a_step_with_a_scaler_never_leaves_the_device(linked: bool, budget: bool) -> None:
    step = make_step(linked, budget)
    x = torch.randn(4, 3, SIDE, SIDE).to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (4,))
    step((x,), y)
    with _capturable(step.optimizers):
        step((x,), y)
        terms = tuple(term.clone() for term in step.terms())
        for optimizer in step.optimizers:
            optimizer.zero_grad(set_to_none=True)
        with Watching() as watching:
            step.run((x,), y, terms)
    assert not watching.found


@pytest.mark.parametrize("budget", [False, True], ids=["lambda", "budget"])
def test_gates_are_weighed_by_the_tensors_that_a_captured_step_reads(budget: bool) -> None:
    """A number would stay what it was when the step was captured."""
    step = make_step(linked=False, budget=budget)
    x, y = torch.randn(2, 3, SIDE, SIDE), torch.randint(0, 10, (2,))
    step((x,), y)

    def weighted(factor: float) -> float:
        terms = tuple(factor * term for term in step.terms())
        found = step.losses((x,), y, terms)
        return float((found.whole.double() - found.each["loss"].double()).detach())

    assert abs(weighted(1e6)) > 1e3 * abs(weighted(1.0))


@pytest.mark.usefixtures("poisoned_memory")
def test_momentum_starts_from_zero_where_the_first_step_overflows() -> None:
    weights = []
    for first_steps_overflow in (True, False):
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = SGD([weight], 0.1, 0.9, nesterov=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for factor in [float("inf"), float("inf")] * first_steps_overflow + [1.0, 2.0, 3.0]:
            with _capturable([optimizer]):
                optimizer.zero_grad()
                scaler.scale(factor * weight.square().sum()).backward()
                scaler.step(optimizer)
                scaler.update()
        weights.append(weight)
    assert torch.equal(*weights)


def test_momentum_of_another_layout_is_laid_out_as_its_parameter() -> None:
    weights = []
    for layout in (torch.channels_last, torch.contiguous_format):
        values, momentum = torch.arange(2.0 * 48).view(2, 4, 3, 2, 2)
        weight = torch.nn.Parameter(values.contiguous(memory_format=layout))
        optimizer = SGD([weight], 0.1, 0.9)
        optimizer.state[weight]["momentum_buffer"] = momentum.contiguous()
        weight.grad = torch.ones_like(weight)
        with _capturable([optimizer]):
            optimizer.step()
        weights.append(weight)
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    "waits",
    [lambda x: x.sum().item(), lambda x: x * torch.tensor(2.0), lambda x: x[x > 0], lambda x: bool(x.sum() > 0)],
)
def test_what_waits_is_noticed(waits: Any) -> None:
    x: Tensor = torch.ones(3)
    with Watching() as watching:
        waits(x)
    assert watching.found

"""Code that can't be merged is refused by an error that names the layer: untraceable, or with outputs nobody can average."""

from __future__ import annotations

import random
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmerge
from refusing import IMAGES, refusal, resnet


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(3, 6, 3)
        self.branching = Branching()

    def forward(self, x: Tensor) -> Tensor:
        return self.branching(self.trunk(x))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else self.conv(-x)


class Counting(Branching):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.abs().max())):  # fx can't know how often
            x = x / 2
        return self.conv(x)


class Detaching(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * x.mean().item()


class ThroughNumPy(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.from_numpy(x.detach().numpy()))


@pytest.mark.parametrize("part", [Branching, Counting, Detaching, ThroughNumPy])
def test_code_that_depends_on_the_data(part: type[Branching], capfd: pytest.CaptureFixture[str]) -> None:
    teachers = [DataDependent(), DataDependent()]
    for teacher in teachers:
        teacher.branching = part()
    message = refusal(*teachers)
    assert "branching" in message
    assert "can't be traced" in message
    assert "control flow" in message
    assert capfd.readouterr() == ("", "")


class DroppingLayers(Branching):
    layerdrop = 0.0

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.layerdrop > 0 and torch.rand([]) < self.layerdrop:
            return self.conv(0 * x)
        return self.conv(x)


class Anchored(Branching):
    """Keeps what it makes for a size of its inputs in eval mode, as YOLO's heads keep their anchors."""

    size, anchors = (0, 0), torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.conv(x)
        if self.size != x.shape[2:]:
            self.size, self.anchors = x.shape[2:], torch.linspace(0, 1, x.shape[3])
        return self.conv(x + self.anchors)


@pytest.mark.parametrize("which", [0, 1])
def test_one_teacher_may_have_run_before(which: int) -> None:
    teachers = [DataDependent(), DataDependent()]
    for teacher in teachers:
        teacher.branching = Anchored()
        teacher.eval()
    teachers[which](IMAGES)
    big = fastmerge.BigStudent(*teachers, example_inputs=IMAGES)
    with big.open_gates(), torch.no_grad():
        torch.testing.assert_close(big(IMAGES), sum(teacher(IMAGES) for teacher in teachers) / 2)


def test_layer_drop_is_named() -> None:
    teachers = [DataDependent(), DataDependent()]
    for teacher in teachers:
        teacher.branching = DroppingLayers()
    fastmerge.BigStudent(*teachers, example_inputs=IMAGES)
    for teacher in teachers:
        teacher.branching.layerdrop = 0.1
    assert "LayerDrop can't be traced: let branching.layerdrop be 0 in each teacher" in refusal(*teachers)


class SelectingByValue(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[x.sum((1, 2, 3)) > 0])


class CentringEach(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.vmap(lambda sample: sample - sample.mean())(x))


class ChoosingInGraph(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,)))


class KeepingItsState(Branching):
    state: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.state = (x + self.state).detach()
        return self.conv(self.state)


class Annealing(Branching):
    """What counts is a number, and what a trace has seen of it would hold for good."""

    step, size = 0, 3

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        self.size = x.shape[-1]  # another one, but always the same
        return self.conv(x) / (1 + self.step)


class RememberingASize(Branching):
    size = 3

    def forward(self, x: Tensor) -> Tensor:
        self.size = int(x.shape[-1])
        return self.conv(x) / self.size


def test_a_size_that_is_remembered_is_no_state() -> None:
    teachers = [DataDependent(), DataDependent()]
    for teacher in teachers:
        teacher.branching = RememberingASize()
    fastmerge.BigStudent(*teachers, example_inputs=IMAGES)


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        (SelectingByValue, "'branching' makes a tensor whose shape depends on the values of another (index) ("),
        (CentringEach, "'branching' uses torch.vmap or another transform of torch.func"),
        (ChoosingInGraph, "'branching' uses cond, which fastmerge can't follow ("),
        (KeepingItsState, "keeps 'branching.state' from one forward for the next"),
        (Annealing, "keeps 'branching.step' from one forward for the next"),
    ],
)
def test_code_that_is_no_graph_of_operations(part: type[Branching], problem: str) -> None:
    teachers = [DataDependent(), DataDependent()]
    for teacher in teachers:
        teacher.branching = part()
    assert problem in refusal(*teachers)


class DroppingItself(Branching):
    """Stochastic depth as it is often written: what was drawn while it was traced would hold for good."""

    numbers: Any = random

    def forward(self, x: Tensor) -> Tensor:
        drawn = self.numbers.random()
        return self.conv(x * float(drawn > 0.5)) if self.training else self.conv(x)


class DroppingByNumPy(DroppingItself):
    numbers = np.random


@pytest.mark.parametrize(("part", "whose"), [(DroppingItself, "Python"), (DroppingByNumPy, "NumPy")])
def test_random_numbers_that_a_trace_would_fix(part: type[Branching], whose: str) -> None:
    teachers = [DataDependent(), DataDependent()]
    for teacher in teachers:
        teacher.branching = part()
    before = random.getstate(), np.random.get_state()[1].tolist()
    message = refusal(*teachers)
    assert f"module 'branching' (train mode) draws random numbers of {whose}" in message
    assert "by torch.rand" in message
    for teacher in teachers:
        teacher.config = types.SimpleNamespace(mask_time_prob=0.05)
    assert "config.apply_spec_augment = False" in refusal(*teachers)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return -dy


class Masked(torch.autograd.Function):
    """Changes in place what its own gradients keep afterwards alone, as DeBERTa's softmax did."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.softmax(x, 1)
        y.masked_fill_(x < 0, 0)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return y * (dy - (y * dy).sum(1, keepdim=True))


class Swish(torch.autograd.Function):
    """Keeps less for its gradients, which are those of what it computes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return dy * x.sigmoid() * (1 + x * (1 - x.sigmoid()))


def hooked(x: Tensor) -> Tensor:
    if x.requires_grad:
        x.register_hook(lambda dx: -dx)
    return x


@torch.library.custom_op("fastmerge_tests::reversed", mutates_args=())
def reversed_op(x: Tensor) -> Tensor:
    return x.clone()


reversed_op.register_fake(torch.empty_like)
reversed_op.register_autograd(lambda ctx, dy: -dy)


class WithGradients(nn.Module):
    """BatchNorm takes all gradients from the bias before it, but for rounding."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.first, self.norm, self.last = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.function(self.norm(self.first(x)))))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("function", "named"),
    [
        (Reversed.apply, "the autograd function Reversed ("),
        (Masked.apply, "the autograd function Masked ("),
        (hooked, "a hook of a tensor ("),
    ],
)
def test_gradients_that_tracing_loses(function: Callable[[Tensor], Tensor], named: str, frozen: bool) -> None:
    teachers = [WithGradients(function).requires_grad_(not frozen) for _ in range(2)]
    message = refusal(*teachers)
    assert f"WithGradients has gradients of its own in train mode, by {named}{__file__}:" in message
    assert all(p.requires_grad is not frozen for p in teachers[0].parameters())
    assert torch.Tensor.register_hook.__module__ == "torch._tensor"


@pytest.mark.parametrize(
    "function", [Swish.apply, lambda x: reversed_op(x)], ids=["the same gradients", "an operation"]
)
def test_gradients_of_ones_own_that_are_kept(function: Callable[[Tensor], Tensor]) -> None:
    teachers = [WithGradients(function).double().eval() for _ in range(2)]
    x = IMAGES.double()
    big = fastmerge.BigStudent(*teachers, example_inputs=x)
    with big.open_gates():
        big(x).square().sum().backward()
    mean = sum((teacher(x) for teacher in teachers), torch.zeros(())) / 2
    mean.square().sum().backward()
    own = torch.cat([teacher.first.weight.grad for teacher in teachers])
    torch.testing.assert_close(big.network.get_submodule("first").weight.grad, own)


def test_channel_groups_refuses_the_same() -> None:
    with pytest.raises(ValueError, match=r"branching.*control flow"):
        fastmerge.channel_groups(DataDependent(), IMAGES)


def test_nothing_to_choose_among() -> None:
    assert "hidden channels" in refusal(nn.Linear(5, 4), nn.Linear(5, 4), example_inputs=torch.randn(2, 5))


class NeedsTwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 6), nn.Linear(3, 6), nn.Linear(6, 4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(F.relu(self.first(a) + self.second(b)))


def test_example_inputs_that_are_needed() -> None:
    message = refusal(NeedsTwoInputs(), NeedsTwoInputs(), example_inputs=None)
    assert "example_inputs" in message
    assert "NeedsTwoInputs" in message


def test_example_inputs_that_do_not_fit() -> None:
    message = refusal(resnet(), resnet(), example_inputs=torch.randn(2, 5, 8, 8))
    assert "example_inputs" in message
    assert "(2, 5, 8, 8)" in message
    assert "example_inputs" in refusal(resnet(), resnet(), example_inputs="an image")
    assert "example_inputs" in refusal(resnet(), resnet(), example_inputs=())
    assert "without elements" in refusal(resnet(), resnet(), example_inputs=IMAGES[:0])


def test_inputs_that_the_teachers_can_not_read() -> None:
    big = fastmerge.BigStudent(WithGradients(torch.relu), WithGradients(torch.relu), example_inputs=IMAGES)
    message = r"WithGradients does not run on inputs of shape \(2, 5, 8, 8\): Given groups=1, weight of size \[6, 3"
    with pytest.raises(ValueError, match=message):
        big(torch.randn(2, 5, 8, 8))


def test_input_without_a_batch_dimension() -> None:
    big = fastmerge.BigStudent(resnet(), resnet(), example_inputs=IMAGES).eval()
    with pytest.raises(ValueError, match="batch dimension"):
        big(IMAGES[0])


@pytest.mark.parametrize("x", [IMAGES.numpy(), "an image"])
def test_an_input_that_is_no_tensor(x: object) -> None:
    big = fastmerge.BigStudent(resnet(), resnet(), example_inputs=IMAGES)
    with pytest.raises(TypeError, match=f"BigStudent needs a tensor to run on; got {type(x).__name__}"):
        big(x)
    with pytest.raises(TypeError, match="missing a required argument: 'x'"):
        big()


class Optional(nn.Module):
    """Arguments with defaults are constants: the network is traced as it runs without them."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor, scale: Tensor | None = None, features: bool = False) -> Tensor:
        x = F.relu(self.trunk(x))
        if scale is not None:
            x = x * scale
        return x if features else self.head(x)


@torch.no_grad()
def test_arguments_with_defaults_keep_them() -> None:
    x, teachers = torch.randn(3, 5), [Optional(), Optional()]
    big = fastmerge.BigStudent(*teachers, example_inputs=x)
    with big.open_gates():
        torch.testing.assert_close(big(x), (teachers[0](x) + teachers[1](x)) / 2)
    for argument in ({"scale": torch.ones(6)}, {"features": True}):
        with pytest.raises(TypeError, match=f"Optional needs .*: '{next(iter(argument))}' was not among them"):
            big(x, **argument)
    assert big.compress()(x, features=True).shape == (3, 6)


def test_arguments_of_another_structure_are_named() -> None:
    x, scale = torch.randn(3, 5), torch.ones(6)
    big = fastmerge.BigStudent(Optional(), Optional(), example_inputs=((x,), {"scale": scale})).eval()
    assert torch.equal(big(x, scale), big(scale=scale, x=x))
    with pytest.raises(TypeError, match=r"^Optional needs .*: 'scale' is missing\. To run it"):
        big(x)
    with pytest.raises(TypeError, match=r"'scale' is a list of 2, and was a Tensor\. To run it"):
        big(x, [scale, scale])

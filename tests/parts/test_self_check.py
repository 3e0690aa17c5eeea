"""A big student that is not its teachers' mean, or compresses to another network, is refused; a right one never is."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

import fastmerge
from fastmerge import self_check
from refusing import conv_network, refusal

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Three layers; subclasses say what is between the first two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def between(self, h: Any) -> Any:
        return torch.relu(h)

    def forward(self, x: Tensor) -> Any:
        return self.last(torch.relu(self.second(self.between(self.first(x)))))


class AsksWhoRunsIt(Net):
    """It does something else while it is recorded."""

    def between(self, h: Any) -> Any:
        return h if torch.compiler.is_exporting() else torch.relu(h)


class AsksForItsType(Net):
    """What is recorded is a tensor to the code, too."""

    def between(self, h: Any) -> Any:
        return torch.relu(h) if isinstance(h, Tensor) else h


class AsksInTraining(Net):
    """Draws beside, which must not hide it."""

    def between(self, h: Any) -> Any:
        h = F.dropout(h, 0.5, self.training) + torch.randn_like(h)
        return 2 * torch.relu(h) if self.training and not torch.compiler.is_exporting() else torch.relu(h)


class InSinglePrecision(AsksWhoRunsIt):
    """Its code names a precision, so that it does not run in float64."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x.float())


def test_what_a_trace_does_not_show() -> None:
    message = refusal(AsksWhoRunsIt(), AsksWhoRunsIt(), example_inputs=X)
    assert "AsksWhoRunsIt can't be merged" in message
    assert "mean of its teachers" in message
    assert "In eval mode" in message
    assert "'second', after 'first'" in message
    assert "verify=False" in message
    assert float(message.partition("off by ")[2].partition(" times")[0]) > 0.1
    fastmerge.BigStudent(AsksWhoRunsIt(), AsksWhoRunsIt(), example_inputs=X, verify=False)


def test_questions_about_types_are_answered() -> None:
    teachers = [AsksForItsType().double(), AsksForItsType().double()]
    big = fastmerge.BigStudent(*teachers, example_inputs=X.double())
    with torch.no_grad(), big.open_gates():
        torch.testing.assert_close(big(X.double()), (teachers[0](X.double()) + teachers[1](X.double())) / 2)


def test_what_a_trace_does_not_show_in_training() -> None:
    message = refusal(AsksInTraining(), AsksInTraining(), example_inputs=X)
    assert "In training mode" in message
    assert "'second', after 'first'" in message


def test_a_network_that_runs_in_one_precision_only() -> None:
    assert "'second', after 'first'" in refusal(InSinglePrecision(), InSinglePrecision(), example_inputs=X)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_precisions(dtype: torch.dtype) -> None:
    teachers = [AsksWhoRunsIt().to(dtype) for _ in range(3)]
    assert "'second', after 'first'" in refusal(*teachers, example_inputs=X.to(dtype))
    fastmerge.BigStudent(*(Net().to(dtype) for _ in range(3)), example_inputs=X.to(dtype))


def resized(align_corners: bool) -> nn.Module:
    """An option that is not in its description."""
    return conv_network(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=align_corners))


def averaged(divisor: int | None) -> nn.Module:
    return conv_network(nn.AvgPool2d(2, divisor_override=divisor))


@pytest.mark.parametrize(
    ("first", "second", "operation"),
    [(resized(False), resized(True), "upsample_bilinear2d"), (averaged(None), averaged(3), "avg_pool2d")],
    ids=["align_corners", "divisor_override"],
)
def test_an_option_that_differs_unseen(first: nn.Module, second: nn.Module, operation: str) -> None:
    assert f"compute '{operation}' differently" in refusal(first, second)


class Unrecorded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if torch.compiler.is_exporting() else x.abs()


@pytest.mark.parametrize("x", [torch.randn(2, 3, 8, 8), torch.ones(1, 3, 8, 8), torch.zeros(3, 3, 8, 8)])
def test_nearly_constant_outputs_hide_nothing(x: Tensor) -> None:
    teachers = [conv_network(Unrecorded()) for _ in range(2)]
    with torch.no_grad():
        for teacher in teachers:
            teacher[2].weight.mul_(1e-3)
            teacher[2].bias.add_(10)
    assert "'2', after '0'" in refusal(*teachers, example_inputs=x)


class Wrong(fastmerge.BigStudent):
    """Keeps other channels than its gates say: a fault of grouping or compression, which open gates don't show."""

    def compress(self, *args: Any, **options: Any) -> Any:
        others = {name: (kept + 1) % (self.num_teachers * len(kept)) for name, kept in self.keep().items()}
        return super().compress(*args, **options, keep={name: kept.sort().values for name, kept in others.items()})


def test_compressing_to_another_network() -> None:
    with pytest.raises(ValueError, match="computes something else") as error:
        Wrong(Net(), Net(), example_inputs=X)
    assert "first layer whose output differs is 'second', after 'first'" in str(error.value)
    Wrong(Net(), Net(), example_inputs=X, verify=False)


class AsksForItsClass(Net):
    """What is recorded is of another class."""

    def between(self, h: Any) -> Any:
        return torch.relu(h) if type(h) is Tensor else h


class ComputesWithTheAnswer(Net):
    """As Hugging Face's transformers do: what asks gives a bool, to be joined with others."""

    def between(self, h: Any) -> Any:
        answer: Any = torch.compiler.is_exporting()
        answer |= type(h) is nn.Parameter
        assert (answer and True, answer ^ False, False | answer) == (bool(answer),) * 3
        return torch.relu(h) if answer & True else torch.nn.functional.relu(h)


class AsksInOneLine(Net):
    """Is told so by a function that it knows by another name, and does the same."""

    def between(self, h: Any) -> Any:
        return torch.nn.functional.relu(h) if is_compiling() else torch.relu(h)


@pytest.mark.parametrize("kind", [AsksWhoRunsIt, AsksInTraining])
def test_code_that_asks_who_runs_it_is_named(kind: type[nn.Module]) -> None:
    line = inspect.getsourcelines(kind.between)[1] + len(inspect.getsourcelines(kind.between)[0]) - 1
    message = refusal(kind(), kind(), example_inputs=X)
    asks = "a question whether it is being compiled or exported"
    assert (
        f"does something that tracing does not see, such as {asks} ({__file__}:{line}), a question about a tensor's type"
        in message
    )
    other = refusal(AsksForItsClass(), AsksForItsClass(), example_inputs=X)
    assert "does something that tracing does not see, such as a question about a tensor's type" in other


@pytest.mark.parametrize("kind", [AsksInOneLine, ComputesWithTheAnswer])
def test_code_that_asks_who_runs_it_and_does_the_same_is_merged(kind: type[nn.Module]) -> None:
    big = fastmerge.BigStudent(kind(), kind(), example_inputs=X)
    assert [question.rpartition(":")[0] for question in big._blueprint.traced.questions] == [__file__]


class Shuffling(Net):
    """Mixes each sample with another one, in training."""

    def between(self, h: Any) -> Any:
        return torch.relu(h + h[torch.randperm(len(h))]) if self.training else torch.relu(h)


def test_a_shuffled_batch_is_held_still() -> None:
    for seed in range(4):  # each teacher would draw its own order, of two
        torch.manual_seed(seed)
        fastmerge.BigStudent(Shuffling(), Shuffling(), example_inputs=X[:2])


def test_large_networks_are_compressed_once_per_class_and_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    compressed: list[str] = []

    class Noting(fastmerge.BigStudent):
        def compress(self, *args: Any, **options: Any) -> Any:
            compressed.append(type(self._blueprint.template.skeleton).__name__)
            return super().compress(*args, **options)

    monkeypatch.setattr(self_check, "_SMALL", 0)
    for build in (Net, Net, partial(conv_network, nn.ReLU()), partial(conv_network, nn.Tanh())):
        Noting(build(), build(), example_inputs=X if build is Net else None)
    assert compressed == ["Net", "Sequential", "Sequential"]
    assert "'second'" in refusal(AsksWhoRunsIt(), AsksWhoRunsIt(), example_inputs=X)


@dataclass
class Scores:
    first: Tensor
    rest: dict[str, Any]


class Drawing(Net):
    """Draws in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.drops = nn.Sequential(nn.Dropout(), nn.AlphaDropout(0.3), nn.FeatureAlphaDropout(0.3), nn.RReLU())

    def between(self, h: Tensor) -> Tensor:
        h = self.drops(h) + torch.randn_like(h) * h.new_empty(1).uniform_(1, 2)
        return F.dropout(h * torch.bernoulli(torch.full_like(h, 0.5)), 0.5, self.training)


class DrawingOtherwise(Net):
    """Draws what can't be held still."""

    def between(self, h: Tensor) -> Tensor:
        return torch.poisson(torch.relu(h)) if self.training else torch.relu(h)


class Chaotic(Net):
    """Rounding errors are as large as its output; there are some, as sums over so many channels are made in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 700), nn.Linear(700, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sigmoid(self.second(self.between(self.first(x))))
        for _ in range(6):
            h = torch.sin(1e4 * h)
        return self.last(h)


class Structured(Net):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return {
            "y": y,
            "more": (y.softmax(-1), [y.argmax(-1)]),
            "infinite": y.masked_fill(y == y, -torch.inf),
            "none": None,
        }


class Embedded(Net):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 5)

    def forward(self, x: Tensor) -> Any:
        return super().forward(self.embedding(x).mean(1))


class Recurrent(Net):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(8, 8, 2, dropout=0.5)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5)

    def between(self, h: Tensor) -> Tensor:
        h = self.recurrent(torch.relu(h))[0]
        return self.attention(h, h, h)[0]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("network", "x"),
    [
        (Drawing, X),
        (DrawingOtherwise, X),
        (Chaotic, X),
        (Structured, X),
        (Embedded, torch.arange(8).view(2, 4)),
        (Recurrent, torch.randn(3, 4, 5)),
    ],
)
def test_a_right_one_is_never_refused(network: type[nn.Module], x: Tensor, training: bool) -> None:
    for count in (2, 3):
        fastmerge.BigStudent(*(network().train(training) for _ in range(count)), example_inputs=x)


def test_dropout_in_one_operation_drops_nothing() -> None:
    """As it comes on a GPU."""
    x = torch.randn(3, 2, 8, 4)
    with self_check._HeldStill():
        assert torch.equal(torch.native_dropout(x, 0.5, True)[0], x)
        drawn = [F.scaled_dot_product_attention(x, x, x, dropout_p=0.5) for _ in range(2)]
    assert torch.equal(*drawn)


def states() -> list[Any]:
    numbers = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
    return [
        *numbers,
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cudnn.benchmark,
        torch.is_grad_enabled(),
    ]


@pytest.mark.parametrize("network", [Drawing, DrawingOtherwise])
def test_nobodys_random_numbers_are_used_up(network: type[nn.Module]) -> None:
    teachers = [network().train() for _ in range(2)]
    found = []
    for verify in (False, True):
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        big = fastmerge.BigStudent(*teachers, example_inputs=X, verify=verify)
        found.append([states(), {name: t.tolist() for name, t in big.state_dict().items()}, big.training])
    assert found[0] == found[1]


def test_a_refusal_leaves_everything_as_it_was() -> None:
    teachers = [AsksWhoRunsIt().train(), AsksWhoRunsIt().train()]
    before = [{name: t.clone() for name, t in teacher.state_dict().items()} for teacher in teachers]
    settings = states()[3:]
    refusal(*teachers, example_inputs=X)
    assert states()[3:] == settings
    for teacher, state in zip(teachers, before, strict=True):
        assert all(module.training and not module._forward_hooks for module in teacher.modules())
        assert all(torch.equal(t, state[name]) for name, t in teacher.state_dict().items())


@pytest.mark.parametrize("make", [lambda: Scores(X, {"a": (X, None)}), lambda: [X.int(), (X, {"b": X + 0j})]])
def test_outputs_are_found_wherever_they_are(make: Callable[[], Any]) -> None:
    assert len(list(self_check._leaves(make()))) == 2

"""One export gives the graphs of both modes where they differ in nothing but what norms and dropouts are told."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from architectures import BY_NAME
from fastmerge import BigStudent
from fastmerge.channels import tracing
from fastmerge.channels.same_code import code_key, told_in_both
from fastmerge.channels.traced_network import TracedNetwork
from fastmerge.channels.tracing import trace


class Net(nn.Module):
    """Does the same in both modes, but for what a subclass does in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Any:
        return self.last(F.dropout(self.between(self.norm(self.first(x))), 0.3, self.training))

    def between(self, x: Tensor) -> Tensor:
        return x


class NormalisedTwice(Net):
    def between(self, x: Tensor) -> Tensor:
        return self.norm(F.relu_(x))


class FrozenNorm(Net):
    def train(self, mode: bool = True) -> FrozenNorm:
        super().train(mode)
        self.norm.eval()
        return self


class ClampsInEvalMode(Net):
    def between(self, x: Tensor) -> Tensor:
        return x if self.training else x.clamp(max=100)


class OtherOption(Net):
    def between(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, 0.1 if self.training else 0.2)


class ReadsAfterDropout(Net):
    """Reads what went into a dropout, which in eval mode is what came out."""

    def between(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training) + x


class LargeBatchesInEvalMode(Net):
    """Does something else with batches that are not tried."""

    def between(self, x: Tensor) -> Tensor:
        return -x if not self.training and len(x) > 4 else x


class LargeBatchesInAMethodOfEvalMode(Net):
    """Likewise, where the method that asks for the size does not ask for the mode."""

    def between(self, x: Tensor) -> Tensor:
        return x if self.training else self.negative_if_many(x)

    def negative_if_many(self, x: Tensor) -> Tensor:
        return -x if len(x) > 4 else x


class AsksInAMethodThatNobodyCalls(Net):
    """Prepares itself for something, as timm's networks cut themselves short."""

    def prepare(self, x: Tensor) -> None:
        self.count = len(x) if self.training else 0


def negative_if_many(module: nn.Module, x: Tensor) -> Tensor:
    """Asks for the size in both modes, and in one whether it is large."""
    count = x.shape[0]
    return -x if not module.training and count > 4 else x


class LargeBatchesInAFunction(Net):
    def between(self, x: Tensor) -> Tensor:
        return negative_if_many(self, x)


class LargeBatchesInADecoratedMethod(Net):
    @torch.enable_grad()
    def between(self, x: Tensor) -> Tensor:
        count = x.shape[0]
        return -x if not self.training and count > 4 else x


class LargeBatchesInAMethodByAProperty(Net):
    """Has a method's name nowhere but in a property."""

    def between(self, x: Tensor) -> Tensor:
        return self.way(x)

    @property
    def way(self) -> Any:
        return self.other

    def other(self, x: Tensor) -> Tensor:
        count = x.shape[0]
        return -x if not self.training and count > 4 else x


class LargeBatchesInAMethodThatTorchCalls(Net):
    class Convolution(nn.Conv2d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            count = x.shape[0]
            return super()._conv_forward(-x if not self.training and count > 4 else x, weight, bias)

    def __init__(self) -> None:
        super().__init__()
        self.first = self.Convolution(2, 4, 3)


class OnlyLargeBatchesReachIt(Net):
    """Has a method that differs between the modes, which no batch of two reaches."""

    def between(self, x: Tensor) -> Tensor:
        return self.of_many(x) if x.shape[0] > 4 else x

    def of_many(self, x: Tensor) -> Tensor:
        return x if self.training and x.shape[0] > 4 else -x


class WritesInTraining(Net):
    """Changes a tensor by an assignment, which gives none."""

    def between(self, x: Tensor) -> Tensor:
        if self.training:
            x[:, :1] = 7
        return x


class AsksForGradients(Net):
    """Does something else where gradients can be taken, as they can in an export."""

    def between(self, x: Tensor) -> Tensor:
        return -x if self.training and torch.is_grad_enabled() and x.requires_grad else x


class OtherOutput(Net):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return (y, y) if self.training else y


X = torch.randn(2, 2, 8, 8)


def plain(graph: fx.Graph) -> list[Any]:
    """A graph's nodes by their numbers, with what is known of them."""
    number = {node: k for k, node in enumerate(graph.nodes)}
    return [
        (n.op, n.target if n.op != "placeholder" else "", fx.map_arg((n.args, n.kwargs), lambda a: number[a]), n.meta)
        for n in graph.nodes
    ]


def exported_twice(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> TracedNetwork:
    monkeypatch.setattr(tracing, "told_in_both", lambda *_: None)
    traced = trace(network, ((X,), {}))
    assert not traced.is_one_graph
    return traced


@pytest.mark.parametrize("kind", [Net, NormalisedTwice, FrozenNorm, AsksInAMethodThatNobodyCalls])
def test_one_export_gives_what_two_give(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    network = kind()
    one = trace(network, ((X,), {}))
    assert one.is_one_graph
    two = exported_twice(network, monkeypatch)
    for mode in ("train", "eval"):
        assert plain(one.graphs[mode]) == plain(two.graphs[mode]), mode
    assert (one.is_open, one.out_specs) == (two.is_open, two.out_specs)


@pytest.mark.parametrize(
    "kind",
    [
        ClampsInEvalMode,
        OtherOption,
        ReadsAfterDropout,
        LargeBatchesInEvalMode,
        LargeBatchesInAMethodOfEvalMode,
        LargeBatchesInAFunction,
        LargeBatchesInADecoratedMethod,
        LargeBatchesInAMethodByAProperty,
        LargeBatchesInAMethodThatTorchCalls,
        WritesInTraining,
        AsksForGradients,
        OtherOutput,
    ],
)
def test_what_differs_is_exported_twice(kind: type[nn.Module]) -> None:
    assert not trace(kind(), ((X,), {})).is_one_graph


def test_code_that_only_other_batches_reach_is_read_with_them() -> None:
    network = OnlyLargeBatchesReachIt()
    few, many = (trace(network, ((torch.randn(n, 2, 8, 8),), {})) for n in (2, 6))
    assert few.is_one_graph
    assert few.is_open == {"train": False, "eval": False}
    assert not many.is_one_graph


def test_activations_are_not_held() -> None:
    """A large batch takes no more memory than its forward does."""
    alive: list[weakref.ref[Tensor]] = []

    class Watched(Net):
        def between(self, x: Tensor) -> Tensor:
            alive.append(weakref.ref(x))
            y = x * x  # of which autograd saves the operands
            del x
            return y

        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            assert alive[-1]() is None
            return y

    assert told_in_both(Watched(), ((X,), {})) is not None


@pytest.mark.parametrize("name", ["recurrent", "recurrent_gru_rnn"])
def test_recurrent_networks_of_one_code_have_one_key(name: str) -> None:
    architecture = BY_NAME[name]
    first, second = (code_key(architecture.make(), (architecture.inputs(2), {})) for _ in range(2))
    assert first == second is not None


class Reordering(nn.Module):
    """Reads its channels in an order that a buffer holds."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor(order))
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.first(x).relu()[:, self.order])


def test_networks_that_differ_in_an_integer_of_a_buffer_share_no_groups() -> None:
    found = []
    for order in ([0, 1, 2, 3], [0, 0, 2, 2]):
        big = BigStudent(*(Reordering(order) for _ in range(2)), example_inputs=torch.randn(2, 5))
        found.append([group.size for group in big.groups])
    assert found == [[4], [2, 2]]

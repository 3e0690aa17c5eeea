"""Gates and weights are handed out at once: the same numbers and gradients as one by one, in a few operations."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from architectures import BY_NAME, merged
from fastmerge import gates
from fastmerge.gates import GroupMeans, hand_out_gates
from fastmerge.wide import weights
from fastmerge.wide.weights import hand_out_weights

RUNS = [
    ((0, 4), (4, 3)),
    ((0, 4), (4, 3), (0, 4), (4, 3), (0, 4)),  # a residual stream's, several times
    ((1, 2), (5, 2)),  # gaps
    ((0, 4), (2, 3), (2, 3), (0, 7)),  # that overlap
]


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func._schema.name.partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("with_index", [False, True])
@pytest.mark.parametrize("runs", RUNS)
def test_gates_and_their_gradients_are_those_of_the_columns(
    runs: tuple[tuple[int, int], ...], with_index: bool
) -> None:
    indices = (torch.tensor([5, 0, 3]), torch.tensor([6, 6])) if with_index else ()
    gates = torch.rand(3, 7, dtype=torch.float64, requires_grad=True)
    handed = hand_out_gates(gates, runs, indices)
    for columns, (start, count) in zip(handed, runs, strict=False):
        assert columns._base is not None  # a view: nothing is copied
        assert torch.equal(columns, gates[:, start : start + count])
    for columns, index in zip(handed[len(runs) :], indices, strict=True):
        assert torch.equal(columns, gates[:, index])
    used = [True] * len(handed)
    for _ in range(2):  # the second time one use has no gradient

        def some(gates: Tensor, used: list[bool] = used) -> tuple[Tensor, ...]:
            return tuple(
                c * c for c, is_used in zip(hand_out_gates(gates, runs, indices), used, strict=True) if is_used
            )

        assert torch.autograd.gradcheck(some, (gates,))
        assert torch.autograd.gradgradcheck(some, (gates,))
        used = [False, *used[1:]]


def test_gradients_of_gates_take_a_few_operations() -> None:
    gates = torch.rand(3, 40, requires_grad=True)
    uses = hand_out_gates(gates, [(k, 4) for k in range(0, 40, 4)] * 3)
    with Operations() as operations:
        torch.autograd.backward(uses, [torch.ones(3, 4) for _ in uses])
    assert operations.found["_foreach_add"] == 2
    assert operations.found["cat"] == 1
    assert not {"add", "add_", "slice_backward", "new_zeros"} & operations.found.keys()
    assert torch.equal(gates.grad, torch.full((3, 40), 3.0))


def test_open_gates_are_none() -> None:
    assert hand_out_gates(None, RUNS[0], (torch.tensor([1]),)) == (None,) * 3


def test_means_of_groups_count_what_was_dropped() -> None:
    means, values = GroupMeans([3, 4], [6, 4]), torch.rand(7, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([values[:3].sum() / 6, values[3:].mean()])
    torch.testing.assert_close(means(values), expected)
    torch.testing.assert_close(means(torch.stack([values, 2 * values])), torch.stack([expected, 2 * expected]))
    assert torch.autograd.gradcheck(means, (values,))
    assert torch.autograd.gradgradcheck(means, (values,))


def test_the_gate_loss_takes_a_few_operations() -> None:
    big = merged("resnet_projected_shortcut").train()
    assert len(big.groups) > 4
    with Operations() as operations:
        big.gate_loss().backward()
    once = ("cat", "sigmoid", "segment_reduce", "sum", "index_select", "sigmoid_backward")
    assert [operations.found[name] for name in once] == [1] * len(once)
    assert operations.found["mul"] + operations.found["div"] + operations.found["sub"] + operations.found["pow"] < 10


def _gradients(big: Any, x: tuple[Tensor, ...], autocast: bool) -> dict[str, Tensor]:
    big = copy.deepcopy(big)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = big(*x)
    (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return {"output": y.detach()} | {name: p.grad for name, p in big.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("linked", [False, True], ids=["block-diagonal", "linked"])
@pytest.mark.parametrize("name", ["lenet", "resnet_projected_shortcut", "mobilenet"])
def test_a_step_is_the_same_to_the_bit(name: str, linked: bool, autocast: bool) -> None:
    big, x = merged(name, link=linked).float().train(), BY_NAME[name].inputs(2, dtype=torch.float32)
    with torch.no_grad():  # a frozen layer has no gradient
        next(big.weight_parameters()).requires_grad_(False)
    found = _gradients(big, x, autocast)
    with mock.patch.object(weights, "_is_followed", return_value=True):
        expected = _gradients(big, x, autocast)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_weights_are_cast_and_put_together_at_once() -> None:
    tensors = [torch.randn(4, 3, 1, 1).to(memory_format=torch.channels_last), torch.randn(4), torch.randn(2, 6)]
    parameters = [nn.Parameter(t) for t in tensors]
    with torch.autocast("cpu", torch.bfloat16), Operations() as forward:
        handed = hand_out_weights(parameters, (2, 2, 1))
    assert forward.found["_foreach_copy_"] == 1
    assert not forward.found["_to_copy"]
    assert [len(weight) for weight in handed] == [3, 3, 1]
    for (whole, *parts), parameter in zip(handed, parameters, strict=True):
        assert torch.equal(whole, parameter.bfloat16())
        assert not parts or torch.equal(torch.cat(parts), whole)
    with Operations() as backward:
        torch.autograd.backward(
            [*handed[0][1:], handed[1][2], handed[2][0]],
            [torch.ones_like(t) for t in [*handed[0][1:], handed[1][2], handed[2][0]]],
        )
    assert backward.found["_foreach_copy_"] == 1
    assert not {"cat", "_to_copy"} & backward.found.keys()
    assert all(p.grad.dtype == torch.float32 and p.grad.stride() == p.stride() for p in parameters)
    assert torch.equal(parameters[1].grad, torch.tensor([0.0, 0.0, 1.0, 1.0]))


@pytest.mark.parametrize("uses", [(0,), (1,), (0, 1, 2), (2,), (0, 2)])
def test_gradients_of_weights_whichever_are_used(uses: tuple[int, ...]) -> None:
    def some(weight: Tensor) -> tuple[Tensor, ...]:
        (handed,) = hand_out_weights([weight], (2,))
        assert handed[0] is weight
        return tuple(handed[k].square() for k in uses)

    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(some, (weight,))
    assert torch.autograd.gradgradcheck(some, (weight,))


def test_compilers_see_the_weights_themselves() -> None:
    parameters = [nn.Parameter(torch.randn(4, 3))]
    with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
        assert hand_out_weights(parameters, (2,))[0][0] is parameters[0]
        assert gates.hand_out_gates(parameters[0], [(0, 2)])[0].grad_fn.name() == "SliceBackward0"

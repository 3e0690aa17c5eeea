"""The baselines compute what BigStudent computes, so that a comparison with them is fair."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import nn

import fastmerge
from benchmarks.baselines.naive_dense import NaiveDense, naive_dense
from fastmerge.networks import LeNet, ResNetCifar, SineMLP
from teachers import OPEN, make_batch, make_teachers, relative_error

# Steps in eval mode can be compared, whose gates are not drawn.
pytestmark = pytest.mark.filterwarnings("ignore:gate_loss.. is called for gradients:UserWarning")


def resnet(block: str) -> nn.Module:
    models = pytest.importorskip("torchvision.models.resnet")
    if block == "BasicBlock":
        return models.ResNet(models.BasicBlock, [1, 2, 1, 1], num_classes=5)
    return models.ResNet(models.Bottleneck, [1, 2, 1, 1], num_classes=5, width_per_group=4)


CASES = {
    "resnet, basic": (lambda: resnet("BasicBlock"), (3, 16, 16)),
    "resnet, bottleneck": (lambda: resnet("Bottleneck"), (3, 16, 16)),
    "resnet for cifar": (lambda: ResNetCifar(2, 5), (3, 8, 8)),
    "lenet": (lambda: LeNet(1, 12, 5), (1, 12, 12)),
    "sine": (SineMLP, (1,)),
}


@cache
def made(case: str) -> tuple[list[nn.Module], fastmerge.BigStudent, torch.Tensor]:
    """Teachers, their big student, which is copied, and a batch."""
    make, shape = CASES[case]
    x = make_batch(4, shape)
    teachers = make_teachers(make, (x,), 2)
    return teachers, fastmerge.BigStudent(*teachers, example_inputs=x, verify=False), x


def make_pair(case: str, grouped: bool = False) -> tuple[fastmerge.BigStudent, NaiveDense, torch.Tensor]:
    """A big student and the naive network of the same teachers and gates, some a fraction, and a batch."""
    teachers, merged, x = made(case)
    big, naive = copy.deepcopy(merged), naive_dense(teachers, grouped).eval()
    assert set(big.gates) == set(naive.gates)
    with torch.no_grad():
        for name, gate in big.gates.items():
            gate.loc.normal_(0, 2)
            naive.gates[name].loc.copy_(gate.loc)
    return big, naive, x


@pytest.mark.parametrize("grouped", [False, True], ids=["dense", "grouped"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_the_big_students(case: str, grouped: bool) -> None:
    big, naive, x = make_pair(case, grouped)
    big.link()
    outputs = [network(x) for network in (big, naive)]
    assert relative_error(outputs[1].detach(), outputs[0].detach()) < 1e-9
    for network, output in zip((big, naive), outputs, strict=True):
        ((output * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).sum() + network.gate_loss()).backward()
    for name, gate in big.gates.items():
        torch.testing.assert_close(naive.gates[name].loc.grad, gate.loc.grad, rtol=1e-7, atol=1e-12)
    gradients = {n: m.weight.grad for n, m in naive.network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    for name, gradient in gradients.items():
        expected = big.network.get_submodule(name).weight.grad
        if gradient.shape == expected.shape:  # a grouped convolution has the blocks alone
            torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-9)
    assert grouped or all(g.shape == big.network.get_submodule(n).weight.shape for n, g in gradients.items())


@pytest.mark.parametrize("case", CASES)
def test_in_training_mode_closed_and_open_gates_act_alike(case: str) -> None:
    big, naive, x = make_pair(case)
    with torch.no_grad():
        for name, gate in big.gates.items():
            gate.loc.copy_(torch.where(torch.rand_like(gate.loc) < 0.3, -OPEN, OPEN))
            naive.gates[name].loc.copy_(gate.loc)
        assert relative_error(naive.train()(x), big.train()(x)) < 1e-9


def test_gates_are_drawn_for_each_sample_and_channel() -> None:
    _, naive, x = make_pair("lenet")
    naive.train()
    gate = naive.gates["fc1"]
    nn.init.constant_(gate.loc, 0.0)
    draws = gate.draw(64)
    assert draws.shape == (64, len(gate.loc))
    assert len(draws[(draws > 0) & (draws < 1)].unique()) > 1000
    assert not torch.equal(naive(x), naive(x))
    assert abs((draws > 0).double().mean() - gate.open_probability().mean()) < 0.02


@pytest.mark.parametrize("case", ["resnet for cifar", "lenet", "sine"])
def test_a_wrong_gate_would_be_found(case: str) -> None:
    big, naive, x = make_pair(case)
    nn.init.constant_(next(iter(naive.gates.values())).loc, 0.3)
    assert relative_error(naive(x).detach(), big(x).detach()) > 1e-4

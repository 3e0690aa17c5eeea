"""Training a big student: its two kinds of parameters, optimizers kept through link and compress, seeds, checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.utils.checkpoint import checkpoint

import fastmerge
from architectures import BY_NAME, merged
from teachers import OPEN, copy_state, relative_error, select_gates, set_gates

NAMES = ["lenet", "resnet_projected_shortcut", "shufflenet_v2", "unet"]
every_network = pytest.mark.parametrize("name", NAMES)
MakeOptimizer = Callable[[list[dict[str, object]]], Optimizer]
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": lambda groups: SGD(groups, lr=0.01, momentum=0.9, weight_decay=1e-3, nesterov=True),
    "adamw": lambda groups: AdamW(groups, lr=0.01),
    "amsgrad": lambda groups: Adam(groups, lr=0.01, amsgrad=True, foreach=True),
    "rmsprop": lambda groups: RMSprop(groups, lr=0.001, centered=True),
}
every_optimizer = pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def optimizer_of(big: fastmerge.BigStudent, make: MakeOptimizer) -> Optimizer:
    return make(
        [
            {"params": list(big.weight_parameters()), "lr": 0.003},
            {"params": list(big.gate_parameters()), "weight_decay": 0.0},
        ]
    )


def step(model: nn.Module, optimizer: Optimizer, x: tuple[Tensor, ...], seed: int) -> float:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    loss = (model(*x) - 0.3).square().mean()
    if isinstance(model, fastmerge.BigStudent):
        loss = loss + model.gate_loss()
    loss.backward()
    optimizer.step()
    return loss.item()


@every_network
@pytest.mark.parametrize("link", [False, True])
def test_parameters_are_disjoint_and_complete(name: str, link: bool) -> None:
    big = merged(name, link=link).train()
    weights, gates = ([id(p) for p in part] for part in (big.weight_parameters(), big.gate_parameters()))
    assert len(set(weights)) == len(weights)
    assert len(set(gates)) == len(gates) == len(big.gates)
    assert not set(weights) & set(gates)
    assert set(weights) | set(gates) == {id(p) for p in big.parameters()}
    assert set(gates) == {id(gate.loc) for gate in big.gates.values()}
    assert all(p.requires_grad for p in big.parameters())


@every_network
def test_unlinked_has_the_teachers_parameters_and_linked_the_off_diagonal_ones_too(name: str) -> None:
    teacher = BY_NAME[name].make()
    per_teacher = sum(p.numel() for p in teacher.parameters())
    big = merged(name, count=3).train()
    outputs = list(teacher.modules())[-1].out_features if name != "unet" else 2
    shared_bias = 2 * outputs  # the averaging layer has one bias, not three
    assert sum(p.numel() for p in big.weight_parameters()) == 3 * per_teacher - shared_bias
    big.link()
    hidden = first_and_last_excluded(teacher)
    assert sum(p.numel() for p in big.weight_parameters()) == 3 * per_teacher - shared_bias + 6 * hidden


def first_and_last_excluded(teacher: nn.Module) -> int:
    """Weights of dense layers between hidden channels: each gains six off-diagonal blocks of three teachers."""
    layers = [m for m in teacher.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    dense = [m for m in layers[1:-1] if getattr(m, "groups", 1) == 1]
    return sum(m.weight.numel() for m in dense)


@pytest.mark.parametrize("name", ["lenet", "resnet_projected_shortcut"])
def test_a_learning_rate_for_gates_alone_moves_gates_alone(name: str) -> None:
    big, x = merged(name).train(), BY_NAME[name].inputs(6)
    weights = [p.detach().clone() for p in big.weight_parameters()]
    gates = [p.detach().clone() for p in big.gate_parameters()]
    step(big, SGD(big.gate_parameters(), lr=0.1), x, 0)
    assert all(torch.equal(a, b) for a, b in zip(weights, big.weight_parameters(), strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(gates, big.gate_parameters(), strict=True))


@every_network
def test_off_diagonal_weights_learn_once_linked(name: str) -> None:
    big, x = merged(name, link=True).train(), BY_NAME[name].inputs(6)
    zeros = {key: p == 0 for key, p in big.network.named_parameters()}
    before = sum(int(z.sum()) for z in zeros.values())
    assert before > 0
    step(big, SGD(big.weight_parameters(), lr=0.1), x, 0)
    after = sum(int((p == 0).sum()) for p in big.network.parameters())
    assert after < 0.5 * before


@every_network
@every_optimizer
def test_optimizer_goes_on_through_link(name: str, make_optimizer: MakeOptimizer) -> None:
    """Linking changes nothing about the diagonal blocks' next step: same momentum, same update, where gradients agree."""
    big, x = merged(name).train(), BY_NAME[name].inputs(6)
    optimizer = optimizer_of(big, make_optimizer)
    for seed in range(3):
        step(big, optimizer, x, seed)
    unlinked, other = copy_with_optimizer(big, optimizer, make_optimizer)
    parameters = list(big.parameters())
    big.link(optimizer=optimizer)
    assert all(a is b for a, b in zip(parameters, big.parameters(), strict=True)), (
        "parameters must stay the same objects"
    )
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(g["params"]) for g in other.param_groups]
    assert step(big, optimizer, x, 7) == pytest.approx(step(unlinked, other, x, 7), rel=1e-9)
    for parameter, entry in optimizer.state.items():
        for key, value in entry.items():
            if isinstance(value, Tensor) and value.dim():
                assert value.shape == parameter.shape, key
    for teacher in range(big.num_teachers):
        actual, expected = (blocks_of(b, teacher) for b in (big, unlinked))
        for key, value in expected.items():
            torch.testing.assert_close(actual[key], value, rtol=1e-7, atol=1e-9)


@torch.no_grad()
def blocks_of(big: fastmerge.BigStudent, teacher: int) -> dict[str, Tensor]:
    """The weights on one teacher's diagonal: what is left when only its channels are kept."""
    for gate in big.gates.values():
        places = gate.loc.numel() // big.num_teachers
        gate.loc.fill_(-1.0)
        gate.loc[teacher * places : (teacher + 1) * places] = 1.0
    return big.compress().state_dict()


def copy_with_optimizer(
    big: fastmerge.BigStudent, optimizer: Optimizer, make: MakeOptimizer
) -> tuple[fastmerge.BigStudent, Optimizer]:
    clone = copy.deepcopy(big)
    other = optimizer_of(clone, make)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return clone, other


@every_network
@every_optimizer
def test_optimizer_goes_on_through_compress(name: str, make_optimizer: MakeOptimizer) -> None:
    """With closed gates of gradient zero the student's steps are the big student's, momentum and all."""
    big, x = merged(name, link=True).train(), BY_NAME[name].inputs(6)
    optimizer = optimizer_of(big, make_optimizer)
    select_gates(big, x)
    big.train()
    for seed in range(3):
        step(big, optimizer, x, seed)
    pin_gates(big)
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    other, others_optimizer = copy_with_optimizer(big, optimizer, make_optimizer)
    student = big.compress(optimizer=optimizer)
    assert len(optimizer.param_groups) == 1, "the gates' group goes"
    assert {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} == options[0]
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in student.parameters()}
    assert {id(p) for p in optimizer.state} == {id(p) for p in student.parameters()}
    for parameter, entry in optimizer.state.items():
        for key, value in entry.items():
            if isinstance(value, Tensor) and value.dim():
                assert value.shape == parameter.shape, key
    step(student, optimizer, x, 9)
    step(other, others_optimizer, x, 9)
    pin_gates(other)
    expected = other.compress()
    for key, value in expected.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(
                student.state_dict()[key], value, rtol=1e-7, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}"
            )


@torch.no_grad()
def pin_gates(big: fastmerge.BigStudent) -> None:
    """Puts gates that are surely open or closed back to where they were, whatever an optimizer did to them."""
    for gate in big.gates.values():
        gate.loc.copy_(torch.where(gate.loc > 0, OPEN, -OPEN))


@every_network
def test_seeds_repeat_a_whole_run(name: str) -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(11)
        big, x = merged(name).train(), BY_NAME[name].inputs(6)
        set_gates(big, 1.0)
        optimizer = optimizer_of(big, OPTIMIZERS["sgd"])
        losses = [step(big, optimizer, x, seed) for seed in range(3)]
        big.link(optimizer=optimizer)
        losses += [step(big, optimizer, x, seed) for seed in range(3)]
        runs.append((losses, copy_state(big)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(tensor, runs[1][1][key]) for key, tensor in runs[0][1].items())


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_of_the_users_loop(link: bool, use_reentrant: bool) -> None:
    """The second forward of a checkpoint draws the same gates; a network without BatchNorm, whose statistics move twice."""
    big, (x,) = merged("lenet", link=link).train(), BY_NAME["lenet"].inputs(6)
    gradients = []
    for wrap in (lambda v: big(v), lambda v: checkpoint(big, v, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        big.zero_grad()
        wrap(x.clone().requires_grad_()).square().mean().backward()
        gradients.append([p.grad.clone() for p in big.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-12, atol=0) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_training_teaches(name: str) -> None:
    """Fifty steps bring the loss down and gates to half open, and the student is still of use."""
    big, x = merged(name, link=True).train(), BY_NAME[name].inputs(16)
    target = BY_NAME[name].make().double().eval()(*x).detach()
    big = big.float()
    x, target = tuple(v.float() for v in x), target.float()
    weights, gates = (
        SGD(big.weight_parameters(), lr=1e-3, momentum=0.9),
        SGD(big.gate_parameters(), lr=1.0, momentum=0.9),
    )
    losses = []
    for _ in range(50):
        for optimizer in (weights, gates):
            optimizer.zero_grad()
        loss = (big(*x) - target).square().mean()
        (loss + 3 * big.gate_loss()).backward()
        for optimizer in (weights, gates):
            optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < sum(losses[:10])
    opened = torch.stack([gate.open_probability().mean() for gate in big.gates.values()])
    assert (opened - 0.5).abs().max() < 0.25
    student = big.compress().eval()
    assert torch.isfinite(student(*x)).all()
    assert relative_error(student(*x), student(*x)) == 0

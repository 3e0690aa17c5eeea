"""BigStudent is exact for every network of the zoo: the mean of the teachers, and the network it compresses to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

import fastmerge
from architectures import BATCH, BY_NAME, ZOO, Architecture, merged, teachers_of
from fastmerge.methods import combine, places_of_kept
from teachers import copy_state, disturb_weights, mean_output, relative_error, select_gates, set_gates

every_architecture = pytest.mark.parametrize("architecture", ZOO, ids=lambda architecture: architecture.name)


@every_architecture
@torch.no_grad()
def test_open_gates_give_the_mean_of_the_teachers(architecture: Architecture) -> None:
    big, x = merged(architecture.name, 3), architecture.inputs(BATCH, seed=10)
    expected = mean_output(teachers_of(architecture.name), x)
    assert not big.linked
    with big.open_gates():
        assert relative_error(big(*x), expected) <= 1e-9
    big.link()
    assert big.linked
    with big.open_gates():
        assert relative_error(big(*x), expected) <= 1e-9


@every_architecture
@pytest.mark.parametrize("count", [2, 3])
@torch.no_grad()
def test_compress_gives_the_network_with_the_kept_gates_open(architecture: Architecture, count: int) -> None:
    big, x = merged(architecture.name, count), architecture.inputs(BATCH, seed=10)
    for seed, change in enumerate((lambda: None, big.link, lambda: disturb_weights(big, scale=0.3))):
        change()
        opened = select_gates(big, x, seed)
        kept = big.keep()
        assert kept.keys() == opened.keys() == dict(big.gates).keys()
        assert all(torch.equal(kept[name], opened[name]) for name in opened)
        assert relative_error(big.compress()(*x), big(*x)) <= 1e-9


def shuffled(groups: fastmerge.ChannelGroups) -> dict[str, Tensor]:
    """A random order for each group, never its own."""
    generator = torch.Generator().manual_seed(0)
    orders = {group.name: torch.randperm(group.size, generator=generator) for group in groups}
    return {name: order.flip(0) if torch.equal(order, order.sort().values) else order for name, order in orders.items()}


@every_architecture
@torch.no_grad()
def test_permuted_networks_compute_the_same(architecture: Architecture) -> None:
    teacher, x = teachers_of(architecture.name)[0], architecture.inputs(BATCH, seed=10)
    groups = merged(architecture.name).groups
    orders = shuffled(groups)
    permuted = fastmerge.permute(teacher, groups, orders)
    assert relative_error(permuted(*x), teacher(*x)) < 1e-12
    if any(group.size > 1 for group in groups):
        assert any(not torch.equal(a, b) for a, b in zip(teacher.parameters(), permuted.parameters(), strict=True))
    found, moved = fastmerge.activations(teacher, x), fastmerge.activations(permuted, x)
    assert found.keys() == moved.keys()
    for name, values in found.items():
        assert (moved[name] - values[orders[name]]).abs().max() < 1e-9, name
    back = fastmerge.permute(permuted, groups, {name: order.argsort() for name, order in orders.items()})
    assert_same_state(back.state_dict(), copy_state(teacher))


@every_architecture
def test_groups_and_axes_name_what_the_forward_uses(architecture: Architecture) -> None:
    teacher, groups = teachers_of(architecture.name)[0], merged(architecture.name).groups
    names = [group.name for group in groups]
    assert len(set(names)) == len(names) == len(groups) == len(groups.groups)
    assert all(name and "." not in name and name in str(groups) for name in names)
    nn.ModuleDict({name: nn.Identity() for name in names})
    tensors = {**dict(teacher.named_parameters()), **dict(teacher.named_buffers())}
    owners = {name for name, _ in teacher.named_modules()} | tensors.keys()
    for group in groups:
        assert group.size >= 1
        assert group.producers
        assert group.consumers
        assert owners.issuperset([*group.producers, *group.consumers])
    axes = list(groups.axes())
    assert {axis.tensor for axis in axes} >= {name for name, _ in teacher.named_parameters()}
    assert len({(axis.tensor, axis.dim) for axis in axes}) == len(axes)
    for axis in axes:
        assert axis.dim is None or len(axis.units.group) == tensors[axis.tensor].shape[axis.dim], axis.tensor


def channels_last(value: Tensor | nn.Module) -> Any:
    """A module, or images, with channels side by side."""
    images = isinstance(value, nn.Module) or value.dim() == 4
    return value.to(memory_format=torch.channels_last) if images else value


# LeNet's view doesn't take channels-last images at all.
IMAGES = [a for a in ZOO if any(x.dim() == 4 for x in a.inputs(1)) and a.name != "lenet"]


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, id=a.name, marks=pytest.mark.slow if number % 4 else ()) for number, a in enumerate(IMAGES)],
)
def test_channels_last_has_the_same_groups(architecture: Architecture) -> None:
    network, inputs = channels_last(architecture.make().double()), tuple(map(channels_last, architecture.inputs(2)))
    found = fastmerge.channel_groups(network, example_inputs=inputs)
    assert str(found) == str(merged(architecture.name).groups)


@every_architecture
@torch.no_grad()
def test_candidates_can_be_kept_and_gates_be_set_by_hand(architecture: Architecture) -> None:
    big, x = merged(architecture.name), architecture.inputs(BATCH, seed=10)
    kept = select_gates(big, x, seed=1)
    gates = {name: gate.mean() for name, gate in big.gates.items()}
    expected, student = big(*x), big.compress().state_dict()
    set_gates(big, 1.0)
    assert relative_error(big(*x, gates=gates), expected) < 1e-12
    assert_same_state(big.compress(keep=kept).state_dict(), student)
    places = places_of_kept(big.groups, 2, kept)
    if any("parametrizations" in name for name in student):
        with pytest.raises(ValueError, match="computes its weights, so its channels can't be combined"):
            combine(teachers_of(architecture.name)[:2], big.groups, places)
        return
    for name, tensor in combine(teachers_of(architecture.name)[:2], big.groups, places).state_dict().items():
        assert torch.allclose(tensor, student[name], rtol=0, atol=1e-14), name


# float64 tells rules right or wrong, so most of these are left to make test-slow
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, marks=[pytest.mark.slow] * (k % 6 > 0)) for k, a in enumerate(ZOO)],
    ids=lambda architecture: architecture.name,
)
@torch.no_grad()
def test_both_ends_are_exact_in_float32(architecture: Architecture) -> None:
    """The big student checks itself, too, and must not take rounding for a fault; nor that fresh networks hardly differ."""
    teachers = teachers_of(architecture.name, dtype=torch.float32)
    x, few = (architecture.inputs(size, seed=10, dtype=torch.float32) for size in (BATCH, 2))
    fastmerge.BigStudent(*(architecture.make() for _ in range(3)), example_inputs=few)
    big = fastmerge.BigStudent(*teachers, example_inputs=few)
    for link in (lambda: None, big.link):
        link()
        with big.open_gates():
            assert relative_error(big(*x), mean_output(teachers, x)) <= 1e-4
    disturb_weights(big, scale=0.05)
    select_gates(big, x, seed=3)
    assert relative_error(big.compress()(*x), big(*x)) <= 1e-4


@every_architecture
def test_teachers_are_unchanged_and_unshared(architecture: Architecture) -> None:
    teachers = copy.deepcopy(teachers_of(architecture.name))
    before = [copy_state(teacher) for teacher in teachers]
    modes = [[module.training for module in teacher.modules()] for teacher in teachers]
    big = fastmerge.BigStudent(*teachers, example_inputs=architecture.inputs(2))
    big.link()
    big.train()
    train_briefly(big, architecture.inputs(BATCH))
    student = big.compress()
    with torch.no_grad():
        for tensor in [*big.parameters(), *student.parameters()]:
            tensor.add_(1)
    for teacher, state, mode in zip(teachers, before, modes, strict=True):
        assert_same_state(teacher.state_dict(), state)
        assert [module.training for module in teacher.modules()] == mode
        assert all(parameter.grad is None for parameter in teacher.parameters())


@every_architecture
@torch.no_grad()
def test_the_student_is_a_network_of_the_teachers_class_of_its_own(architecture: Architecture) -> None:
    first, big = teachers_of(architecture.name)[0], merged(architecture.name, 3)
    x = architecture.inputs(BATCH, seed=10)
    select_gates(big, x, seed=4)
    before, state = big(*x), copy_state(big)
    student = big.compress()
    assert type(student) is type(first)
    assert [(n, type_before_parametrizations(module)) for n, module in student.named_modules()] == [
        (n, type_before_parametrizations(module)) for n, module in first.named_modules()
    ]
    assert [name for name, _ in student.named_parameters()] == [name for name, _ in first.named_parameters()]
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in student.parameters())
    receiver = copy.deepcopy(first)
    receiver.load_state_dict(student.state_dict(), strict=True)
    assert relative_error(receiver(*x), student(*x)) == 0
    for tensor in [*student.parameters(), *student.buffers()]:
        if tensor.is_floating_point():
            tensor.add_(1)
    assert_same_state(big.state_dict(), state)
    assert relative_error(big(*x), before) == 0


@pytest.mark.parametrize("architecture", [a for a in ZOO if not a.stochastic], ids=lambda a: a.name)
@torch.no_grad()
def test_training_mode_is_the_mean_of_the_teachers_in_training_mode(architecture: Architecture) -> None:
    """Batch statistics are each teacher's own, and its running statistics move as they would alone."""
    x, fresh = architecture.inputs(BATCH, seed=11), architecture.inputs(BATCH, seed=12)
    teachers = [teacher.train() for teacher in copy.deepcopy(teachers_of(architecture.name))]
    big = merged(architecture.name, 3).train()
    for link in (lambda: None, big.link):
        link()
        with big.open_gates():
            assert relative_error(big(*x), mean_output(teachers, x)) <= 1e-9
    for teacher in teachers:
        teacher.eval()
    big.eval()
    with big.open_gates():
        assert relative_error(big(*fresh), mean_output(teachers, fresh)) <= 1e-9


@every_architecture
def test_gradients_reach_every_parameter_and_input_gradients_are_the_mean(architecture: Architecture) -> None:
    teachers = teachers_of(architecture.name)
    big, x = merged(architecture.name, 3), [value.requires_grad_() for value in architecture.inputs(BATCH, seed=13)]
    expected = torch.autograd.grad(total(mean_output(teachers, x)), x)
    for link in (lambda: None, big.link):
        link()
        with big.open_gates():
            actual = torch.autograd.grad(total(big(*x)), x)
        assert all((a - e).norm() <= 1e-9 * e.norm() for a, e in zip(actual, expected, strict=True))
    big.train()
    (total(big(*x)) + big.gate_loss()).backward()
    missing = [name for name, parameter in big.named_parameters() if parameter.grad is None]
    assert not missing
    assert all(torch.isfinite(parameter.grad).all() for parameter in big.parameters() if parameter.grad is not None)


def test_untouched_gates_do_not_change_between_calls_in_eval_mode() -> None:
    name = "resnet_projected_shortcut"
    big, x = merged(name), BY_NAME[name].inputs(BATCH)
    assert torch.equal(big(*x), big(*x))


def test_eval_mode_multiplies_by_the_mean_gate() -> None:
    """A network of one hidden layer, by hand."""
    teachers, big = teachers_of("sine_mlp"), merged("sine_mlp", 3)
    (x,) = BY_NAME["sine_mlp"].inputs(BATCH)
    (gate,) = big.gates.values()
    set_gates(big, 0.3)
    with torch.no_grad():
        gate.loc.add_(torch.randn(60, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
        weights = gate.mean().view(3, 20)
        outputs = [t[2](torch.relu(t[0](x)) * w) for t, w in zip(teachers, weights, strict=True)]
        assert relative_error(big(x), torch.stack(outputs).mean(0)) <= 1e-9


def train_briefly(big: fastmerge.BigStudent, x: tuple[Tensor, ...]) -> None:
    optimizer = torch.optim.SGD(big.parameters(), lr=1e-3)
    loss = total(big(*x)) + big.gate_loss()
    loss.backward()
    optimizer.step()


def total(output: object) -> Tensor:
    """A number that depends on every element of an output, in a way that doesn't vanish."""
    leaves = torch.utils._pytree.tree_leaves(output)
    return sum(
        ((leaf + 0.1).square() * torch.linspace(0.5, 1.5, leaf.numel(), dtype=leaf.dtype).view_as(leaf)).mean()
        for leaf in leaves
    )


def assert_same_state(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    different = [name for name, tensor in state.items() if not torch.equal(tensor, expected[name])]
    assert not different


def test_a_size_may_be_seen_first_in_an_empty_batch() -> None:
    teachers = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3)) for _ in range(2)]
    big = fastmerge.BigStudent(*teachers, example_inputs=torch.randn(2, 3, 8, 8))
    x = torch.randn(3, 3, 9, 9)
    with big.open_gates():
        assert big(x[:0]).shape == (0, 5, 5, 5)
        assert relative_error(big(x), mean_output(teachers, [x])) < 1e-5

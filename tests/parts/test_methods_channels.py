"""What methods to merge need of a network: selections and gates by hand, activations. What holds for every network is tested
in ``test_big_student_exact.py``."""

from __future__ import annotations

import warnings

import pytest
import torch

import fastmerge
from architectures import BY_NAME, teachers_of
from fastmerge.lock_step import Family


def test_the_output_is_differentiable_in_given_gates() -> None:
    teachers, x = teachers_of("resnet_projected_shortcut", 2), BY_NAME["resnet_projected_shortcut"].inputs(6, seed=10)
    big = fastmerge.BigStudent(*teachers, example_inputs=x, verify=False)
    name = big.groups[0].name
    gates = torch.ones(6, len(big.gates[name].loc), dtype=torch.float64, requires_grad=True)
    with big.open_gates():
        assert torch.autograd.gradcheck(lambda g: big(*x, gates={name: g}), gates)
        (slopes,) = torch.autograd.grad(big(*x, gates={name: gates}).square().sum(), gates)
    assert slopes.shape == gates.shape
    assert (slopes.abs().sum(1) > 0).all()


def test_what_does_not_fit_is_refused() -> None:
    teachers, x = teachers_of("lenet", 2), BY_NAME["lenet"].inputs(4)
    big = fastmerge.BigStudent(*teachers, example_inputs=x, verify=False)
    name, size = big.groups[0].name, big.groups[0].size
    with pytest.raises(ValueError, match=r"gates of group 'conv1' need the shape \(12,\)"):
        big(*x, gates={name: torch.ones(3)})
    with pytest.raises(ValueError, match="gates need names of channel groups; got 'conv9'"):
        big(*x, gates={"conv9": torch.ones(3)})
    for wrong in (range(size - 1), [0] * size, range(2 * size, 3 * size), torch.zeros(size)):
        with pytest.raises(ValueError, match="keep needs 6 candidates of group 'conv1'"):
            big.compress(keep={name: wrong})
    with pytest.raises(ValueError, match="keep needs names of channel groups; got 'conv9'"):
        big.compress(keep={"conv9": [1]})
    with pytest.raises(ValueError, match="permutation of 0 to 5"):
        fastmerge.permute(teachers[0], big.groups, {name: [0, 1, 2, 3, 4, 4]})
    with pytest.raises(ValueError, match="permutations need names of channel groups; got 'conv9'"):
        fastmerge.permute(teachers[0], big.groups, {"conv9": [0]})


def test_candidates_that_a_user_keeps_are_not_warned_of() -> None:
    teachers = teachers_of("lenet", 2)
    big = fastmerge.BigStudent(*teachers, example_inputs=BY_NAME["lenet"].inputs(2), verify=False)
    keep = {group.name: range(group.size, 2 * group.size) for group in big.groups}
    with torch.no_grad():
        big.gates["conv1"].loc.fill_(float("nan"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        student = big.compress(keep=keep)
    for name in ("conv1", "conv2", "fc1", "fc2"):
        assert torch.equal(student.get_submodule(name).weight, teachers[1].get_submodule(name).weight)


@torch.no_grad()
def test_activations_are_what_layers_read() -> None:
    teacher, x = teachers_of("lenet", 2)[0], BY_NAME["lenet"].inputs(5)
    read: dict[str, torch.Tensor] = {}
    for name in ("conv2", "fc1", "fc2", "fc3"):
        teacher.get_submodule(name).register_forward_pre_hook(lambda m, a, name=name: read.__setitem__(name, a[0]))
    teacher(*x)
    for module in teacher.modules():
        module._forward_pre_hooks.clear()
    found = fastmerge.activations(teacher, x)
    assert torch.equal(found["conv1"], read["conv2"].movedim(1, 0).flatten(1))
    assert torch.equal(found["conv2"], read["fc1"].view(5, 8, 4).movedim(0, 2).flatten(1))
    assert torch.equal(found["fc1"], read["fc2"].T)
    assert torch.equal(found["fc2"], read["fc3"].T)


def test_a_family_needs_one_architecture() -> None:
    with pytest.raises(TypeError, match="one class"):
        Family.of([teachers_of("lenet", 2)[0], teachers_of("vgg")[0]], BY_NAME["lenet"].inputs(2))

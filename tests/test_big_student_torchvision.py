"""BigStudent is exact for a network of every torchvision family (``-m slow``: for all of them)."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

import fastmerge
import torchvision_networks as vision
from teachers import (
    TOLERANCE,
    copy_state,
    disturb_weights,
    make_batch,
    make_teachers,
    mean_output,
    relative_error,
    select_gates,
)

LARGER_THAN_MEMORY = {"regnet_y_128gf"}  # benchmarks/coverage.py takes it, alone
OTHERS = sorted(name for name in vision.names() if name not in {*vision.FAMILIES, *vision.LARGE, *LARGER_THAN_MEMORY})


def check(name: str, dtype: torch.dtype, count: int) -> None:
    check_network(partial(vision.make_with_small_classifier, name), vision.size(name), dtype, count)


@torch.no_grad()
def check_network(make: Callable[[], nn.Module], side: int, dtype: torch.dtype, count: int) -> None:
    """Open gates give the mean; the compressed network computes what was kept; teachers stay as they are."""
    x = (make_batch(4, (3, side, side), dtype=dtype),)
    teachers = make_teachers(make, x, count, dtype)
    states = [copy_state(teacher) for teacher in teachers]
    big = fastmerge.BigStudent(*teachers, example_inputs=x)
    expected = mean_output(teachers, x)
    with big.open_gates():
        assert relative_error(big(*x), expected) <= TOLERANCE[dtype]
    before = copy_state(big)
    select_gates(big, x, recalibrate=True)
    assert relative_error(big.compress()(*x), big(*x)) <= TOLERANCE[dtype]
    big.load_state_dict(before)
    del before
    big.link()
    with big.open_gates():
        assert relative_error(big(*x), expected) <= TOLERANCE[dtype]
    disturb_weights(big, scale=0.1)
    select_gates(big, x, seed=1, recalibrate=True)
    student = big.compress()
    assert relative_error(student(*x), big(*x)) <= TOLERANCE[dtype]
    assert type(student) is type(teachers[0])
    for teacher, state in zip(teachers, states, strict=True):
        assert all(torch.equal(tensor, state[key]) for key, tensor in teacher.state_dict().items())
    teachers[0].load_state_dict(student.state_dict(), strict=True)
    assert relative_error(teachers[0](*x), student(*x)) == 0
    gc.collect()


@pytest.mark.parametrize("name", vision.FAMILIES)
def test_family(name: str) -> None:
    check(name, torch.float64, count=2)


@pytest.mark.parametrize("name", vision.small_transformers())
def test_small_transformer(name: str) -> None:
    check_network(vision.small_transformers()[name], 32, torch.float64, count=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*vision.FAMILIES, *vision.LARGE])
def test_family_of_three_teachers(name: str) -> None:
    check(name, torch.float64, count=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_other_network(name: str) -> None:
    check(name, torch.float64, count=2)


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5"])
def test_family_in_float32(name: str) -> None:
    check(name, torch.float32, count=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*vision.FAMILIES, *vision.LARGE])
def test_every_family_in_float32(name: str) -> None:
    check(name, torch.float32, count=2)


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "mobilenet_v2"])
@torch.no_grad()
def test_example_inputs_are_inferred(name: str) -> None:
    x = (make_batch(4, (3, 64, 64)),)
    teachers = make_teachers(partial(vision.make, name), x, count=2)
    big = fastmerge.BigStudent(*teachers)
    with big.open_gates():
        assert relative_error(big(*x), mean_output(teachers, x)) <= 1e-9


@torch.no_grad()
def test_googlenet_in_training_mode_has_its_auxiliary_outputs() -> None:
    x = (make_batch(4, (3, 64, 64)),)
    teachers = make_teachers(partial(vision.make, "googlenet"), x, count=2)
    for module in [module for teacher in teachers for module in teacher.modules()]:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    big = fastmerge.BigStudent(*teachers).train()
    with big.open_gates():
        output = big(*x)
    expected = mean_output([teacher.train() for teacher in teachers], x)
    assert set(output._fields) == {"logits", "aux_logits1", "aux_logits2"}
    assert relative_error(tuple(output), tuple(expected)) <= 1e-9

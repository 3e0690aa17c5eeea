"""BigStudent is exact for a network of every torchvision family (``-m slow``: for all of them)."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn

import fastmerge
import torchvision_networks as vision
from teachers import check_exact, make_batch, make_teachers, mean_output, relative_error, select_gates

LARGER_THAN_MEMORY = {"regnet_y_128gf"}  # benchmarks/coverage.py takes it, alone
OTHERS = sorted(name for name in vision.names() if name not in {*vision.FAMILIES, *vision.LARGE, *LARGER_THAN_MEMORY})


# What runs alone in training: a random factor for each sample, of stochastic depth, stands between norm and add.
NOT_FUSED = {
    "efficientnet_b0": {"followed by mul, which no fused operation includes": 9},
    "efficientnet": {"followed by mul, which no fused operation includes": 1},
    "efficientnet_v2": {"followed by mul, which no fused operation includes": 1},
}


def check(name: str, dtype: torch.dtype, count: int) -> fastmerge.BigStudent:
    side = vision.size(name)
    return check_exact(
        partial(vision.make_with_small_classifier, name), (make_batch(4, (3, side, side), dtype=dtype),), dtype, count
    )


@pytest.mark.parametrize("name", vision.FAMILIES)
def test_family(name: str) -> None:
    """Exact, and all BatchNorms fused with what follows."""
    big = check(name, torch.float64, count=2)
    assert Counter(norm.reason for norm in big.norms() if not norm.fused) == NOT_FUSED.get(name, {})


@pytest.mark.parametrize("name", vision.small_convolutional())
def test_family_of_fewer_layers(name: str) -> None:
    x = (make_batch(4, (3, 32, 32)),)
    big = check_exact(vision.small_convolutional()[name], x, torch.float64, count=2)
    assert Counter(norm.reason for norm in big.norms() if not norm.fused) == NOT_FUSED.get(name, {})


@pytest.mark.slow
@pytest.mark.parametrize("name", vision.LARGE)
def test_large_family(name: str) -> None:
    test_family(name)


@pytest.mark.parametrize("name", vision.small_transformers())
def test_small_transformer(name: str) -> None:
    check_exact(vision.small_transformers()[name], (make_batch(4, (3, 32, 32)),), torch.float64, count=2)


@torch.no_grad()
def test_windows_are_others_at_another_image_size() -> None:
    """With 16 pixels no window is moved, with 36 the image is padded; closed channels that were dropped change neither."""
    make = partial(vision.small_transformers()["swin_v2"], depths=[2], num_heads=[2])
    teachers = make_teachers(make, (make_batch(4, (3, 32, 32)),), 2, torch.float64)
    big = fastmerge.BigStudent(*teachers, example_inputs=make_batch(2, (3, 32, 32)), verify=False)
    inputs = [(make_batch(4, (3, side, side), seed=side),) for side in (16, 36)]
    for x in inputs:
        with big.open_gates():
            assert relative_error(big(*x), mean_output(teachers, x)) <= 1e-9
    select_gates(big, inputs[0])
    for drop in (lambda: None, big.compact):
        drop()
        for x in inputs:
            assert relative_error(big.compress()(*x), big(*x)) <= 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", [*vision.FAMILIES, *vision.LARGE])
def test_family_of_three_teachers(name: str) -> None:
    check(name, torch.float64, count=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_other_network(name: str) -> None:
    check(name, torch.float64, count=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*vision.FAMILIES, *vision.LARGE])
def test_every_family_in_float32(name: str) -> None:
    check(name, torch.float32, count=2)


@pytest.mark.parametrize(
    "name", ["resnet18", *(pytest.param(name, marks=pytest.mark.slow) for name in ("googlenet", "mobilenet_v2"))]
)
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
    big = fastmerge.BigStudent(*teachers, verify=False).train()
    with big.open_gates():
        output = big(*x)
    expected = mean_output([teacher.train() for teacher in teachers], x)
    assert set(output._fields) == {"logits", "aux_logits1", "aux_logits2"}
    assert relative_error(tuple(output), tuple(expected)) <= 1e-9

"""The ResNet-20 for CIFAR is the one of the paper, and merges."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastmerge
from fastmerge.networks import ResNetCifar, resnet20
from teachers import make_batch, make_teachers, mean_output, relative_error


def test_it_has_the_papers_layers_and_size() -> None:
    network = resnet20(num_classes=10)
    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m.weight.shape[2:] != (1, 1)]
    assert len(layers) == 20
    projections = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64  # the paper's 0.27 million are without these
    assert sum(p.numel() for p in network.parameters()) == 269_722 + projections


def test_the_stages_halve_the_image_and_double_the_channels() -> None:
    network, shapes = resnet20().eval(), []
    for stage in (network.layer1, network.layer2, network.layer3):
        stage.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 100)
    assert shapes == [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]


def test_width_multiplies_every_hidden_layer() -> None:
    wide = ResNetCifar(1, 5, width=2)
    assert wide.conv1.weight.shape == (32, 3, 3, 3)
    assert wide.layer3[0].conv2.weight.shape == (128, 128, 3, 3)
    assert wide(torch.randn(1, 3, 8, 8).expand(2, -1, -1, -1)).shape == (2, 5)


def test_the_mean_of_two_is_their_big_student_with_open_gates() -> None:
    inputs = (make_batch(4, (3, 16, 16)),)
    teachers = make_teachers(lambda: ResNetCifar(2, 10), inputs, 2)
    big = fastmerge.BigStudent(*teachers)
    assert len(big.groups) == 9  # a stream per stage and the inside of each block
    for linked in (False, True):
        if linked:
            big.link()
        with big.open_gates(), torch.no_grad():
            assert relative_error(big(*inputs), mean_output(teachers, inputs)) < 1e-9


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="num_classes=0"):
        ResNetCifar(3, 0)

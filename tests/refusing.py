"""Networks to be refused, and the message they are refused with."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastmerge
from architectures import BY_NAME

IMAGES = torch.randn(2, 3, 8, 8)


def resnet(**options: object) -> nn.Module:
    make = BY_NAME["resnet_projected_shortcut"].make
    return type(make())(**{"shortcut": "project", **options})


def refusal(*teachers: object, example_inputs: object = IMAGES) -> str:
    """The message of the ValueError or TypeError that BigStudent raises."""
    with pytest.raises((ValueError, TypeError)) as error:
        fastmerge.BigStudent(*teachers, example_inputs=example_inputs)  # type: ignore[arg-type]
    return str(error.value)


def conv_network(*layers: nn.Module, **options: object) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, **options), *layers, nn.Conv2d(6, 4, 3, padding=1))  # type: ignore[arg-type]

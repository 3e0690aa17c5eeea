"""ResNet-18 is torchvision's, in any width."""

from __future__ import annotations

import pytest
import torch

from fastmerge.networks import ResNet18


def test_it_computes_what_torchvisions_does() -> None:
    models = pytest.importorskip("torchvision.models")
    other = models.resnet18(num_classes=7)
    network = ResNet18(7)
    network.load_state_dict(other.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(x), other.eval()(x))
        torch.testing.assert_close(network.train()(x), other.train()(x))
    for (name, value), expected in zip(network.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, msg=lambda text, name=name: f"{name}: {text}")


def test_width_multiplies_every_hidden_layer() -> None:
    with torch.device("meta"):
        narrow, wide = ResNet18(), ResNet18(width=2)
    assert sum(p.numel() for p in narrow.parameters()) == 11_689_512
    assert wide.conv1.weight.shape == (128, 3, 7, 7)
    assert wide.fc.weight.shape == (1000, 1024)


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="width=0"):
        ResNet18(10, 0)

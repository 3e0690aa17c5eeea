"""Which code convolves: PyTorch's on a CPU; on a CUDA device, for several teachers at once, whatever was measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from fastmerge.kernels.block_conv import block_diagonal_conv2d, conv2d, fixed_choice
from torch import nn

import fastmerge
from architectures import BY_NAME, merged
from fastmerge.channels.layer_calls import Geometry
from fastmerge.wide import layers
from fastmerge.wide.layers import GroupedLayer, WideLayer
from teachers import make_teachers
from wide_programs import SIZE, assert_close, run

PLAIN = Geometry("conv", 2, {"padding": 1, "stride": 1, "dilation": 1})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What convolves in two dimensions: "one", "groups", "measured streams" or "measured groups", call by call."""
    found: list[str] = []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found.append("groups" if name == "one" and kwargs.get("groups", 1) > 1 else name)
            return function(*args, **kwargs)

        return call

    monkeypatch.setitem(layers._CONV, 2, noted("one", F.conv2d))
    for name, label in (("block_diagonal_conv2d", "measured streams"), ("grouped_conv2d", "measured groups")):
        monkeypatch.setattr(layers, name, noted(label, getattr(layers, name)))
    return found


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if tensors lay on a CUDA device, where without one what was measured falls back to PyTorch."""
    plain = layers._is_plain_conv2d
    monkeypatch.setattr(layers, "_runs_as_measured", lambda geometry, x, weight: plain(geometry, weight))


@pytest.mark.parametrize("joined", [False, True], ids=["streams", "joined"])
@pytest.mark.parametrize("name", ["resnet_projected_shortcut", "resnext", "mobilenet"])
def test_every_grouped_convolution_of_an_unlinked_network_is_the_measured_one(
    name: str, joined: bool, calls: list[str], request: pytest.FixtureRequest
) -> None:
    big, x = merged(name).train(), BY_NAME[name].inputs(SIZE, seed=3)
    expected = run(big, x, joined)
    assert not any("measured" in call for call in calls)
    calls.clear()
    request.getfixturevalue("as_on_cuda")
    assert_close(run(big, x, joined), expected)
    dense = [m for m in big.network.modules() if isinstance(m, WideLayer) and m.geometry.kind == "conv"]
    block_diagonal = sum(m.wiring.has_off_diagonal for m in dense)
    grouped = sum(isinstance(m, GroupedLayer) for m in big.network.modules())
    assert block_diagonal
    assert bool(grouped) == (name != "resnet_projected_shortcut")
    assert calls.count("measured groups") == (block_diagonal + grouped if joined else big.num_teachers * grouped)
    assert calls.count("measured streams") == (0 if joined else block_diagonal)
    assert calls.count("one") == len(dense) - block_diagonal  # those that read what all teachers share, or average
    assert "groups" not in calls


def test_a_linked_network_has_dense_layers(calls: list[str], as_on_cuda: None) -> None:
    big, x = merged("resnet_projected_shortcut"), BY_NAME["resnet_projected_shortcut"].inputs(SIZE)
    big.link()
    big(*x)
    assert set(calls) == {"one"}


@pytest.mark.parametrize(
    ("geometry", "size"),
    [
        (Geometry("conv", 2, {"padding": "same"}), 4),
        (Geometry("conv_transpose", 2, {"stride": 2}), 3),
    ],
    ids=["same, padded on one side", "transposed"],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_what_no_kernel_takes_is_pytorchs(geometry: Geometry, size: int, calls: list[str], as_on_cuda: None) -> None:
    x, weight = torch.randn(2, 8, 9, 9), torch.randn(8, 4, size, size)
    joined = layers.convolve(geometry, x, weight, None, groups=2)
    torch.testing.assert_close(torch.cat(layers.convolve_streams(geometry, x.chunk(2, 1), (weight,), None), 1), joined)
    assert not any("measured" in call for call in calls)


def test_same_padding_of_an_odd_kernel_is_measured(calls: list[str], as_on_cuda: None) -> None:
    geometry, x, weight = Geometry("conv", 2, {"padding": "same"}), torch.randn(2, 8, 9, 9), torch.randn(8, 4, 3, 3)
    out = layers.convolve(geometry, x, weight, None, groups=2)
    torch.testing.assert_close(out, F.conv2d(x, weight, padding=1, groups=2))
    assert calls == ["measured groups"]


@pytest.mark.parametrize(("groups", "expected"), [(2, "measured groups"), (32, "groups")])
def test_a_compiler_gets_pytorchs_many_groups(
    groups: int, expected: str, calls: list[str], as_on_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiled graph holds the operation even where nothing was measured, which then convolves group by group."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    layers.convolve(PLAIN, torch.randn(2, 64, 9, 9), torch.randn(64, 64 // groups, 3, 3), None, groups=groups)
    assert calls == [expected]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@torch.no_grad()
def test_an_even_kernel_with_same_padding(as_on_cuda: None) -> None:
    """PyTorch pads one side more; the kernels can't."""

    def make() -> nn.Module:
        layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 4, padding="same"), nn.ReLU(), nn.Conv2d(6, 4, 1)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    x = BY_NAME["unet"].inputs(SIZE)
    teachers = make_teachers(make, x, 2)
    big = fastmerge.BigStudent(*teachers, example_inputs=x).eval()
    with big.open_gates():
        torch.testing.assert_close(big(*x), (teachers[0](*x) + teachers[1](*x)) / 2)


def test_what_runs_plain_is_found_out_once_for_calls_alike() -> None:
    xs, weights = torch.randn(2, 2, 4, 5, 5).unbind(), torch.randn(2, 6, 4, 3, 3).unbind()
    weight = torch.cat(weights)

    def run() -> int:
        with mock.patch.object(conv2d, "worth_an_operation", wraps=conv2d.worth_an_operation) as asked:
            ys = block_diagonal_conv2d(xs, weight, padding=(1, 1), parts=(weights, None))
        for x, w, y in zip(xs, weights, ys, strict=True):
            torch.testing.assert_close(y, F.conv2d(x, w, padding=1))
        return asked.call_count

    with fixed_choice("split"):
        assert [run(), run()] == [1, 0]
    assert [run(), run()] == [1, 0]  # what was known is forgotten when choices change

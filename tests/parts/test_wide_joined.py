"""Programs of joined tensors, where code changes what it reads, and the normalisations that they call."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmerge
from architectures import BY_NAME, merged
from fastmerge.wide.norms import WideBatchNorm
from teachers import make_teachers, randomise_parameters
from wide_programs import SIZE, assert_close, program, run


def assert_same(big: fastmerge.BigStudent, x: tuple[Tensor, ...]) -> None:
    assert_close(run(big, x, joined=True), run(big, x, joined=False))


@pytest.mark.parametrize("name", ["resnet_projected_shortcut", "mobilenet"])
def test_three_teachers_joined(name: str) -> None:
    big = merged(name, count=3).train()
    assert_same(big, BY_NAME[name].inputs(SIZE, seed=3))


@pytest.mark.parametrize(
    "name",
    [
        "resnet_projected_shortcut",
        "resnet_squeeze_excitation",
        "resnext",
        "mobilenet",
        "densenet",
        "squeezenet",
        "unet",
    ],
)
def test_networks_stay_joined_from_end_to_end(name: str) -> None:
    assert "split_streams" not in program(merged(name), joined=True)


def test_what_mixes_channels_runs_per_stream() -> None:
    assert "split_streams" in program(merged("shufflenet_v2"), joined=True)


class ChangesAView(nn.Module):
    """An operation in place on a view of features that are used again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardtanh(self.conv1(x), -2.0, 2.0)
        x.transpose(2, 3).relu_()
        return self.conv2(x * 2).mean((2, 3))


class ChangesAfterAView(ChangesAView):
    """Features change in place after a view of them was taken, which is used afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardtanh(self.conv1(x), -2.0, 2.0)
        view = x.transpose(2, 3)
        F.relu(x, inplace=True)
        return self.conv2(view * 2).mean((2, 3))


class ReluStatement(ChangesAView):
    """A ReLU in place whose result is not used, on a value that other operations read before and after."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        before = x + 1
        F.relu(x, True)
        return self.conv2(x + before).mean((2, 3))


@pytest.mark.parametrize("make", [ChangesAView, ChangesAfterAView, ReluStatement])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_operations_in_place(make: type[nn.Module], training: bool) -> None:
    x = BY_NAME["unet"].inputs(SIZE)
    big = fastmerge.BigStudent(*make_teachers(make, x, 2), example_inputs=x).train(training)
    assert_same(big, x)
    big.link()
    assert_same(big, x)


NORM_OPTIONS = [
    {},
    {"momentum": None},
    {"affine": False},
    {"track_running_stats": False},
    {"momentum": 0.3, "eps": 0.1},
]


@pytest.mark.parametrize("options", NORM_OPTIONS, ids=str)
@pytest.mark.parametrize("joined", [False, True], ids=["streams", "joined"])
@torch.no_grad()
def test_wide_batch_norm_is_the_teachers(options: dict[str, object], joined: bool) -> None:
    """Outputs and statistics over three training batches and one in eval mode, from counters that differ."""
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(5, **options).double() for _ in range(3)]
    for count, norm in enumerate(norms):
        randomise_parameters(norm)
        for _ in range(count):
            norm(torch.randn(4, 5, 2, 2, dtype=torch.float64))
    wide = WideBatchNorm(copy.deepcopy(norms))
    for training in (True, True, True, False):
        streams = [torch.randn(4, 5, 2, 2, dtype=torch.float64) for _ in norms]
        expected = [norm.train(training)(x) for norm, x in zip(norms, streams, strict=True)]
        wide.train(training)
        outputs = wide(torch.cat(streams, 1))[0].chunk(3, 1) if joined else wide(*streams)
        torch.testing.assert_close(list(outputs), expected)
        if wide.running_mean is not None:
            for name in ("running_mean", "running_var"):
                torch.testing.assert_close(getattr(wide, name), torch.cat([getattr(norm, name) for norm in norms]))
            assert wide.num_batches_tracked.tolist() == [int(norm.num_batches_tracked) for norm in norms]


class LooksInside(nn.Module):
    """A BatchNorm whose weight the network's own code reads, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv1(x))) * self.norm.weight.view(1, -1, 1, 1)
        return self.conv2(x).mean((2, 3))


@torch.no_grad()
def test_a_module_whose_parameters_the_code_reads() -> None:
    x = BY_NAME["unet"].inputs(SIZE)
    teachers = make_teachers(LooksInside, x, 2)
    big = fastmerge.BigStudent(*teachers, example_inputs=x).eval()
    with big.open_gates():
        torch.testing.assert_close(big(*x), (teachers[0](*x) + teachers[1](*x)) / 2)
    big.link()
    with big.open_gates():
        torch.testing.assert_close(big(*x), (teachers[0](*x) + teachers[1](*x)) / 2)

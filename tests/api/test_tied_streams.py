"""Streams that LayerNorms take together, kept from one teacher."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastmerge
from architectures import BATCH, BY_NAME, teachers_of
from fastmerge import BigStudent
from teachers import TOLERANCE, exactness, mean_output

# By name of the network, whose channels are one place.
TIED = {
    "layer_norm": {"2": 6},
    "rms_norm": {"0": 8},
    "vision_transformer": {"patches": 8},
    "written_attention": {"embed": 8},
    "channels_last_blocks": {"stem": 12},
}


@pytest.mark.parametrize("name", [*TIED, "cosine_attention", "written_norms"])
@pytest.mark.parametrize("count", [2, 3])
def test_they_are_exact(name: str, count: int) -> None:
    teachers, x = teachers_of(name, count), BY_NAME[name].inputs(BATCH)
    big = BigStudent(*teachers, example_inputs=x, tie_streams=True)
    opened, compressed = exactness(big, x, mean_output(teachers, x))
    assert max(*opened, *compressed) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("name", TIED)
def test_their_channels_are_one_place(name: str) -> None:
    teachers, x = teachers_of(name, 2), BY_NAME[name].inputs(BATCH)
    tied, apart = (BigStudent(*teachers, example_inputs=x, tie_streams=tie).groups for tie in (True, False))
    for group, width in TIED[name].items():
        (one,) = [each for each in tied if each.name == group]
        assert (one.size, one.channels) == (1, width)
        (each,) = [each for each in apart if each.name == group]
        assert each.size > 1
    assert fastmerge.check(*teachers, example_inputs=x, tie_streams=True).groups.choice.fixed > apart.choice.fixed


class Padded(nn.Module):
    """A LayerNorm takes zeros together with channels, and gives other values than zeros for them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.layer_norm(F.pad(self.first(x).relu(), (2, 0)), (8,)))


def test_zeros_that_are_taken_together_with_them() -> None:
    teachers, x = [Padded().double() for _ in range(2)], torch.randn(BATCH, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="normalises channels of the network's input together with hidden ones"):
        BigStudent(*teachers, example_inputs=x)
    big = BigStudent(*teachers, example_inputs=x, tie_streams=True)
    opened, compressed = exactness(big, (x,), mean_output(teachers, (x,)))
    assert max(*opened, *compressed) <= TOLERANCE[torch.float64]


def test_a_student_has_one_teachers() -> None:
    teachers = teachers_of("vision_transformer", 2)
    x = BY_NAME["vision_transformer"].inputs(32)[0].float()
    single = [copy.deepcopy(teacher).float() for teacher in teachers]
    data = DataLoader(TensorDataset(x, torch.arange(len(x)) % 4), 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of gates that have not settled
        student, history = fastmerge.merge(
            single, data, merge_epochs=1, finetune_epochs=1, lr=1e-9, gate_lr=1e-9, tie_streams=True, seed=0
        )
    kept = history.kept["patches"]  # places by teacher
    assert sorted(kept) == [0, 1]
    mine, *theirs = (dict(network.named_parameters())["encoder.norm.weight"] for network in (student, *single))
    distances = [(mine - their).abs().max() for their in theirs]
    assert distances[kept.index(1)] < 1e-5 < distances[kept.index(0)]

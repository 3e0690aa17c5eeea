"""Every option of a merge once: Python's arguments, the command line and checkpoints follow from the fields."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from dataclasses import fields
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import fastmerge
from fastmerge.checkpoints import pack, unpack
from fastmerge.cli import merge, resume, run
from fastmerge.experiments.recipes import sine
from fastmerge.merging.options import Options, Plan

LOADERS = ("teachers", "train_loader", "val_loader")


def test_the_arguments_of_merge_are_the_options() -> None:
    given = inspect.signature(fastmerge.merge).parameters
    arguments = {name: each.default for name, each in given.items() if name not in LOADERS}
    assert arguments == {each.name: each.default for each in fields(Options)}
    explained = inspect.getdoc(fastmerge.merge) or ""
    documented = explained.partition("Args:")[2].partition("Returns:")[0]
    for name in given:
        assert f" {name}:" in documented or f" {name}," in documented, f"merge() does not explain {name}"


def flags(module: Any) -> dict[str, argparse.Action]:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return {action.dest: action for action in parser._actions}


def test_the_command_line_has_the_flags_of_the_options() -> None:
    found = flags(merge)
    for each in fields(Options):
        if each.metadata["flag"] is not None:
            assert f"--{each.name.replace('_', '-')}" in found[each.name].option_strings
            assert each.metadata["what"] in (found[each.name].help or "").replace("%%", "%")
    varying = {each.name for each in fields(Options) if each.metadata["varies"]}
    assert varying == {"link_at", "gate_schedule", "compact_at", "distill", "temperature"} == varying & set(flags(run))


def test_a_checkpoint_is_compared_by_what_changes_the_result() -> None:
    free = {each.name for each in fields(Options) if not each.metadata["compared"]}
    assert free <= resume._FREE
    compared = Options(autocast=torch.float16, milestones=(3, 4)).compared()
    assert set(compared) == {each.name for each in fields(Options)} - free
    assert {"accumulate", "device", "progress", "callback", "checkpoint_dir"} <= free
    assert (compared["autocast"], compared["criterion"], compared["milestones"]) == (
        "torch.float16",
        "cross_entropy",
        [3, 4],
    )


class Focal(torch.nn.Module):
    def __init__(self, power: float, weight: float) -> None:
        super().__init__()
        self.power = power
        self.register_buffer("weight", torch.full((3,), weight))


class Weighted:
    def __init__(self, weight: float) -> None:
        self.weight = weight

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.weight * cross_entropy(output, target)


@pytest.mark.parametrize(
    ("make", "other"),
    [
        (lambda: partial(cross_entropy, label_smoothing=0.1), partial(cross_entropy, label_smoothing=0.2)),
        (lambda: Weighted(0.5), Weighted(0.6)),
        (lambda: Focal(2.0, 1.0), Focal(3.0, 1.0)),
        (lambda: Focal(2.0, 1.0), Focal(2.0, 4.0)),
        (lambda: torch.nn.CrossEntropyLoss(), torch.nn.CrossEntropyLoss(label_smoothing=0.1)),
        (lambda: Weighted(0.5).__call__, cross_entropy),
    ],
)
def test_functions_are_compared_by_what_they_are_not_by_where_they_lie(make: Any, other: Any) -> None:
    first, again = (Options(criterion=make(), optimizer=partial(make(), 1)).compared() for _ in range(2))
    assert first == again == json.loads(json.dumps(first))
    assert not re.search("0x[0-9a-f]{6}", json.dumps(first))
    assert Options(criterion=other).compared()["criterion"] != first["criterion"]


def test_numbers_of_numpy_are_numbers() -> None:
    options = Options(
        lr=np.float32(0.5),
        momentum=Fraction(1, 2),
        gate_lr=torch.tensor(0.5),
        compact_at=np.float32(0.5),
        merge_epochs=np.int64(3),
        recalibrate=np.bool_(False),
        milestones=np.array([1, 2]),
    )
    values = [
        options.lr,
        options.momentum,
        options.gate_lr,
        options.compact_at,
        options.merge_epochs,
        options.recalibrate,
    ]
    assert values == [0.5, 0.5, 0.5, 0.5, 3, False]
    assert [type(value) for value in values] == [float, float, float, float, int, bool]
    assert options.compared()["milestones"] == [1, 2]
    structure, tensors = pack({"lr": np.float64(0.01), "epoch": np.int64(3), "nesterov": np.bool_(True)})
    assert unpack(json.loads(json.dumps(structure)), tensors) == {"lr": 0.01, "epoch": 3, "nesterov": True}


def test_a_warm_up_rises_to_the_smallest_learning_rate() -> None:
    for lr in (0.1, 1e-3, 2e-5):
        rates = [lr * Plan(epochs=4, lr=lr, warmup=3).factor(epoch) for epoch in range(4)]
        assert rates == sorted(rates)
        assert rates[0] == pytest.approx(min(1e-4, lr / 10))
        assert rates[-1] == pytest.approx(lr)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"merge_epochs": 0},
            "merge needs merge_epochs, epochs of the big student, a whole number of at least 1; got 0",
        ),
        ({"merge_epochs": True}, "a whole number of at least 1; got True"),
        ({"finetune_epochs": 1.5}, r"finetune_epochs, .* of at least 0; got 1\.5"),
        ({"lr": 0.0}, r"lr, learning rate of the weights, a finite number above 0; got 0\.0"),
        ({"lam_step": float("nan")}, "lam_step, .* a finite number of at least 0; got nan"),
        ({"link_at": 1.1}, r"link_at, .* in 0\.\.1; got 1\.1"),
        ({"link_at": "x"}, r"link_at, .* in 0\.\.1; got 'x'"),
        ({"layerwise": "2"}, "layerwise, .* a whole number of at least 1; got '2'"),
        ({"gate_schedule": "linear"}, "gate_schedule, .* quadratic or budget; got 'linear'"),
        ({"compact_at": "soon"}, "compact_at, .* 'settled' or None; got 'soon'"),
        ({"accumulate": 0}, "accumulate, .* at least 1; got 0"),
        ({"ema": 1.0}, "ema below 1"),
        ({"seed": 2**64}, r"seed, .* a whole number in 0\.\.18446744073709551615; got 18446744073709551616"),
        ({"temperature": None}, "temperature, .* a finite number above 0; got None"),
        ({"temperature": torch.tensor(0.0)}, "temperature, .* a finite number above 0; got 0"),
        ({"temperature": torch.ones(2)}, "temperature, .* a finite number above 0; got tensor"),
        ({"warmup": None}, "warmup, .* a whole number of at least 0; got None"),
        ({"weight_decay": True}, "weight_decay, .* a finite number of at least 0; got True"),
        ({"recalibrate": np.ones(2)}, "recalibrate, .* True or False; got array"),
        ({"tie_streams": "no"}, "tie_streams, .* True or False; got 'no'"),
        ({"gate_schedule": np.ones(2)}, "gate_schedule, .* quadratic or budget; got array"),
        ({"compact_at": np.ones(2)}, "compact_at, .* 'settled' or None; got array"),
        ({"milestones": torch.tensor(1)}, r"milestones, whole numbers of epochs such as \(20, 40\); got 1"),
    ],
)
def test_what_is_out_of_range_is_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**wrong)
    with pytest.raises(ValueError, match=message):
        fastmerge.merge([torch.nn.Linear(1, 1)] * 2, [], **wrong)


def test_checkpoints_go_to_a_path() -> None:
    with pytest.raises(TypeError, match="merge needs checkpoint_dir, a path; got a int"):
        Options(checkpoint_dir=1)  # type: ignore[arg-type]


def test_recipes_choose_among_the_options() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'luck'"):
        sine().varied(luck=1)

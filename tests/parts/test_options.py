"""Every option of a merge once: Python's arguments, the command line and checkpoints follow from the fields."""

from __future__ import annotations

import argparse
import inspect
from dataclasses import fields
from typing import Any

import pytest
import torch

import fastmerge
from fastmerge.cli import merge, resume, run
from fastmerge.experiments.recipes import sine
from fastmerge.merging.options import Options

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
    ],
)
def test_what_is_out_of_range_is_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**wrong)
    with pytest.raises(ValueError, match=message):
        fastmerge.merge([torch.nn.Linear(1, 1)] * 2, [], **wrong)


def test_recipes_choose_among_the_options() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'luck'"):
        sine().varied(luck=1)

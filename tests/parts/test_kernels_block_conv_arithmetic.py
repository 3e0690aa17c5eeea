"""What float32 is multiplied in, as PyTorch is told, and that a choice measured in one way holds for no other."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from fastmerge.kernels.block_conv import passes
from fastmerge.kernels.block_conv.arithmetic import arithmetic
from fastmerge.kernels.block_conv.choice import choices
from fastmerge.kernels.block_conv.formulas import live_blocks
from fastmerge.kernels.block_conv.problem import Problem

from block_conv_checks import Case, operands
from block_conv_choices import measuring_at_once

CASE = Case(2, 1, 5, 6, 16, 32, 3, 1)


@pytest.fixture
def settings() -> Iterator[None]:
    """PyTorch's settings of float32, put back afterwards."""
    assert torch.backends.cudnn.allow_tf32
    yield
    if hasattr(torch.backends, "fp32_precision"):
        torch.backends.fp32_precision = "none"
    torch.backends.cudnn.allow_tf32 = True


@pytest.mark.usefixtures("settings")
def test_float32_is_multiplied_as_pytorch_is_told() -> None:
    cudnn = torch.backends.cudnn
    assert arithmetic(torch.float32) == "tf32"
    cudnn.allow_tf32 = False
    assert arithmetic(torch.float32) == "float32"
    cudnn.allow_tf32 = True
    assert arithmetic(torch.float32) == "tf32"


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="needs PyTorch 2.9 or newer")
@pytest.mark.usefixtures("settings")
def test_float32_is_multiplied_as_the_newer_settings_say() -> None:
    conv = torch.backends.cudnn.conv
    for setting, name in (("ieee", "float32"), ("tf32", "tf32"), ("none", "float32")):
        conv.fp32_precision = setting
        assert arithmetic(torch.float32) == name
    # What is set for all operations holds where convolutions have no setting of their own.
    torch.backends.fp32_precision = "tf32"
    assert arithmetic(torch.float32) == "tf32"


def test_pytorch_without_the_newer_setting() -> None:
    for allowed, name in ((True, "tf32"), (False, "float32")):
        with mock.patch.object(torch.backends, "cudnn", mock.Mock(spec=["allow_tf32"], allow_tf32=allowed)):
            assert arithmetic(torch.float32) == name


def test_half_precisions_are_multiplied_as_they_are() -> None:
    assert (arithmetic(torch.float16), arithmetic(torch.bfloat16)) == ("float16", "bfloat16")


def set_tf32(allowed: bool) -> mock._patch[bool]:
    return mock.patch("fastmerge.kernels.block_conv.arithmetic.takes_tf32", return_value=allowed)


@pytest.mark.parametrize(("measured", "now"), [(True, False), (False, True)])
@pytest.mark.usefixtures("no_choices")
def test_a_winner_in_tf32_is_none_in_float32(measured: bool, now: bool) -> None:
    case = Case(2, 1, 4, 4, 8, 64, 1, 1)
    given = operands(case, torch.float32)
    problem = Problem(2, case.geometry)
    stand_in = mock.patch.object(
        passes, "_triton_forward", side_effect=lambda *args, tile: passes.cudnn.split_forward(*args)
    )
    seen = []
    for allowed in (measured, measured, now):
        with measuring_at_once(), stand_in, set_tf32(allowed):
            passes.forward(problem, given.xs, given.weight, given.bias)
        seen.append([row["key"] for row in choices.table()])
    assert len(seen[0]) == 1
    assert seen[1] == seen[0]
    assert len(seen[2]) == 2
    words = {row["key"].split(" | ")[1] for row in choices.table()}
    assert words == {"forward tf32", "forward float32"}
    by_words = {row["key"].split(" | ")[1]: set(row["milliseconds"]) for row in choices.table()}
    assert {name for name in by_words["forward float32"] if "x16 " in name} == by_words["forward float32"] - {"split"}


def test_keys_tell_apart_what_runs_differently() -> None:
    x = torch.zeros(1, 64, 4, 4)
    masks = [torch.eye(2, 8).bool(), torch.eye(4, 4).bool()[:, [1, 0, 2, 3]], torch.eye(8, 2).bool()]
    masks[0][0, 2:4] = True
    masks[2][2:4, 0] = True
    problems = [Problem(1, CASE.geometry, live_blocks(mask)) for mask in masks]
    problems += [Problem(1, CASE.geometry), Problem(1, CASE.geometry, channels_last=False)]
    keys = {problem.key("forward", False, x.shape, (64, 64, 3, 3), torch.float16, x.device) for problem in problems}
    assert len(keys) == len(problems)

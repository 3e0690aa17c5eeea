"""Runs one of a big student's programs, under fixed draws, and compares what two of them give."""

from __future__ import annotations

import copy
import linecache

import torch
from torch import Tensor

import fastmerge

SIZE = 6


def run(big: fastmerge.BigStudent, x: tuple[Tensor, ...], joined: bool) -> dict[str, Tensor]:
    """Outputs, gradients and buffers of one pass through one of a network's programs, under fixed draws."""
    big = copy.deepcopy(big)
    mode = "train" if big.training else "eval"
    torch.manual_seed(1)
    inputs = tuple(value.clone().requires_grad_() for value in x)
    gates = big._draw_gates(inputs)
    outputs = torch.utils._pytree.tree_leaves(big._programs[mode, False, joined].forward(big.network, gates, *inputs))
    sum((y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).sum() for y in outputs).backward()
    found = {f"output {k}": y.detach() for k, y in enumerate(outputs)}
    found |= {f"gradient of input {k}": value.grad for k, value in enumerate(inputs)}
    found |= {f"gradient of {name}": p.grad for name, p in big.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in big.named_buffers()}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Whether two results of :func:`run` are the same, but for rounding in float64."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


def program(big: fastmerge.BigStudent, joined: bool) -> str:
    code = big._programs["train", False, joined].forward.__code__
    return "".join(linecache.cache[code.co_filename][2])

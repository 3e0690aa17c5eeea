"""How much memory a step takes: what the forward leaves for the backward, and the peak."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.steps import Step
from fastmerge.methods.cost import kept_for_backward


def activation_bytes(step: Step) -> int:
    """Bytes that one forward keeps for its backward, parameters and the batch not counted.

    On a GPU what the allocator holds more after the forward; on the CPU the storages that autograd saves.
    """
    if step.case.device == "cuda":
        step.synchronise()
        before = torch.cuda.memory_allocated()
        loss = step.forward()
        step.synchronise()
        after = torch.cuda.memory_allocated()
        step.backward(loss)
        return after - before
    with kept_for_backward([*step.tensors(), step.x, step.target]) as saved:
        loss = step.forward()
    step.backward(loss)
    return sum(saved.values())


def peak_bytes(step: Step) -> int | None:
    """Bytes allocated on the GPU at the height of a step, its own parameters, gradients and momentum among them.

    None on the CPU, which counts none.
    """
    if step.case.device != "cuda":
        return None
    step.synchronise()
    others = torch.cuda.memory_allocated() - sum(tensor.nbytes for tensor in step.tensors())
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - others


def describe(step: Step) -> dict[str, Any]:
    """Both, for the JSON."""
    return {"activation_bytes": activation_bytes(step), "peak_bytes": peak_bytes(step)}

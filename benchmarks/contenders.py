"""Who takes part in the benchmarks of whole steps: fastmerge in its forms, and what it is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import fastmerge
from benchmarks import names
from benchmarks.baselines.naive_dense import naive_dense
from benchmarks.cases import Case
from benchmarks.counting import step_work
from benchmarks.memory import describe
from benchmarks.race import Contender
from benchmarks.roofline import measure_ceilings
from benchmarks.steps import GraphedTraining, Step

_SETTLED = 3  # steps
_CAPTURED = 5  # the call of a graphed step by which it is


def makers(case: Case) -> dict[str, Callable[[], Contender]]:
    """Everybody who takes part in a case: those that need nothing but cuDNN first, what takes long to compile last.

    On the CPU nothing is captured.
    """
    everybody = {
        names.NAIVE: lambda: contender(case, [naive(case)], dense=True),
        names.TEACHERS: lambda: contender(case, case.make_teachers(), dense=False),
        names.UNLINKED: lambda: contender(case, [big(case)], dense=False),
        names.LINKED: lambda: contender(case, [big(case, linked=True)], dense=True),
        names.UNLINKED_UNGATED: lambda: contender(case, [Ungated(big(case))], dense=False),
        names.UNLINKED_PLAIN: lambda: contender(case, [big(case, fused=False)], dense=False),
        names.LINKED_PLAIN: lambda: contender(case, [big(case, linked=True, fused=False)], dense=True),
        names.TEACHERS_GRAPHED: lambda: graphed(case, case.make_teachers(), dense=False),
        names.GRAPHED: lambda: graphed(case, [big(case)], dense=False),
        names.LINKED_GRAPHED: lambda: graphed(case, [big(case, linked=True)], dense=True),
        names.GROUPED: lambda: contender(case, [naive(case, grouped=True)], dense=False),
        names.TEACHERS_COMPILED: lambda: contender(case, case.make_teachers(), dense=False, compiled=True),
        names.NAIVE_COMPILED: lambda: contender(case, [naive(case)], dense=True, compiled=True),
    }
    return {n: maker for n, maker in everybody.items() if case.device == "cuda" or n not in names.CUDA_ONLY}


def contender(case: Case, networks: Sequence[nn.Module], dense: bool, compiled: bool = False) -> Contender:
    """A training step of some networks, with what it moves, computes and keeps."""
    step = Step(case, networks, compiled)
    for _ in range(_SETTLED):  # momentum, code and the choice of convolutions are there before memory is measured
        step()
    return _contender(case, step, dense, describe(step))


def graphed(case: Case, networks: Sequence[nn.Module], dense: bool) -> Contender:
    """The training step of some networks as ``merge`` captures it in a CUDA graph."""
    step = GraphedTraining(case, networks)
    for _ in range(_CAPTURED):
        step()
    if not all(graph.replays for graph in step.graphs):
        raise RuntimeError(f"the step was not captured by its {_CAPTURED}th call")
    return _contender(case, step, dense, {})


def _contender(case: Case, step: Step | GraphedTraining, dense: bool, memory: dict[str, Any]) -> Contender:
    work = step_work(case, dense)
    flops, moved = sum(w.flops for w in work), sum(w.bytes for w in work)

    def check() -> None:
        if not math.isfinite(step.loss.item()):
            raise FloatingPointError(f"the loss became {step.loss.item()}")

    facts = {"flops": flops, "bytes": moved, "items": case.batch, **memory}
    return Contender(step, facts, lambda: measure_ceilings(case).seconds(work), check)


def naive(case: Case, grouped: bool = False) -> nn.Module:
    return case.place(naive_dense(case.make_teachers(), grouped)).train()


def big(case: Case, linked: bool = False, fused: bool = True) -> fastmerge.BigStudent:
    network = case.place(fastmerge.BigStudent(*case.make_teachers(), example_inputs=case.make_batch()[0][:2]))
    if linked:
        network.link()
    if not fused:
        network.fused = False
    return network.train()


class Ungated(nn.Module):
    """A big student whose gates are open, so that nothing is multiplied by them."""

    def __init__(self, network: fastmerge.BigStudent) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.network.open_gates():
            return self.network(x)

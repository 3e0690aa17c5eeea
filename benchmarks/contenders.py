"""Who takes part in the benchmarks of whole steps: fastmerge in its forms, and what it is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import fastmerge
from benchmarks.baselines.naive_dense import naive_dense
from benchmarks.cases import Case
from benchmarks.counting import Ceilings, Work, step_work
from benchmarks.memory import describe
from benchmarks.race import Contender
from benchmarks.steps import Step

NAIVE = "naive dense"
NAIVE_COMPILED = "naive dense, compiled"
TEACHERS = "teachers"
TEACHERS_COMPILED = "teachers, compiled"
GROUPED = "groups=T"
UNLINKED = "unlinked"
UNLINKED_PLAIN = "unlinked, not fused"
UNLINKED_UNGATED = "unlinked, ungated"
LINKED = "linked"
LINKED_PLAIN = "linked, not fused"
BASELINES = (NAIVE, NAIVE_COMPILED, TEACHERS, TEACHERS_COMPILED, GROUPED)


def makers(case: Case, ceilings: Ceilings) -> dict[str, Callable[[], Contender]]:
    """Everybody who takes part in a case; the reference comes first, fastmerge's default last."""
    return {
        NAIVE: lambda: contender(case, ceilings, [naive(case)], dense=True),
        NAIVE_COMPILED: lambda: contender(case, ceilings, [naive(case)], dense=True, compiled=True),
        TEACHERS: lambda: contender(case, ceilings, case.make_teachers(), dense=False),
        TEACHERS_COMPILED: lambda: contender(case, ceilings, case.make_teachers(), dense=False, compiled=True),
        GROUPED: lambda: contender(case, ceilings, [naive(case, grouped=True)], dense=False),
        LINKED_PLAIN: lambda: contender(case, ceilings, [big(case, linked=True, fused=False)], dense=True),
        LINKED: lambda: contender(case, ceilings, [big(case, linked=True)], dense=True),
        UNLINKED_PLAIN: lambda: contender(case, ceilings, [big(case, fused=False)], dense=False),
        UNLINKED_UNGATED: lambda: contender(case, ceilings, [Ungated(big(case))], dense=False),
        UNLINKED: lambda: contender(case, ceilings, [big(case)], dense=False),
    }


def contender(
    case: Case, ceilings: Ceilings, networks: Sequence[nn.Module], dense: bool, compiled: bool = False
) -> Contender:
    """A training step of some networks, with what it moves, computes and keeps."""
    step = Step(case, networks, compiled)
    step()  # momentum and, when compiled, code are there before memory is measured
    work = step_work(case, dense)
    facts = facts_of(work, ceilings) | {"items": case.batch} | describe(step)

    def check() -> None:
        if not math.isfinite(step.loss.item()):
            raise FloatingPointError(f"the loss became {step.loss.item()}")

    return Contender(step, facts, check)


def facts_of(work: list[Work], ceilings: Ceilings) -> dict[str, Any]:
    """Operations, least traffic and least time of some work."""
    flops, moved = sum(w.flops for w in work), sum(w.bytes for w in work)
    return {"flops": flops, "bytes": moved, "floor": ceilings.seconds(work)}


def naive(case: Case, grouped: bool = False) -> nn.Module:
    return case.place(naive_dense(case.make_teachers(), grouped)).train()


def big(case: Case, linked: bool = False, fused: bool = True) -> fastmerge.BigStudent:
    network = case.place(fastmerge.BigStudent(*case.make_teachers(), example_inputs=case.make_batch()[0][:2]))
    if linked:
        network.link()
    if hasattr(network, "fused"):
        network.fused = fused
    return network.train()


class Ungated(nn.Module):
    """A big student whose gates are open, so that nothing is multiplied by them."""

    def __init__(self, network: fastmerge.BigStudent) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.network.open_gates():
            return self.network(x)

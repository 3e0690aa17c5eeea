"""What is aimed at: ratios of two contenders of one case, on one machine in one process."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks import names as who
from benchmarks.results import CPU_TIME, LAUNCHES, STAGE, TIME


@dataclass(frozen=True)
class Target:
    """A ratio and where it should be.

    Attributes:
        name: what the ratio says.
        case: the case that it is read in, or with "*" in it several, each of which counts.
        numerator, denominator: contenders of the case.
        target, stretch: bounds; the stretch is what would be better still.
        at_least: whether the ratio should be above its bounds rather than below.
        measure: of ``results.MEASURES``.
        same_accuracy: whether it counts only where the denominator's networks are no worse than the numerator's, see
            ``results.Gap``.
    """

    name: str
    case: str
    numerator: str
    denominator: str
    target: float
    stretch: float | None = None
    at_least: bool = False
    measure: str = TIME
    same_accuracy: bool = False

    def is_met(self, value: float, bound: float | None = None) -> bool:
        """Whether a value is at or beyond the target, or another bound."""
        bound = self.target if bound is None else bound
        return value >= bound if self.at_least else value <= bound

    def matching(self, cases: Iterable[str]) -> list[str]:
        """Which of some cases it is read in."""
        return [case for case in cases if fnmatch.fnmatchcase(case, self.case)]

    @property
    def device(self) -> str:
        """ "cpu" or "cuda": the last word of the case."""
        return self.case.rpartition(" ")[2]


def _steps(case: str, suffix: str = "") -> list[Target]:
    """The targets of whole training steps in one case."""
    table = [
        ("block-diagonal / two teachers", who.UNLINKED, who.TEACHERS, 0.85, 0.75, False),
        ("block-diagonal / two compiled teachers", who.UNLINKED, who.TEACHERS_COMPILED, 1.00, 0.90, False),
        ("naive dense / block-diagonal", who.NAIVE, who.UNLINKED, 1.8, 2.1, True),
        ("naive dense / dense (linked)", who.NAIVE, who.LINKED, 1.3, 1.4, True),
        ("naive dense, compiled / dense (linked)", who.NAIVE_COMPILED, who.LINKED, 1.05, 1.12, True),
        ("gated / ungated step", who.UNLINKED, who.UNLINKED_UNGATED, 1.02, 1.01, False),
    ]
    found = [
        Target(f"{name}{suffix}", f"step, {case}", above, below, target, stretch, at_least)
        for name, above, below, target, stretch, at_least in table
    ]
    memory = Target(
        f"activations, fused / eager{suffix}",
        f"step, {case}",
        who.UNLINKED,
        who.NAIVE,
        0.75,
        0.67,
        measure="activation memory",
    )
    return [*found, memory]


def _compress(case: str) -> Target:
    """The height of memory over the big student and its momentum alone."""
    return Target(
        "peak memory of compress() / big student", case, who.IN_PLACE, who.BIG, 1.05, 1.01, measure="peak memory"
    )


def _convolutions(step: str) -> Target:
    """Where a Triton convolution beats T of cuDNN it is the default, and only there."""
    name, case = f"Triton / T cuDNN convolutions, {step}", f"convolution, {step}, * bfloat16 cuda"
    return Target(name, case, "triton", "split", 1.0, 0.95)


def _data(case: str) -> Target:
    """Images per second of the loader over those of the big student; both times are of as many images."""
    return Target("loader / big student, images per second", case, who.UNLINKED, who.DALI, 1.0, 1.2, at_least=True)


def _batch_norm(layer: str, name: str, target: float, stretch: float) -> list[Target]:
    """Against eager, and against a copy of as many bytes: 80 % of its bandwidth, 90 % would be better."""
    case = f"BatchNorm, {layer} gate bf16 cuda"
    return [
        Target(f"{name}: eager / fused", case, "eager", "fused", target, stretch, at_least=True),
        Target(f"{name}: fused / copy", case, "fused", "copy", 1 / 0.8, 1 / 0.9),
    ]


def _stage(case: str) -> list[Target]:
    """A merge stage as long as the paper's, with students that are no worse: as the paper has it, and at its cheapest."""
    name = f"naive dense / merge stage, same accuracy, {case.split()[0]}"
    forms = {"": who.MERGE, ", link_at=0.5, compact_at=0": who.MERGE_COMPACTED}
    more: dict[str, Any] = {"at_least": True, "measure": STAGE, "same_accuracy": True}
    return [
        Target(f"{name}{form}", f"merge, {case}", who.NAIVE, contender, 2.0, 3.0, **more)
        for form, contender in forms.items()
    ]


def _graphed(case: str) -> Target:
    name = f"CUDA graph / eager step, {case.split()[0]}"
    return Target(name, f"step, {case}", who.GRAPHED, who.UNLINKED, 0.40, 0.25)


def _cpu(case: str) -> Target:
    name = f"naive dense / block-diagonal, {case.split()[0]} on a CPU"
    return Target(name, f"step, {case} cpu", who.NAIVE, who.UNLINKED, 1.5, at_least=True)


def _launches(case: str, name: str, contender: str, most: int, teachers: int, cpu: float) -> list[Target]:
    """At most so many launches beside those of two teachers, and at most so much of their CPU time to prepare them."""
    name, case = f"{name} / two teachers, {case.split()[0]}", f"launches, {case} cpu"
    return [
        Target(f"launches, {name}", case, contender, who.TEACHERS, most / teachers, measure=LAUNCHES),
        Target(f"CPU time of launching, {name}", case, contender, who.TEACHERS, cpu, measure=CPU_TIME),
    ]


TARGETS = [
    *_steps("resnet18 224px batch 256 bf16 cuda"),
    *_steps("resnet18 224px batch 256 fp16 cuda", ", fp16"),
    _graphed("resnet20 32px batch 128 bf16 cuda"),
    *[_convolutions(step) for step in ("forward", "input gradient", "weight gradient")],
    _data("data, prepared to 224px cuda"),
    *_batch_norm("layer1", "BatchNorm + ReLU + gate, 206 MB", 2.2, 2.5),
    *_batch_norm("layer2", "BatchNorm + ReLU + gate, 103 MB", 2.2, 2.5),
    *_batch_norm("stem", "BatchNorm + ReLU + pooling + gate", 3.0, 3.8),
    *_stage("resnet18 224px batch 256 bf16 cuda"),
    *_stage("resnet20 32px batch 128 bf16 cuda"),
    _compress("compress, resnet50 cuda"),
    _compress("compress, resnet18 cpu"),
    _cpu("resnet20 32px batch 128 fp32"),
    _cpu("resnet18 64px batch 16 fp32"),
    Target(
        "merges in a stack, distilled / from labels", "merges in a stack, * cpu", who.DISTILLED, who.FROM_LABELS, 1.3
    ),
    *_launches("resnet18 224px batch 256 bf16", "block-diagonal", who.UNLINKED, 480, 592, 1.15),
    *_launches("resnet18 224px batch 256 bf16", "dense (linked)", who.LINKED, 280, 592, 1.0),
    *_launches("resnet20 32px batch 128 bf16", "block-diagonal", who.UNLINKED, 420, 624, 1.15),
]

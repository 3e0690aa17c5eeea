"""What a training step asks of a GPU, on a machine without one: launches and bytes, and how long a CPU prepares them.

Launches and bytes are counted at full size on fake tensors. The CPU's time is measured with images and layers so small that
what an operation computes hardly counts beside its dispatch, and with nothing launched, in process time; contenders take turns.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from benchmarks import names
from benchmarks.baselines.naive_dense import naive_dense
from benchmarks.cases import Case
from benchmarks.effort import Effort
from benchmarks.launches import counted, pretending
from benchmarks.steps import Step
from fastmerge import BigStudent

# A case, by what its channels are divided, and the side of the small images: as deep, down to one pixel.
CASES = [
    pytest.param(Case("resnet18", 256, 224, "bf16"), 16, 32, id="resnet18"),
    pytest.param(Case("resnet20", 128, 32, "bf16"), 4, 8, id="resnet20"),
]
_SMALL_BATCH = 2


@pytest.mark.parametrize(("case", "divisor", "side"), CASES)
def bench_launches(benchmark: BenchmarkFixture, case: Case, divisor: int, side: int, effort: Effort) -> None:
    benchmark.extra_info["case"] = f"launches, {case.name}"
    results: dict[str, Any] = benchmark.extra_info.setdefault("contenders", {})
    small = dataclasses.replace(case, batch=_SMALL_BATCH, side=side)
    for name, make in effort.chosen(_makers(case, case.make_teachers(), case.side)).items():
        counts = counted(case, make())
        results[name] = {
            "launches": sum(counts.kernels.values()),
            "moved_bytes": sum(counts.moved.values()),
            "kernels": dict(counts.kernels.most_common()),
            "cpu_samples": [],
        }
    teachers = [case.place(thin(teacher, divisor)) for teacher in case.make_teachers()]
    steps = {name: Step(small, make()) for name, make in effort.chosen(_makers(case, teachers, side)).items()}

    def each() -> None:
        for name, step in steps.items():
            start = time.process_time()
            step()
            results[name]["cpu_samples"].append(time.process_time() - start)

    with pretending():
        for _ in range(effort.warmup("cpu")):
            each()
        for result in results.values():
            result["cpu_samples"].clear()
        benchmark.pedantic(each, rounds=effort.rounds("cpu"))


def _makers(case: Case, teachers: Sequence[nn.Module], side: int) -> dict[str, Callable[[], list[nn.Module]]]:
    """Who is counted; each maker gives networks of its own."""

    def big(linked: bool) -> list[nn.Module]:
        network = BigStudent(*teachers, example_inputs=torch.zeros(_SMALL_BATCH, 3, side, side))
        if linked:
            network.link()
        return [case.place(network).train()]

    return {
        names.TEACHERS: lambda: copy.deepcopy([*teachers]),
        names.NAIVE: lambda: [case.place(naive_dense(teachers)).train()],
        names.UNLINKED: lambda: big(linked=False),
        names.LINKED: lambda: big(linked=True),
    }


def thin(network: nn.Module, divisor: int) -> nn.Module:
    """A network of the same layers with a part of their channels, in place; what it reads and gives stays as wide."""

    def fewer(channels: int) -> int:
        return channels // divisor if channels % divisor == 0 else channels

    for module in [*network.modules()]:
        for name, layer in module.named_children():
            if isinstance(layer, nn.Conv2d):
                size = fewer(layer.in_channels), fewer(layer.out_channels)
                options = layer.kernel_size, layer.stride, layer.padding
                setattr(module, name, nn.Conv2d(*size, *options, bias=layer.bias is not None))  # type: ignore[arg-type]
            elif isinstance(layer, nn.BatchNorm2d):
                setattr(module, name, nn.BatchNorm2d(fewer(layer.num_features)))
            elif isinstance(layer, nn.Linear):
                setattr(module, name, nn.Linear(fewer(layer.in_features), layer.out_features))
    return network

"""From big student to student: time, and the height of memory above the big student alone.

In place the student takes over the big student's tensors, so that the two never stand side by side; a copy leaves the big
student as it was. The optimizer's momentum is carried over in both.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch.optim import SGD

import fastmerge
from benchmarks import names
from benchmarks.cases import Case, parameters
from benchmarks.effort import Effort
from benchmarks.race import Contender, race

CASES = [Case("resnet50", 2, 64, device="cuda"), Case("resnet18", 2, 64)]
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Compression:
    """Compresses a linked big student with momentum, a new one every time.

    Args:
        case: whose network.
        in_place: the option of ``compress``.
    """

    def __init__(self, case: Case, in_place: bool) -> None:
        self.case, self.in_place = case, in_place
        self.peaks: list[int] = []
        self.network: fastmerge.BigStudent | None = None
        self.optimizer: SGD | None = None
        self.size = self.start = 0

    def prepare(self) -> None:
        """Makes a big student and gives every weight a momentum."""
        self.network = self.optimizer = None
        gc.collect()
        self.network = fastmerge.BigStudent(*self.case.make_teachers(), example_inputs=self.case.make_batch()[0])
        self.network.link()
        self.optimizer = SGD(self.network.weight_parameters(), lr=0.01, momentum=0.9)
        for parameter in self.network.weight_parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        tensors = [*self.network.parameters(), *self.network.buffers()]
        tensors += [state["momentum_buffer"] for state in self.optimizer.state.values()]
        self.size = sum(tensor.nbytes for tensor in tensors)
        self.start = start_peak(self.case.device)

    def __call__(self) -> None:
        assert self.network is not None
        self.network.compress(self.optimizer, in_place=self.in_place)
        self.peaks.append(self.size + read_peak(self.case.device) - self.start)

    def facts(self, samples: list[float]) -> dict[str, int]:
        """The median height of memory of the last calls."""
        return {"peak_bytes": statistics.median_low(self.peaks[-len(samples) :])}


def start_peak(device: str) -> int:
    """Begins to look for the height of memory; returns the bytes in use now."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5")
    return _resident("VmRSS")


def read_peak(device: str) -> int:
    """The most bytes in use since."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _resident("VmHWM")


def _resident(key: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("case", parameters(CASES))
def bench_compress(benchmark: BenchmarkFixture, case: Case, effort: Effort) -> None:
    benchmark.group = benchmark.extra_info["case"] = f"compress, {case.network} {case.device}"
    if case.device == "cpu" and not _CLEAR.exists():
        pytest.skip("needs /proc to see the height of memory")
    compressions = {"copy": Compression(case, False), names.IN_PLACE: Compression(case, True)}

    def maker(compression: Compression) -> Callable[[], Contender]:
        return lambda: Contender(compression, before=compression.prepare, more=compression.facts)

    makers = {name: maker(c) for name, c in compressions.items()}
    race(benchmark, makers, effort, case.device, rounds=10, warmup=1, alone=1, profile=False)
    benchmark.extra_info["contenders"][names.BIG] = {"peak_bytes": compressions[names.IN_PLACE].size}

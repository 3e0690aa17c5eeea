"""What this machine can do at best, measured in the run that is held against it.

``python -m benchmarks.roofline`` says what card it is, what it can do, and how long the CPU takes for a launch.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import time
from collections.abc import Callable

import torch

from benchmarks.cases import DTYPES, Case
from benchmarks.counting import Ceilings
from benchmarks.events import emit
from fastmerge.environment import environment

SLACK = 1.05  # how far a reading may be beyond what was measured: clocks vary


@functools.cache
def _best(device: str, precision: str) -> list[float]:
    """The highest rates seen so far: operations and bytes per second."""
    return [0.0, 0.0]


def measure_ceilings(case: Case) -> Ceilings:
    """Measures both rates and returns the highest seen so far in this process.

    To be called before and after a benchmark: a machine that is busy with something else looks slower than it is.
    """
    best = _best(case.device, case.precision)
    best[0] = max(best[0], _matmul_rate(case.device, DTYPES[case.precision]))
    best[1] = max(best[1], _copy_rate(case.device))
    return Ceilings(best[0] * SLACK, best[1] * SLACK, _cache(case.device))


def describe() -> dict[str, object]:
    """The card in bfloat16, or the CPU in float32: operations and bytes per second, microseconds a launch; what it is."""
    case = Case("resnet18", 256, 224, "bf16", "cuda") if torch.cuda.is_available() else Case("lenet", 128, 28)
    measure_ceilings(case)
    flops, bandwidth = _best(case.device, case.precision)
    x = torch.zeros(8, device=case.device)
    launch = _fastest(lambda: [x.add_(1) for _ in range(500)], case.device) / 500
    query = "name,driver_version,memory.total,memory.used,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw"
    smi = (
        subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, check=False
        ).stdout
        if shutil.which("nvidia-smi")
        else ""
    )
    return {"flops": flops, "bandwidth": bandwidth, "launch_us": 1e6 * launch, "card": smi.strip(), **environment()}


def _matmul_rate(device: str, dtype: torch.dtype) -> float:
    # On the CPU a millisecond or two, so that some fall between the turns of whatever else the machine does.
    n, rounds = (8192, 10) if device == "cuda" else (512, 200)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32  # convolutions may use it by default
    try:
        return 2 * n**3 / _fastest(lambda: torch.mm(a, b, out=out), device, rounds)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _copy_rate(device: str) -> float:
    source = torch.randn(2**28 if device == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), device)


def _fastest(run: Callable[[], object], device: str, rounds: int = 10) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _cache(device: str) -> int:
    """On the CPU nothing is held to the bandwidth, of which caches and other processes make a moving thing."""
    return torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 2**62


if __name__ == "__main__":
    emit("device", "ceilings", **describe())

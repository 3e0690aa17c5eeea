"""What a step does on a CUDA device, kernel by kernel, and how long it keeps the device busy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_SHOWN = 25
_LAUNCHING = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cuGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")


def profiled(step: Callable[[], object]) -> dict[str, Any]:
    """Runs a step once under the profiler.

    Returns:
        For the JSON: ``busy_seconds``, the sum of the times of what ran on the device; ``kernels``, how many ran; ``launches``,
        the calls of CUDA that sent them there, of which a CUDA graph needs one; ``top``, name, milliseconds and count of those
        that took longest.
    """
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    return summary(found.events())


def summary(events: Any) -> dict[str, Any]:
    """The same of the profiler's events."""
    launches, times = 0, defaultdict(list)
    for event in events:
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            times[event.name].append(event.time_range.elapsed_us())
        launches += event.device_type == DeviceType.CPU and event.name.startswith(_LAUNCHING)
    longest = sorted(times, key=lambda name: sum(times[name]), reverse=True)[:_SHOWN]
    return {
        "busy_seconds": sum(map(sum, times.values())) / 1e6,
        "kernels": sum(map(len, times.values())),
        "launches": launches,
        "top": [[name[:120], round(sum(times[name]) / 1e3, 4), len(times[name])] for name in longest],
    }

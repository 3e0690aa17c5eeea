"""Work captured as a CUDA graph. A capture that fails leaves stream, random numbers and memory as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# The allocator's last reference to a capture that failed is a bare pointer, so these may not go.
_failed: list[torch.cuda.CUDAGraph] = []


def capture(run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """Captures what a function does on a device.

    Args:
        run: May not wait for the device. It must have run before on a stream of its own.
        device: A CUDA device.

    Returns:
        What replays it, and the function's result, which every replay writes anew.

    Raises:
        RuntimeError: It can't be captured. Eager work may go on as if nothing had been tried.
    """
    with torch.cuda.device(device):
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        stream, number = torch.cuda.current_stream(), torch.cuda.current_device()
        generator = torch.cuda.default_generators[number]
        state = generator.clone_state()
        try:
            # thread_local: a loader's thread that pins memory meanwhile does no harm
            with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
                result = run()
        except BaseException:
            # torch.cuda.graph leaves all three in the middle of the capture if ending it raises.
            torch.cuda.set_stream(stream)
            generator.graphsafe_set_state(state)
            _give_back(graph, number, pool)
            raise
    return graph.replay, result


def _give_back(graph: torch.cuda.CUDAGraph, device: int, pool: Any) -> None:
    """Ends the allocation from a failed capture's pool, unless ending the capture got as far as that."""
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:
        return
    torch._C._cuda_releasePool(device, pool)
    _failed.append(graph)

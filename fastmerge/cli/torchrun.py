"""A command among the processes that ``torchrun`` started."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from fastmerge.processes import Processes


def join_processes(device: str) -> tuple[str, Processes]:
    """Joins the processes that ``torchrun`` started; does nothing where it did not.

    Args:
        device: "cuda" is the card of this process's place on its machine.

    Returns:
        The device of this process, and the processes.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return device, Processes(torch.device("cpu"))
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return device, Processes(torch.device(device))


def leave_processes() -> None:
    """Undoes :func:`join_processes`."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()

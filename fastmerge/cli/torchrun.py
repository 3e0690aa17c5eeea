"""A command that trains, by itself or among the processes that ``torchrun`` started."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from fastmerge.cli import resume
from fastmerge.cli.dry_run import check_planning
from fastmerge.processes import Processes


@contextlib.contextmanager
def at_work(options: argparse.Namespace, device: str) -> Iterator[tuple[str, Processes]]:
    """Joins the processes, holds DIR, and gives the device of this process and all processes; leaves them at the end.

    Args:
        options: Of a command that can go on.
        device: As :func:`join_processes` takes it.

    Raises:
        ValueError, OSError: As :func:`check_planning` and :func:`resume.alone`.
    """
    device, processes = join_processes(device)
    try:
        check_planning(options, processes)
        with processes.watched(), resume.alone(options, processes):
            yield device, processes
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


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


def is_first_to_say(message: str, own: bool) -> bool:
    """Whether this process prints an error: what is wrong for all of a run is said once.

    ``torchrun``'s own store counts who came first, since the processes' group may be gone.

    Args:
        message: The error's.
        own: Whether it is likely to be of this process alone, for a run without such a store; others are then left to the first
            process of each machine.
    """
    otherwise = own or os.environ.get("LOCAL_RANK", "0") == "0"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return otherwise
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"fastmerge/{attempt}/{hashlib.sha256(message.encode()).hexdigest()}"
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return bool(dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5)).add(key, 1) == 1)
    except (KeyError, ValueError, RuntimeError):  # torch's own errors are RuntimeErrors
        return otherwise

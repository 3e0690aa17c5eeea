"""Processes that work together through gloo, forked from a server that has imported torch once."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from fastmerge.cli import main
from fastmerge.evaluation import Tally
from fastmerge.history import Score
from fastmerge.processes import Processes
from killing import forkserver


def together(size: int, work: Callable[..., Any], *arguments: Any, missing: int = 0) -> dict[int, Any]:
    """What processes bring back, by rank: ``work(rank, size, *arguments)``; so many of them may bring nothing."""
    with forkserver() as context, tempfile.TemporaryDirectory() as folder:
        results, meeting = context.Queue(), f"file://{folder}/meeting"  # a port that is free now may not be so later
        processes = [
            context.Process(target=_process, args=(rank, size, meeting, results, work, arguments))
            for rank in range(size)
        ]
        for each in processes:
            each.start()
        try:
            return dict(results.get(timeout=240) for _ in range(size - missing))
        finally:
            for each in processes:
                each.join(20)
                each.kill()


def _process(
    rank: int, size: int, meeting: str, results: Any, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in places.items()})
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    try:
        results.put((rank, work(rank, size, *arguments)))
    except BaseException as error:
        results.put((rank, f"{type(error).__name__}: {error}"))


def command(rank: int, size: int, words: Sequence[str]) -> tuple[int, str, str]:
    """Work for a process: the command line. Exit status, and what it printed."""
    out, error = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(error),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", ".*P.g>0.")
        return main(list(words)), out.getvalue(), error.getvalue()


def counted(rank: int, size: int, words: Sequence[str]) -> tuple[int, str, str, list[int]]:
    """As :func:`command`, and how many samples this process scored in each pass over the data."""
    samples, score = [], Tally.score

    def spy(tally: Tally, processes: Processes | None = None) -> Score:
        samples.append(tally.samples)
        return score(tally, processes)

    Tally.score = spy  # type: ignore[method-assign]
    try:
        return (*command(rank, size, words), samples)
    finally:
        Tally.score = score  # type: ignore[method-assign]

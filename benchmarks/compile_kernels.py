"""Compiles the kernels of whole steps, every candidate for every convolution, so that no benchmark's time goes into it.

``python -m benchmarks.compile_kernels [PRECISION ...]`` takes a training step of the big student, block-diagonal and linked, in
the cases that have targets. Each candidate runs once and is not timed, so that other work may go on beside it; what is compiled
stays in Triton's cache, and no choice is kept.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from fastmerge.kernels.block_conv.choice import Memory, choices, set_measuring

from benchmarks.cases import CASES, DTYPES, Case
from benchmarks.contenders import big
from benchmarks.steps import Step
from benchmarks.targets import TARGETS


@contextmanager
def untimed() -> Iterator[None]:
    """Within it, layers are measured at their first use as if all candidates were equally fast, and nothing is kept."""

    def once(run: Callable[[], Any]) -> float:
        run()
        return 1.0

    with (
        mock.patch.object(choices, "_timer", once),
        mock.patch.object(choices, "_memory", Memory(read=True)),
        mock.patch.object(choices, "_stored", False),
    ):
        set_measuring(True)
        try:
            yield
        finally:
            set_measuring(None)


def compile_case(case: Case) -> None:
    """Takes two steps before linking and two after: what stays from one to the next is measured."""
    with untimed():
        network = big(case)
        for linked in (False, True):
            if linked:
                network.link()
            step = Step(case, [network])
            for _ in range(2):
                step()


def main(precisions: Sequence[str] = ()) -> int:
    """Goes on where a case can't run; the exit code says whether any could not.

    Args:
        precisions: those of the cases, or all.
    """
    failed = 0
    wanted = {target.case for target in TARGETS}
    for case in CASES:
        if case.device != "cuda" or f"step, {case.name}" not in wanted or case.precision not in (precisions or DTYPES):
            continue
        start = time.monotonic()
        try:
            compile_case(case)
        except Exception as error:
            failed += 1
            print(f"{case.name}: {type(error).__name__}: {error}")
        else:
            print(f"{case.name}: {time.monotonic() - start:.0f} s", flush=True)
        torch.cuda.empty_cache()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

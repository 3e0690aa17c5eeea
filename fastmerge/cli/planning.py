"""``--dry-run``: the plan of a run, and what can be found out before its first epoch."""

from __future__ import annotations

import argparse
import shlex
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from fastmerge.cli.arguments import integer
from fastmerge.cli.checking import checked_with_bar
from fastmerge.data.checking import Check
from fastmerge.merging.estimate import Estimate
from fastmerge.merging.estimate_table import describe
from fastmerge.processes import Processes


def add_planning(add: Callable[..., None]) -> None:
    """Adds ``--dry-run`` and what goes with it."""
    add(
        "--dry-run",
        action="store_true",
        help="check everything, every image's header too, time a few steps, print the plan, and train nothing",
    )
    add(
        "--check-images",
        choices=("headers", "whole"),
        help="with --dry-run: read headers alone, or decode every image as fastmerge data check does; default headers",
    )
    add(
        "--processes",
        type=integer(1),
        default=1,
        metavar="P",
        help="with --dry-run: time what one of P processes would do, as on P GPUs like this one; default 1",
    )
    add(
        "--bandwidth",
        type=float,
        default=10.0,
        metavar="X",
        help="with --dry-run and --processes: GB/s that each of them sends; default 10",
    )


def check_planning(options: argparse.Namespace, processes: Processes) -> None:
    """Makes DIR, where it can be written to, and leaves it empty.

    Raises:
        ValueError: The options don't go together.
        OSError: DIR can't be made or written to.
    """
    if not options.dry_run:
        if options.processes > 1:
            raise ValueError("--processes plans with --dry-run; to train with several, start them by torchrun")
        if options.check_images is not None:
            raise ValueError("--check-images goes with --dry-run; without a run, there is fastmerge data check DATA")
        return
    if processes.size > 1:
        raise ValueError("--dry-run times one process; start it without torchrun, with --processes P")
    if not options.bandwidth > 0:
        raise ValueError(f"--bandwidth needs a number above 0; got {options.bandwidth:g}")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=options.out):
        pass


def checked_images(options: argparse.Namespace, path: Path) -> str:
    """What the check of the images found, in a sentence with a list of those that can't be read; empty for arrays.

    Raises:
        FileNotFoundError, ValueError, ImportError: As :func:`~fastmerge.data.checking.check_images`.
    """
    check: Check = options.check_images or "headers"
    workers = options.workers or None
    found = checked_with_bar(path, check, workers, on_bad_image=options.on_bad_image, quiet=options.quiet)
    if found is None:
        return ""
    if check == "whole":
        return str(found)
    whole = f"damage within files is found by: fastmerge data check {shlex.quote(str(path))}"
    return f"{found}\n{whole} (or --check-images whole)"


def plan(options: argparse.Namespace, images: str, why: str, found: Estimate) -> str:
    """What ``--dry-run`` prints.

    Args:
        options: of the command.
        images: what :func:`checked_images` said.
        why: which loader reads, and the reason.
        found: from timed steps.

    Raises:
        ValueError: There is no room for the checkpoints in DIR.
    """
    check_room(options.out, found.kept)
    return f"{images}\n{why}\n\n".lstrip() + describe(
        found, options.processes, options.bandwidth * 1e9, options.accumulate
    )


def check_room(directory: Path, needed: int) -> None:
    """Raises where a disk has no room.

    Raises:
        ValueError: Less is free than is needed, in bytes.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ValueError(
            f"checkpoints need up to {needed / 2**30:.1f} GiB in {directory}, where {free / 2**30:.1f} GiB are free"
        )

"""``--dry-run``: the plan of a run, and what can be found out before its first epoch, such as whether images can be read."""

from __future__ import annotations

import argparse
import shlex
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from fastmerge.cli.arguments import integer
from fastmerge.data.decoding import OnBadImage
from fastmerge.data.preparing import Check, CheckedImages, check_images
from fastmerge.merging.estimate import Estimate
from fastmerge.merging.progress import peak_memory
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
            raise ValueError(
                "--processes needs --dry-run; to train with several processes, start fastmerge by torchrun"
            )
        if options.check_images is not None:
            raise ValueError("--check-images needs --dry-run; fastmerge data check DATA checks images without a run")
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
        FileNotFoundError, ValueError, ImportError: As :func:`~fastmerge.data.preparing.check_images`.
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


def checked_with_bar(
    path: Path,
    check: Check,
    workers: int | None,
    *,
    on_bad_image: OnBadImage,
    quiet: bool,
    found: Callable[[str, str], object] | None = None,
) -> CheckedImages | None:
    """As :func:`~fastmerge.data.preparing.check_images`, with a bar on stderr where that is a terminal.

    Args:
        path: of the data.
        check: what is read.
        workers: threads that decode; None is one for each core.
        on_bad_image: what happens in the end where there were files that can't be read.
        quiet: no bar.
        found: called with path and reason of each file that can't be read.
    """
    from tqdm import tqdm

    name = "headers" if check == "headers" else "decode"
    with tqdm(desc=name, unit="img", dynamic_ncols=True, disable=quiet or None) as bar:  # None: on a terminal

        def tell(done: int, total: int, bad: dict[str, str]) -> None:
            if found is not None and bad:
                bar.clear()  # makes room on the same terminal
                for file, reason in bad.items():
                    found(file, reason)
            bar.total = total
            bar.update(done - bar.n)

        return check_images(path, on_bad_image, tell, check, workers)


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
            f"checkpoints need up to {needed / 2**30:.1f} GiB in {directory}, where {free / 2**30:.1f} GiB are free; free "
            "some, or choose another --out"
        )


def describe(found: Estimate, processes: int = 1, bandwidth: float = 1e10, accumulate: int = 1) -> str:
    """The parts as a table, with the time of all and the most memory that timing them took.

    Args:
        found: Timed with the share that one of the processes reads.
        processes: How many will train together.
        bandwidth: Bytes per second that each of them sends.
        accumulate: Batches per step.
    """
    parts = found.parts
    rows = [("part", "epochs", "batches", "s per batch", "in all")]
    rows += [
        (
            part.name,
            f"{part.epochs}",
            "?" if part.steps is None else f"{part.steps}",
            f"{part.seconds:.3g}",
            _duration(part.total),
        )
        for part in parts
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    lines.append(f"reading alone takes {found.reading:.3g} s per training batch")
    lines.append(f"checkpoints take up to {found.kept / 2**30:.2f} GiB on the disk")
    totals = [part.total for part in parts]
    known = [total for total in totals if total is not None]
    whole = _duration(sum(known)) if len(known) == len(totals) else "unknown, since a loader has no length"
    if processes > 1:
        messages = sum(part.messages(processes, bandwidth, accumulate) for part in parts)
        largest = max(part.gradients for part in parts)
        whole += (
            f" with {processes} processes, and up to {_duration(messages)} more where gradients (up to "
            f"{largest / 2**20:.0f} MiB a step, at {bandwidth / 1e9:g} GB/s) are not sent during the backward pass"
        )
    return "\n".join([*lines, f"about {whole}; peak memory {peak_memory() / 2**30:.2f} GiB"])


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 60:
        return f"{seconds:.2g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"

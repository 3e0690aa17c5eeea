"""Work on data sets.

  fastmerge data prepare imagenet/ imagenet-256/

makes a tree of images small: JPEGs of 256 pixels at the shorter side, which a fast network's loader decodes several times as
fast as the originals. Killed, it goes on where it was when it is called again.

  fastmerge data check imagenet-256/

decodes every image of a tree, or reads CIFAR's files or an .npz, and names what can't be read. docs/data.md
says what damage is found in which format.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from fastmerge.cli.arguments import integer
from fastmerge.cli.dry_run import checked_with_bar
from fastmerge.data.decoding import ON_BAD_IMAGE
from fastmerge.data.preparing import Summary, prepare

SUMMARY = "resize a tree of images, or find the files that can't be read"
_LISTED = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The commands of ``fastmerge data``."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    summary = "resize a tree of images to JPEGs, in parallel; goes on where it was killed"
    add = commands.add_parser("prepare", help=summary, description=f"{summary[0].upper()}{summary[1:]}.").add_argument
    add("source", type=Path, metavar="SRC", help="tree of images")
    add("target", type=Path, metavar="DST", help="where the small ones go")
    add("--size", type=integer(1), default=256, metavar="N", help="pixels of the shorter side; default 256")
    add("--quality", type=integer(1), default=90, metavar="Q", help="of the JPEGs, up to 100; default 90")
    add("--workers", type=integer(1), metavar="N", help="threads; default one per core")
    add("--on-bad-image", choices=ON_BAD_IMAGE, default="raise", help="at a file that is no image; default raise")
    add("--quiet", action="store_true", help="no progress bar")
    add("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error")
    parser = commands.choices["prepare"]
    parser.set_defaults(work=_prepare)

    summary = "decode every image, in parallel, and name the files that can't be read"
    description = f"{summary[0].upper()}{summary[1:]}: one line each. Exit status 1 if there is one, 0 if not."
    parser = commands.add_parser("check", help=summary, description=description)
    parser.set_defaults(work=_check)
    add = parser.add_argument
    add(
        "data",
        type=Path,
        metavar="DATA",
        help="image tree, CIFAR's folder or .npz, as --data of run and merge",
    )
    add("--workers", type=integer(1), metavar="N", help="threads; default one per core")
    add("--quiet", action="store_true", help="no progress bar")
    add("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error")


def command(options: argparse.Namespace) -> int | None:
    """Does what was asked for and prints what came of it; returns the exit status."""
    return options.work(options)


def _check(options: argparse.Namespace) -> int:
    """Names files as they are found, so that an interrupted check has named those it came by."""
    bad = 0

    def name(file: str, reason: str) -> None:
        nonlocal bad
        bad += 1
        print(_printable(f"{file}: {reason}"), flush=True)

    try:
        found = checked_with_bar(
            options.data,
            "whole",
            options.workers,
            on_bad_image="skip",
            quiet=options.quiet,
            found=name,
        )
    except KeyboardInterrupt:
        print(f"not finished; {bad} of the images so far can't be read")
        raise
    assert found is not None
    print(found.total)
    if found.remark:
        print(found.remark)
    return 1 if found.bad else 0


def _printable(line: str) -> str:
    """A line that stays one, whatever bytes a file's name has."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in line)


def _prepare(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    summary = prepare(
        options.source,
        options.target,
        size=options.size,
        quality=options.quality,
        workers=options.workers,
        on_bad_image=options.on_bad_image,
        progress=False if options.quiet else None,
    )
    print(_told(summary, options.target, time.perf_counter() - started))


def _told(summary: Summary, target: Path, seconds: float) -> str:
    new = summary.resized + summary.copied
    lines = [f"{summary.images} images in {target}: {summary.resized} resized, {summary.copied} copied as they were, "]
    lines[0] += f"{summary.there} there already; {seconds:.0f} s"
    if new:
        before, after = summary.bytes_before / 2**20, summary.bytes_after / 2**20
        lines[0] += f", {new / seconds:.0f} images/s, {before:.1f} MiB became {after:.1f}"
    if summary.bad:
        lines.append(f"{len(summary.bad)} files can't be read as images and are left out:")
        lines += [f"  {file}: {reason}" for file, reason in list(summary.bad.items())[:_LISTED]]
        if len(summary.bad) > _LISTED:
            lines.append(f"  and {len(summary.bad) - _LISTED} more, named in the warnings above")
    return "\n".join(lines)

"""The command line: ``fastmerge run | merge | compare | check | report | data | info``, or ``python -m fastmerge``."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from fastmerge.checkpoints import Interrupted
from fastmerge.cli import check, compare, data, info, merge, report, resume, run
from fastmerge.cli.torchrun import is_first_to_say
from fastmerge.data.decoding import BadImageError
from fastmerge.data.epochs import EmptyBatchError, ReaderLostError, readers_watched
from fastmerge.processes import ProcessLostError

_BAD_INPUT = (ValueError, TypeError, OSError, ImportError)
_FAILED = (FloatingPointError, MemoryError, torch.OutOfMemoryError, ProcessLostError, ReaderLostError)

_OF_ONE_PROCESS = (*_FAILED, BadImageError, EmptyBatchError)  # each reads images of its own


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: Without the program's name; None takes them from ``sys.argv``.

    Returns:
        Exit status: 0, or 1 where the work failed (it diverged, memory ran out) or a check found something bad, 2 for bad
        input, 130 after Ctrl-C, 143 after SIGTERM.
    """
    words = compare.as_run(sys.argv[1:] if arguments is None else arguments)
    options = _parsed(words)
    is_first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts
    try:
        with _plain_messages(), readers_watched(), _memory_watched():
            status = options.command(resume.complete(options, words, _parsed))
    except KeyboardInterrupt as error:
        if is_first:
            print(f"fastmerge: interrupted{resume.how_to_go_on(options)}", file=sys.stderr)
        return 128 + (error.number if isinstance(error, Interrupted) else signal.SIGINT)
    except _BAD_INPUT + _FAILED as error:
        message = " ".join(str(error).split())
        if getattr(options, "debug", False):
            traceback.print_exc()
        elif is_first_to_say(message, isinstance(error, _OF_ONE_PROCESS)):
            lost = is_first and isinstance(error, ProcessLostError)
            then = resume.how_to_go_on(options) if lost else ""
            print(f"fastmerge: error: {message}{then}", file=sys.stderr)
        return 1 if isinstance(error, _FAILED) else 2
    return status or 0


def _parsed(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fastmerge", description="Merge trained neural networks into a better one.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (run, merge, compare, check, report, data, info):
        name = module.__name__.rpartition(".")[2]
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name in words[:1]:  # of the others no options are needed
            module.add_arguments(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(command=module.command)
    return parser.parse_args(words)


@contextmanager
def _plain_messages() -> Iterator[None]:
    def show(message: Warning | str, category: type[Warning], *where: object, **more: object) -> None:
        print(f"fastmerge: warning: {message}", file=sys.stderr)

    log, handler = logging.getLogger("fastmerge"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("fastmerge: %(message)s"))
    level, handlers = log.level, log.handlers
    log.setLevel(logging.INFO)
    log.handlers = [handler]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        log.handlers = handlers
        log.setLevel(level)


@contextmanager
def _memory_watched() -> Iterator[None]:
    """PyTorch has an error of its own for a GPU without memory, and none for a CPU."""
    try:
        yield
    except RuntimeError as error:
        _, found, what = str(error).partition("DefaultCPUAllocator: ")
        if not found:
            raise
        raise MemoryError(f"there is not enough memory: {what}") from error

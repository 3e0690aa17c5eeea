"""Commands that can be killed and go on: DIR/command.json holds their options, so that ``--resume`` needs no others."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import shlex
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastmerge.cli.arguments import seconds
from fastmerge.files import atomic, held
from fastmerge.merging.options import Options
from fastmerge.processes import Processes
from fastmerge.reporting.results import EpochLog, check_tensorboard

CHECKPOINTS = "checkpoints"
_COMMAND = "command.json"
_LOCK = ".lock"
# What may differ when a run goes on, since it does not change what comes out of it.
_FREE = {
    "bandwidth",
    "debug",
    "dry_run",
    "out",
    "processes",
    "quiet",
    "teachers_in_parallel",
    "tensorboard",
    "workers",
    *(each.name for each in fields(Options) if not each.metadata["compared"]),
}


def adder(parser: argparse.ArgumentParser) -> Callable[..., None]:
    """``parser.add_argument`` for a command that can go on; adds the options that all of them have, too.

    Options that are not given stay out of the namespace until :func:`complete` puts them in.
    """
    table: dict[str, tuple[Any, bool, str]] = {}

    def add(name: str, *, default: Any = None, required: bool = False, **more: Any) -> None:
        left_out = argparse.SUPPRESS if name.startswith("-") else None  # argparse checks a positional's default
        action = parser.add_argument(name, default=left_out, **more)
        table[action.dest] = (False if more.get("action") == "store_true" else default, required, name)

    parser.set_defaults(table=table, parser=parser)
    add("--resume", action="store_true", help="go on with the run in DIR, whose options need not be given again")
    add(
        "--checkpoint-seconds",
        type=seconds,
        default=300.0,
        metavar="S",
        help="at least so long between two checkpoints; default 300",
    )
    return add


def add_tensorboard(add: Callable[..., None]) -> None:
    """Adds the option of a command that has a log of its epochs."""
    add("--tensorboard", action="store_true", help="write TensorBoard event files to DIR/tensorboard")


def complete(
    options: argparse.Namespace, words: Sequence[str], parse: Callable[[Sequence[str]], argparse.Namespace]
) -> argparse.Namespace:
    """Fills in what was not given: with ``--resume`` from the run in DIR, else the defaults.

    Args:
        options: As parsed.
        words: What they were parsed from.
        parse: Parses words.

    Raises:
        ValueError: A given option is not that of the run in DIR.
    """
    if not hasattr(options, "table"):
        return options
    given = _given(options)
    directory = _directory(given)
    words = [word for word in words if word != "--resume"]
    if given.get("resume") and directory is not None and (directory / _COMMAND).is_file():
        words = _noted(directory)["words"]
        then = parse(words)
        if then.command is not options.command:
            raise ValueError(f"the run in {directory} was begun by fastmerge {words[0]}; continue it with that command")
        before = _given(then)
        for name, value in given.items():
            default, _, flag = options.table[name]
            if name not in _FREE and value != before.get(name, default):
                then_, now = (_said(each) for each in (before.get(name, default), value))
                raise ValueError(
                    f"the run in {directory} has {flag} {then_}, not {now}; leave out {flag} to continue it, or begin another "
                    "run in another --out"
                )
        given = before | given
    missing = [flag for name, (_, required, flag) in options.table.items() if required and name not in given]
    if missing and given.get("resume") and directory is not None:
        raise ValueError(f"{directory} holds no run to continue; to begin one there, give {', '.join(missing)}")
    if missing:
        options.parser.error(f"the following arguments are required: {', '.join(missing)}")
    for name, (default, _, _) in options.table.items():
        setattr(options, name, given.get(name, default))
    options.out, options.words = _directory(vars(options)), list(words)
    return options


@contextlib.contextmanager
def alone(options: argparse.Namespace, processes: Processes) -> Iterator[None]:
    """Makes DIR and keeps other runs out of it, until the block or the first of these processes ends; not for a dry run.

    Raises:
        ValueError: Another run is in DIR; the message says which process it is.
        OSError: DIR can't be written to.
    """
    with contextlib.ExitStack() as closing:
        if not getattr(options, "dry_run", False):
            processes.done_by_first(lambda: _hold(options.out, closing))
        yield


def _hold(out: Path, closing: contextlib.ExitStack) -> None:
    """Makes DIR and locks it until ``closing`` ends."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        file = closing.enter_context(held(out / _LOCK))
    except BlockingIOError:
        holder = (out / _LOCK).read_text(encoding="utf-8").strip() or "one that has just begun"
        raise ValueError(
            f"{out} is in use by another run, {holder}; wait for its end, or choose another --out"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        warnings.warn(f"{out} is on a file system without locks: see that no other run writes there", stacklevel=2)
    else:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, begun {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()


def begin(options: argparse.Namespace, processes: Processes) -> bool:
    """Notes the command in DIR; what can't be written to is better known before the training.

    Args:
        options: Completed.
        processes: Of which the first looks and writes, before another may have made checkpoints.

    Returns:
        Whether the run in it had come to its end.

    Raises:
        ValueError, OSError: As :func:`check`, and DIR can't be written to.
    """
    return processes.done_by_first(lambda: _begin(options))


def check(options: argparse.Namespace) -> None:
    """Looks whether a run may begin in DIR, or go on there.

    Raises:
        ValueError: There is a run in DIR, and it is not to go on; or TensorBoard is asked for and not installed.
    """
    if getattr(options, "tensorboard", False):
        check_tensorboard()
    if not options.resume and (options.out / _COMMAND).is_file() and _noted(options.out)["finished"]:
        raise ValueError(
            f"{options.out} holds a finished run, which would be replaced; add --resume to see its report, remove the folder, "
            "or choose another --out"
        )
    if not options.resume and any(path.is_file() for path in (options.out / CHECKPOINTS).rglob("*")):
        raise ValueError(
            f"{options.out} holds a run that is not finished; add --resume to continue it, remove "
            f"{options.out / CHECKPOINTS}, or choose another --out"
        )


def _begin(options: argparse.Namespace) -> bool:
    check(options)
    record = options.out / _COMMAND
    if options.resume and record.is_file():
        return bool(_noted(options.out)["finished"])
    _note(options, finished=False)
    return False


def finish(options: argparse.Namespace) -> None:
    """Notes that the run came to its end, which makes its checkpoints superfluous."""
    _note(options, finished=True)
    shutil.rmtree(options.out / CHECKPOINTS, ignore_errors=True)


@contextlib.contextmanager
def epoch_log(options: argparse.Namespace, processes: Processes, key: Sequence[str]) -> Iterator[EpochLog | None]:
    """The log of a run in DIR, which the first process writes; ``key`` tells an epoch from others."""
    if not processes.is_first:
        yield None
        return
    board = options.out / "tensorboard" if options.tensorboard else None
    with contextlib.closing(EpochLog(options.out / "log.jsonl", key, options.resume, board)) as log:
        yield log


def chosen_beyond(options: argparse.Namespace, taken: set[str]) -> list[str]:
    """Flags of options that are not as they are by default, but for some."""
    table = options.table.items()
    return [flag for name, (usual, _, flag) in table if name not in taken and getattr(options, name) != usual]


def config(options: argparse.Namespace) -> dict[str, Any]:
    """The options that tell what was done."""
    return {name: getattr(options, name) for name in options.table if name == "device" or name not in _FREE}


def how_to_go_on(options: argparse.Namespace) -> str:
    """The command that goes on with an interrupted run, as the end of a sentence; empty where there is none."""
    if not hasattr(options, "words") or not (options.out / _COMMAND).is_file():
        return ""
    several = os.environ.get("LOCAL_WORLD_SIZE", "1")
    program = "fastmerge" if several == "1" else f"torchrun --nproc-per-node {several} -m fastmerge"
    return f"; go on with: {_again(options.words, options.out, program)}"


def unfinished(out: Path) -> str:
    """What to say of the run in a directory that has not come to its end; empty where it has, or there is none."""
    if not (out / _COMMAND).is_file() or (noted := _noted(out))["finished"]:
        return ""
    return f"{out} holds a run that is not finished; go on with: {_again(noted['words'], out)}"


def _again(words: Sequence[str], out: Path, program: str = "fastmerge") -> str:
    return f"{program} {words[0]} --out {shlex.quote(str(out))} --resume"


def _note(options: argparse.Namespace, finished: bool) -> None:
    with atomic(options.out / _COMMAND) as temporary:
        temporary.write_text(json.dumps({"words": options.words, "finished": finished}) + "\n", encoding="utf-8")


def _noted(directory: Path) -> dict[str, Any]:
    """What :func:`_note` wrote.

    Raises:
        ValueError: It is damaged.
    """
    record = directory / _COMMAND
    try:
        noted: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        if not all(isinstance(word, str) for word in noted["words"]):
            raise ValueError("its words are no strings")
        return {name: noted[name] for name in ("words", "finished")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{record} is damaged ({error}); remove it and give all options again, with --resume"
        ) from error


def _given(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name in options.table if (value := getattr(options, name, None)) is not None}


def _said(value: Any) -> str:
    """An option's value as it is written."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _directory(given: dict[str, Any]) -> Path | None:
    out: Path | None = given.get("out")
    return Path("runs") / given["recipe"] if out is None and "recipe" in given else out

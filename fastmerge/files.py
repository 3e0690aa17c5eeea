"""Files that appear under their name whole or not at all, and files that one process holds at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

_HELD: set[TextIO] = set()


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path`` to write to, and moves it to ``path`` when the block ends well.

    A reader of ``path`` sees the old file or the whole new one, even after a power cut: what was written is on the disk
    before it gets its name. Where the block or the disk fails, ``path`` stays as it was. The directory is made if
    missing.

    Raises:
        OSError: There is something else than a regular file at ``path``, such as a link or a device; it is left alone.
    """
    path = Path(path)
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise OSError(f"{path} is no regular file and is not replaced; remove it, or choose another place")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)  # mkstemp's files are their owner's alone; what a run writes is to be shared
        _flush(name)
        os.replace(name, path)
        _flush(path.parent)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a full disk's
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


@contextlib.contextmanager
def held(path: str | Path) -> Iterator[TextIO]:
    """Opens a file to append to, made if missing, and locks it until the block or this process ends, however it ends.

    Raises:
        BlockingIOError: It is held already, by this process or another one.
        OSError: It can't be opened, or its file system knows no locks.
    """
    with Path(path).open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _HELD.add(file)
        try:
            yield file
        finally:
            _HELD.discard(file)
            fcntl.flock(file, fcntl.LOCK_UN)  # also of a process that was forked a moment ago


def _let_go() -> None:
    """Closes what a forked process inherited, which would hold the lock after its parent's death."""
    while _HELD:
        _HELD.pop().close()


os.register_at_fork(after_in_child=_let_go)


def _flush(path: str | Path) -> None:
    """Waits until a file's content, or a directory's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

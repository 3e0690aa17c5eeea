"""Files that appear under their name whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path`` to write to, and moves it to ``path`` when the block ends well.

    A reader of ``path`` sees the old file or the whole new one, even after a power cut: what was written is on the disk
    before it gets its name. Where the block or the disk fails, ``path`` stays as it was. The directory is made if
    missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)  # mkstemp's files are their owner's alone; what a run writes is to be shared
        _flush(name)
        os.replace(name, path)
        _flush(path.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _flush(path: str | Path) -> None:
    """Waits until a file's content, or a directory's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

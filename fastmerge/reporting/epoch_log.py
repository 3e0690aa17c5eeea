"""What happened epoch by epoch, as it happens: a JSONL file, and TensorBoard event files where they are asked for."""

from __future__ import annotations

import contextlib
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastmerge.files import atomic


class EpochLog:
    """One JSON object per line and epoch. A run that goes on appends, and an epoch that it repeats is not told twice.

    Args:
        path: The file.
        key: Which values tell an epoch from others.
        resume: Whether to append to what is there; a last line that was cut off is dropped.
        tensorboard: Directory for event files, or None.

    Raises:
        ValueError: Event files are asked for and the package ``tensorboard`` is not installed.
    """

    def __init__(self, path: Path, key: Sequence[str], resume: bool, tensorboard: Path | None = None) -> None:
        self.path, self.key = path, key
        lines = _whole_lines(path) if resume and path.is_file() else []
        self._told = {self._key(json.loads(line)) for line in lines}
        with atomic(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self._board = None if tensorboard is None else _writer_class()(str(tensorboard))

    def write(self, values: dict[str, Any], step: int, tag: str = "") -> None:
        """Tells of an epoch, unless it was told of before. Where the disk is full or fails, it warns instead.

        Args:
            values: JSON values.
            step: Its place on TensorBoard's axis.
            tag: What TensorBoard's names of the values begin with.
        """
        key = self._key(values)
        if key in self._told:
            return
        with _warning_of_disks(self.path):
            _append(self.path, f"{json.dumps(values)}\n".encode())
            self._told.add(key)
        if self._board is None:
            return
        with _warning_of_disks(self._board.log_dir):
            for name, value in _scalars({k: v for k, v in values.items() if k not in self.key}, tag):
                self._board.add_scalar(name, value, step)
            self._board.flush()

    def close(self) -> None:
        """Closes the event files."""
        if self._board is not None:
            with _warning_of_disks(self._board.log_dir):
                self._board.close()

    def _key(self, values: dict[str, Any]) -> str:
        return json.dumps([values.get(name) for name in self.key])


@contextlib.contextmanager
def _warning_of_disks(path: Path | str) -> Iterator[None]:
    """What the log can't tell costs no run."""
    try:
        yield
    except OSError as error:
        warnings.warn(f"could not write to {path} ({error}); the run goes on, and its log has a gap", stacklevel=4)


def _append(path: Path, line: bytes) -> None:
    """Appends a line, or nothing where it fails in the middle."""
    with path.open("ab", buffering=0) as file:
        before, written = file.seek(0, os.SEEK_END), 0
        try:
            while written < len(line):
                written += file.write(line[written:])
        except OSError:
            file.truncate(before)
            raise


def _whole_lines(path: Path) -> list[str]:
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            json.loads(line)
        except ValueError:
            break  # a crash or a full disk cut it off; what follows repeats it
        found.append(line)
    return found


def check_tensorboard() -> None:
    """Raises where event files can't be written.

    Raises:
        ValueError: The package ``tensorboard`` is not installed.
    """
    _writer_class()


def _writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"--tensorboard needs the package tensorboard (pip install 'fastmerge[tensorboard]'): {error}"
        ) from error
    return SummaryWriter


def _scalars(values: Any, name: str) -> list[tuple[str, float]]:
    """Names with slashes and numbers; a list's are told apart by their places."""
    if not isinstance(values, (dict, list)):
        number = isinstance(values, (int, float)) and math.isfinite(values)
        return [(name, float(values))] if number else []
    parts: Iterable[tuple[Any, Any]] = values.items() if isinstance(values, dict) else enumerate(values)
    return [scalar for key, value in parts for scalar in _scalars(value, f"{name}/{key}" if name else str(key))]

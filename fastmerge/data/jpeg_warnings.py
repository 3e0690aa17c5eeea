"""What libjpeg warns of in JPEGs that it decodes all the same, with made-up pixels where bytes changed.

Pillow and DALI drop these warnings. torchvision's decoder leaves them to libjpeg, which writes them to the process's stderr
without saying of which file they are.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

import numpy as np

from fastmerge.data.packed import contents

_BEGINS = b"\xff\xd8"
_STDERR = 2


class JpegWarnings:
    """Reads JPEGs for libjpeg's warnings; made by :func:`jpeg_warnings`.

    Args:
        log: Descriptor of the file that stands for the process's stderr.
    """

    def __init__(self, log: int) -> None:
        self._log = log

    def may_be_of(self, file: str) -> bool:
        """Whether there were warnings while a file was decoded, of it or of one that another thread decoded."""
        before = self._size()
        return bool(_decode(file)) or self._size() > before

    def of(self, file: str) -> str:
        """The first warning of a file, or an empty string; no other may be decoded meanwhile."""
        before = self._size()
        if error := _decode(file):
            return error
        written = os.pread(self._log, self._size() - before, before).decode(errors="replace")
        return written.strip().partition("\n")[0]

    def _size(self) -> int:
        return os.fstat(self._log).st_size


@contextlib.contextmanager
def jpeg_warnings() -> Iterator[JpegWarnings]:
    """Keeps what C code writes to stderr from the terminal, so that warnings can be read; what Python writes goes there.

    Raises:
        ImportError: torchvision is not installed.
    """
    import torchvision.io  # noqa: F401 (what is missing is to be missed before the first file)

    with contextlib.ExitStack() as stack:
        log = stack.enter_context(tempfile.TemporaryFile())
        sys.stderr.flush()
        there = os.dup(_STDERR)
        screen = stack.enter_context(os.fdopen(there, "w", buffering=1, errors="backslashreplace"))
        if _is_stderr(sys.stderr):
            stack.enter_context(contextlib.redirect_stderr(screen))
        stack.callback(os.dup2, there, _STDERR)
        os.dup2(log.fileno(), _STDERR)
        yield JpegWarnings(log.fileno())


def _is_stderr(stream: object) -> bool:
    try:
        return stream.fileno() == _STDERR  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False  # something else takes what Python writes


def _decode(file: str) -> str:
    """Why torchvision can't decode a file, or an empty string; what is no JPEG is left alone."""
    import torch
    from torchvision.io import decode_jpeg

    (content,) = contents([file])
    if content[:2].tobytes() != _BEGINS:
        return ""
    try:
        decode_jpeg(torch.from_numpy(np.array(content)))
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return ""

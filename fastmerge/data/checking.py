"""Whether the images of a tree can be read, as far as their headers tell."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fastmerge.data.choosing import cores
from fastmerge.data.cifar import find_cifar
from fastmerge.data.decoding import BadImageError, OnBadImage, check_header
from fastmerge.data.packed import PackedFiles
from fastmerge.data.trees import find_trees

_CHUNK = 64
_THREADS = 4  # per core: a disk far away answers slowly, and many at a time
_NAMED = 20


@dataclass(frozen=True)
class CheckedImages:
    """What came of a check.

    Attributes:
        files: How many images there are, of training and validation.
        bad: Path and reason of each that can't be read.
        unread: Why headers were not read, or empty.
    """

    files: int
    bad: dict[str, str]
    unread: str = ""

    def __str__(self) -> str:
        if self.unread:
            return f"{self.files} images, whose headers were not read: {self.unread}"
        if not self.bad:
            return f"{self.files} images, whose headers can all be read"
        lines = [f"{self.files} images, of which {len(self.bad)} can't be read and are left out:"]
        lines += [f"  {file}: {reason}" for file, reason in list(self.bad.items())[:_NAMED]]
        rest = len(self.bad) - _NAMED
        return "\n".join([*lines, f"  and {rest} more"] if rest > 0 else lines)


def check_images(
    path: str | Path, on_bad_image: OnBadImage = "raise", tell: Callable[[int, int], object] | None = None
) -> CheckedImages | None:
    """Reads the header of every image of a tree, of both splits: its format and size, and for PNG its checksums.

    Pixels are not decoded: a JPEG that is cut off is found by its end, one that is damaged in the middle only when it is
    read. Of a packed tree the index is checked, and that the tar files are those it was made for; packing has read the
    images.

    Args:
        path: As :func:`~fastmerge.data.loading.image_loaders`.
        on_bad_image: What happens at files that can't be read: "raise", or "skip" to list them.
        tell: Called now and then with how many images were read, and of how many.

    Returns:
        None for arrays, which are read whole anyway.

    Raises:
        FileNotFoundError, ValueError: As :func:`~fastmerge.data.trees.find_trees`.
        BadImageError: A file can't be read; the message says how many others.
    """
    path = Path(path)
    if find_cifar(path) or not path.is_dir():
        return None
    trees = find_trees(path)
    total = sum(len(tree.files) for tree in trees)
    if any(isinstance(tree.files, PackedFiles) for tree in trees):
        return CheckedImages(total, {}, "they are packed, and packing read them; the index is whole")
    if importlib.util.find_spec("PIL") is None:
        return CheckedImages(total, {}, "that needs Pillow (pip install pillow)")
    bad: dict[str, str] = {}
    done = 0
    for count, found in _check([file for tree in trees for file in tree.files]):
        bad |= found
        done += count
        if tell is not None:
            tell(done, total)
    if bad and on_bad_image == "raise":
        file, reason = next(iter(bad.items()))
        others = f", and {len(bad) - 1} more of {total} images can't" if len(bad) > 1 else ""
        raise BadImageError(file, f"{reason}{others}; on_bad_image='skip' leaves such files out")
    return CheckedImages(total, bad)


def _check(files: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """By parts, how many files it has and which can't be read, in their order."""

    def check(start: int) -> tuple[int, dict[str, str]]:
        part = files[start : start + _CHUNK]
        bad = {}
        for file in part:
            try:
                check_header(file)
            except BadImageError as error:
                bad[error.file] = error.reason
        return len(part), bad

    pool = ThreadPoolExecutor(_THREADS * cores())
    try:
        yield from pool.map(check, range(0, len(files), _CHUNK))
    finally:
        pool.shutdown(cancel_futures=True)

"""Whether the images of a data set can be read: by their headers, or decoded whole."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastmerge.data.arrays import find_cifar, load_cifar, load_npz
from fastmerge.data.decoding import BadImageError, OnBadImage, bad_files, check_header, cores, in_threads, read_image
from fastmerge.data.trees import find_trees, listed

Check = Literal["headers", "whole"]
Tell = Callable[[int, int, dict[str, str]], object]

_CHUNK = 64
_DECODED = 4  # images of a part that is decoded; an interrupt waits for those under way
_THREADS = 4  # per core, for headers: a disk far away answers slowly, and many at a time
_NAMED = 20


@dataclass(frozen=True)
class CheckedImages:
    """What came of a check.

    Attributes:
        files: How many images there are, of training and validation.
        bad: Path and reason of each that can't be read.
        unread: Why headers were not read, or empty.
        check: What was read.
        seconds: How long it took.
        remark: What this check can't find in these images beyond what it never finds, or empty.
    """

    files: int
    bad: dict[str, str]
    unread: str = ""
    check: Check = "headers"
    seconds: float = 0.0
    remark: str = ""

    @property
    def total(self) -> str:
        """What was read, how long it took, and how many can't be read."""
        what = "headers read" if self.check == "headers" else "decoded whole"
        rate = f", {self.files / self.seconds:.0f} images/s" if self.seconds else ""
        told = f"{len(self.bad)} can't be read" if self.bad else "all can be read"
        return f"{self.files} images, {what} in {self.seconds:.1f} s{rate}: {told}"

    def __str__(self) -> str:
        if self.unread:
            return f"{self.files} images, whose headers were not read: {self.unread}"
        lines = [self.total]
        if self.bad:
            but = "" if self.check == "headers" else ", but for damaged JPEGs that DALI decodes nevertheless"
            lines[0] += f" and are left out{but}:"
            lines += [f"  {file}: {reason}" for file, reason in list(self.bad.items())[:_NAMED]]
            rest = len(self.bad) - _NAMED
            lines += [f"  and {rest} more"] * (rest > 0)
        return "\n".join(lines + [self.remark] * bool(self.remark))


def check_images(
    path: str | Path,
    on_bad_image: OnBadImage = "raise",
    tell: Tell | None = None,
    check: Check = "headers",
    workers: int | None = None,
) -> CheckedImages | None:
    """Reads every image of a tree, of both splits: its header, or all of it.

    * "headers": format and size, and for PNG its checksums. Pixels are not decoded: a JPEG that is cut off is found by its
      end, one that is damaged in the middle only when it is read.
    * "whole": every image is decoded as loaders do it, in threads. Arrays are read.

    Args:
        path: As :func:`~fastmerge.data.loading.image_loaders`.
        on_bad_image: What happens at files that can't be read: "raise", or "skip" to list them, arrays' file too.
        tell: Called now and then with how many images were read, of how many, and path and reason of those that can't be
            read and were not told of yet.
        check: What is read.
        workers: Threads that decode; None is one for each core.

    Returns:
        None for arrays when only headers are asked for: arrays have none, and are read whole anyway.

    Raises:
        FileNotFoundError, ValueError: As :func:`~fastmerge.data.trees.find_trees`; and for arrays that can't be read.
        BadImageError: A file can't be read; the message says how many others, and names some.
        ImportError: Images are to be decoded, and Pillow is not installed.
    """
    path = Path(path)
    if find_cifar(path) or not path.is_dir():
        return None if check == "headers" else _arrays(path, on_bad_image, tell)
    trees = find_trees(path)
    total = sum(len(tree.files) for tree in trees)
    there = importlib.util.find_spec("PIL") is not None
    if check == "headers" and not there:
        return CheckedImages(total, {}, "that needs Pillow (pip install pillow)")
    if not there:
        raise ImportError("decoding images needs Pillow: pip install pillow")
    bad: dict[str, str] = {}
    done, started = 0, time.perf_counter()
    with contextlib.closing(_check_all([tree.files for tree in trees], check, workers or cores())) as parts:
        for count, found in parts:
            bad |= found
            done += count
            if tell is not None:
                tell(done, total, found)
    if bad and on_bad_image == "raise":
        (file, reason), *more = bad.items()
        names = listed([name for name, _ in more], _NAMED - 1)
        others = f", and {len(more)} more of {total} images can't: {names}" if more else ""
        raise BadImageError(file, f"{reason}{others}; on_bad_image='skip' leaves such files out")
    return CheckedImages(total, bad, check=check, seconds=time.perf_counter() - started)


def _arrays(path: Path, on_bad_image: OnBadImage, tell: Tell | None) -> CheckedImages:
    """Reads arrays whole: an .npz has checksums of them, CIFAR's pickles have none."""
    started = time.perf_counter()
    cifar = find_cifar(path)
    try:
        arrays = load_npz(path) if cifar is None else load_cifar(path)
        count, bad = len(arrays.train_images) + len(arrays.test_images), {}
    except ValueError as error:
        if on_bad_image == "raise":
            raise
        count, bad = 1, {str(path): str(error).removeprefix(f"{path} ")}
    if tell is not None:
        tell(count, count, bad)
    remark = "" if cifar is None else "CIFAR's files have no checksums: pixels that changed were not found"
    return CheckedImages(count, bad, check="whole", seconds=time.perf_counter() - started, remark=remark)


def _check_all(
    splits: list[Sequence[str]], check: Check, workers: int
) -> Generator[tuple[int, dict[str, str]], None, None]:
    """By parts, in the order of the files, how many were read and which can't be read."""
    read, size, threads = (
        (check_header, _CHUNK, _THREADS * cores()) if check == "headers" else (read_image, _DECODED, workers)
    )

    def bad_ones(part: Sequence[str]) -> tuple[int, dict[str, str]]:
        return len(part), bad_files(part, read)

    parts = (files[start : start + size] for files in splits for start in range(0, len(files), size))
    yield from in_threads(bad_ones, parts, threads)

"""A tree of images made small, as a tree or packed: what a fast network waits for is the decoding of large JPEGs."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from fastmerge.data.choosing import cores
from fastmerge.data.decoding import BadImageError, BadImages, OnBadImage
from fastmerge.data.packed import is_packed
from fastmerge.data.packing import Done, pack
from fastmerge.data.shrinking import begins_and_ends, small_jpeg
from fastmerge.data.trees import find_trees, image_files

RECORD = "prepared.json"
_PARTIAL = ".partial"
_JPEG = (".jpg", ".jpeg")
_UNDER_WAY = 4  # files per worker that wait their turn, so that a million of them need no memory


@dataclass
class Summary:
    """What came of a tree.

    Attributes:
        resized: Images made smaller, or encoded anew.
        copied: JPEGs that were small enough already, byte by byte.
        there: Images that an earlier run had done.
        bytes_before, bytes_after: Of those resized or copied in this run.
        bad: Path and reason of each file that can't be read.
    """

    resized: int = 0
    copied: int = 0
    there: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    bad: dict[str, str] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """All of them but the bad ones."""
        return self.resized + self.copied + self.there


def prepare(
    source: str | Path,
    target: str | Path,
    *,
    size: int = 256,
    quality: int = 90,
    workers: int | None = None,
    on_bad_image: OnBadImage = "raise",
    progress: bool | None = None,
    packed: bool = False,
) -> Summary:
    """Copies a tree of images as JPEGs whose shorter side is at most ``size``.

    Folders and names stay; what was no JPEG gets ``.jpg`` behind its name. Images are resized with a Lanczos filter, the
    right way up, as RGB; a JPEG that is RGB, upright and small enough is copied as it is. Each file appears under its name
    only when it is whole, so a run that was killed goes on where it was. ``prepared.json`` in the target holds size and
    quality.

    Packed, the images go into tar files of some thousand each, ``train-00000.tar`` and so on, beside an index. What reads
    trees reads such a folder as the tree that it was made of. A tar file appears when it is whole, and a run that was killed
    goes on with the first that is missing.

    Args:
        source: The tree, of any depth; to be packed, ``train/<class>/<image>`` and ``val/<class>/<image>`` (or ``test``).
        target: Where it goes; made if missing.
        size: Pixels of the shorter side; 256 for crops of 224.
        quality: Of the JPEGs, 1 to 100.
        workers: Threads; None is one for each core. Pillow works outside the interpreter's lock.
        on_bad_image: "raise" stops at the first file that can't be read, "skip" goes on; either names it.
        progress: Whether to show a progress bar on stderr; None shows it on a terminal.
        packed: Whether to write few large files in place of the tree.

    Raises:
        FileNotFoundError: There is no source, or a tree to be packed lacks a folder.
        ValueError: The source is packed; source and target are one in the other, hold no images, or two images would get one
            name; the target was prepared with another size or quality, or packed and not, or is being prepared now; a number
            is out of range.
        BadImageError: A file can't be read, and bad images are to stop the run.
        ImportError: Pillow is not installed.
    """
    source, target = Path(source), Path(target)
    if size < 1 or not 1 <= quality <= 100 or (workers is not None and workers < 1):
        raise ValueError(
            f"prepare needs a size and workers of at least 1 and a quality of 1..100; got size={size}, "
            f"quality={quality}, workers={workers}"
        )
    _check_apart(source, target)
    bad_images, summary = BadImages(on_bad_image), Summary()
    count = workers or cores()
    settings = {"size": size, "quality": quality}
    if packed:
        trees = find_trees(source)
        total, results = sum(len(tree.files) for tree in trees), pack(trees, target, size, quality, count)
        settings["packed"] = True
    else:
        pairs = _pairs(source, target)
        total, results = len(pairs), _side_by_side(pairs, target, size, quality, count)
    with _held(target, settings):
        shown = sys.stderr.isatty() if progress is None else progress
        with contextlib.closing(results):
            for result in _with_bar(results, total) if shown else results:
                if result.outcome == "bad":
                    bad_images.report(result.file, result.reason)
                else:
                    setattr(summary, result.outcome, getattr(summary, result.outcome) + 1)
                    summary.bytes_before += result.before
                    summary.bytes_after += result.after
    summary.bad = bad_images.found
    return summary


def _with_bar(results: Iterator[Done], total: int) -> Iterator[Done]:
    from tqdm import tqdm

    return iter(tqdm(results, "prepare", total, unit="img", dynamic_ncols=True))


def _check_apart(source: Path, target: Path) -> None:
    if not source.is_dir():
        raise FileNotFoundError(f"there is no directory {source}")
    if is_packed(source):
        raise ValueError(f"{source} is packed already; prepare the tree that it was made of")
    whole, there = source.resolve(), target.resolve()
    if whole == there or whole in there.parents or there in whole.parents:
        raise ValueError(f"prepare needs a target outside the source; got {source} and {target}")


def _pairs(source: Path, target: Path) -> list[tuple[str, str]]:
    """Files and where they go."""
    files = image_files(str(source))
    if not files:
        raise ValueError(f"{source} holds no images")
    names: dict[str, str] = {}
    for file in files:
        relative = os.path.relpath(file, source)
        name = str(target / (relative if relative.lower().endswith(_JPEG) else f"{relative}.jpg"))
        if name in names:
            raise ValueError(f"{names[name]} and {file} would both become {name}; rename one")
        names[name] = file
    return [(file, name) for name, file in names.items()]


@contextlib.contextmanager
def _held(target: Path, settings: dict[str, int]) -> Iterator[None]:
    """Keeps other processes out of the target, and other settings."""
    target.mkdir(parents=True, exist_ok=True)
    with (target / RECORD).open("a+", encoding="utf-8") as record:
        try:
            fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{target} is being prepared by another process") from None
        record.seek(0)
        text = record.read()
        if not text:
            json.dump(settings, record)
            record.write("\n")
            record.flush()
        elif json.loads(text) != settings:
            raise ValueError(
                f"{target} was prepared with {text.strip()}, not {json.dumps(settings)}; choose another target"
            )
        yield


def _remove_partial(target: Path) -> None:
    """Removes what a killed run left half written."""
    for folder, _, names in os.walk(target):
        for name in names:
            if name.startswith(".") and name.endswith(_PARTIAL):
                os.unlink(os.path.join(folder, name))


def _side_by_side(
    pairs: list[tuple[str, str]], target: Path, size: int, quality: int, workers: int
) -> Generator[Done, None, None]:
    """Results as they come; when the caller stops, what is under way comes to its end and nothing new begins."""
    _remove_partial(target)
    waiting = iter(pairs)
    under_way: set[Future[Done]] = set()
    with ThreadPoolExecutor(workers) as pool:
        try:
            while True:
                for pair in waiting:
                    under_way.add(pool.submit(_prepare, *pair, size, quality))
                    if len(under_way) >= _UNDER_WAY * workers:
                        break
                if not under_way:
                    return
                done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        finally:
            pool.shutdown(cancel_futures=True)


def _prepare(file: str, target: str, size: int, quality: int) -> Done:
    if _is_done(file, target):
        return Done(file, "there")
    folder, name = os.path.split(target)
    os.makedirs(folder, exist_ok=True)
    partial = os.path.join(folder, f".{name}{_PARTIAL}")
    try:
        copied = _write(file, partial, size, quality)
        before, after = os.path.getsize(file), os.path.getsize(partial)
        os.replace(partial, target)
    except BadImageError as error:
        return Done(file, "bad", reason=error.reason)
    finally:
        with contextlib.suppress(FileNotFoundError):  # it is gone where all went well
            os.unlink(partial)
    return Done(file, "copied" if copied else "resized", before, after)


def _is_done(file: str, target: str) -> bool:
    """Whether the target is there, whole, and not older than its source."""
    try:
        return os.stat(target).st_mtime_ns >= os.stat(file).st_mtime_ns and begins_and_ends(target)
    except OSError:  # it is missing, or too short to be anything
        return False


def _write(file: str, partial: str, size: int, quality: int) -> bool:
    """Writes the small image; whether it is a copy."""
    encoded, copied = small_jpeg(file, size, quality)
    Path(partial).write_bytes(encoded)
    return copied

"""A tree of images made small and packed: tar files of some thousand images each, and an index."""

from __future__ import annotations

import io
import os
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastmerge.data.decoding import BadImageError
from fastmerge.data.packed import INDEX, Places, index_arrays, is_packed, read_index_alone
from fastmerge.data.shrinking import small_jpeg
from fastmerge.data.trees import ImageTree
from fastmerge.files import atomic

IMAGES = 4096  # of a tar file; of 256 pixels, some 80 MB
_UNDER_WAY = 4  # images per worker that are encoded ahead of the one to be written next
_JPEG = (".jpg", ".jpeg")

Outcome = Literal["resized", "copied", "there", "bad"]
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Done:
    """What came of one image.

    Attributes:
        file: Its path.
        outcome: Made smaller or encoded anew, copied byte by byte, there from an earlier run, or unreadable.
        before, after: Bytes, of those that were written.
        reason: Why it can't be read.
    """

    file: str
    outcome: Outcome
    before: int = 0
    after: int = 0
    reason: str = ""


def pack(
    trees: tuple[ImageTree, ImageTree], target: Path, size: int, quality: int, workers: int
) -> Generator[Done, None, None]:
    """Writes tar files ``train-00000.tar`` and so on, and the index when all are there; yields as images get done.

    A tar file gets its name when it is whole. One that is there already stays, if it has the images that it should, none of
    them older than its source, and with the bytes that an earlier index had checksums of; files that it lacks are tried again.

    Args:
        trees: Of training and validation.
        target: An existing folder.
        size, quality, workers: As :func:`~fastmerge.data.preparing.prepare`.
    """
    _remove_partial(target)
    known = _known_checksums(target)
    splits = {}
    with ThreadPoolExecutor(workers) as pool:
        try:
            for split, tree in zip(("train", "val"), trees, strict=True):
                tars, found, crcs = [], [], []
                for number, start in enumerate(range(0, len(tree.files), IMAGES)):
                    tar = target / f"{split}-{number:05}.tar"
                    files = tree.files[start : start + IMAGES]
                    names = {_name(file, tree.folder): file for file in files}
                    if len(names) < len(files):
                        raise ValueError(f"two images of {tree.folder} would get one name as JPEGs; rename one")
                    before = _checksums(tar) if tar.name in known else None
                    changed = before is not None and not np.array_equal(before, known[tar.name])
                    written = yield from _tar(tar, names, pool, _UNDER_WAY * workers, size, quality, changed)
                    tars.append(tar)
                    found.append(_members(tar))
                    crcs.append(_checksums(tar) if written or before is None else before)
                _remove_beyond(target, split, len(tars))
                splits[split] = _places(tars, found, crcs), _labels(tree, found)
        finally:
            pool.shutdown(cancel_futures=True)
    with atomic(target / INDEX) as temporary:
        np.savez(temporary, **index_arrays(trees[0].classes, splits))  # type: ignore[arg-type]


def _name(file: str, folder: Path) -> str:
    relative = os.path.relpath(file, folder)
    return relative if relative.lower().endswith(_JPEG) else f"{relative}.jpg"


def _tar(
    tar: Path, names: dict[str, str], pool: ThreadPoolExecutor, ahead: int, size: int, quality: int, changed: bool
) -> Generator[Done, None, bool]:
    """Writes one tar file where it isn't there yet, or its bytes changed since it was written; returns whether it did."""

    def shrink(file: str) -> bytes | BadImageError | tuple[bytes, bool]:
        try:
            return small_jpeg(file, size, quality)
        except BadImageError as error:
            return error

    missing = None if changed else _missing(tar, names)
    if missing is not None:
        outcomes = dict(zip(missing, in_order(pool, shrink, [names[name] for name in missing], ahead), strict=True))
        bad = {name: error for name, error in outcomes.items() if isinstance(error, BadImageError)}
        if len(bad) == len(missing):
            for name, file in names.items():
                yield Done(file, "bad", reason=bad[name].reason) if name in bad else Done(file, "there")
            return False
    with atomic(tar) as temporary, tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as archive:
        for (name, file), made in zip(names.items(), in_order(pool, shrink, names.values(), ahead), strict=True):
            if isinstance(made, BadImageError):
                yield Done(file, "bad", reason=made.reason)
                continue
            assert isinstance(made, tuple)
            encoded, copied = made
            before = os.stat(file)
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(encoded), int(before.st_mtime)
            archive.addfile(member, io.BytesIO(encoded))
            yield Done(file, "copied" if copied else "resized", before.st_size, len(encoded))
    return True


def _missing(tar: Path, names: dict[str, str]) -> list[str] | None:
    """The images that a tar file lacks; None where it has to be written anew."""
    try:
        made = tar.stat().st_mtime_ns
        there = [member.name for member in _members(tar)]
    except (OSError, tarfile.TarError):
        return None
    lacking = names.keys() - set(there)
    if [name for name in names if name not in lacking] != there:
        return None
    if any(os.stat(names[name]).st_mtime_ns > made for name in there):
        return None
    return [name for name in names if name in lacking]


def _members(tar: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(tar, "r:") as archive:
        return archive.getmembers()


def _checksums(tar: Path) -> NDArray[np.uint32]:
    """CRC-32 of each image's bytes in a tar file; empty where it can't be read."""
    try:
        with tarfile.open(tar, "r:") as archive, tar.open("rb") as stream:
            return np.array([_checksum(stream, member) for member in archive], np.uint32)
    except (OSError, tarfile.TarError):
        return np.empty(0, np.uint32)


def _checksum(stream: BinaryIO, member: tarfile.TarInfo) -> int:
    stream.seek(member.offset_data)
    return zlib.crc32(stream.read(member.size))


def _known_checksums(target: Path) -> dict[str, NDArray[np.uint32]]:
    """By tar file, the checksums that an earlier index has of its images."""
    if not is_packed(target):
        return {}
    try:
        _, splits = read_index_alone(target)
    except ValueError:  # it is damaged, and will be written anew
        return {}
    known: dict[str, NDArray[np.uint32]] = {}
    for files, _ in splits.values():
        places = files.places
        if places.crc is not None:
            known |= {name: places.crc[places.shard == number] for number, name in enumerate(places.tars)}
    return known


def _places(tars: Sequence[Path], found: list[list[tarfile.TarInfo]], crcs: list[NDArray[np.uint32]]) -> Places:
    members = [member for each in found for member in each]
    names = [os.fsencode(member.name) for member in members]
    return Places(
        tars=[tar.name for tar in tars],
        sizes=np.array([tar.stat().st_size for tar in tars], np.int64),
        shard=np.repeat(np.arange(len(tars), dtype=np.int32), [len(each) for each in found]),
        offset=np.array([member.offset_data for member in members], np.int64),
        length=np.array([member.size for member in members], np.int64),
        names=np.frombuffer(b"".join(names), np.uint8),
        ends=np.cumsum([len(name) for name in names], dtype=np.int64),
        crc=np.concatenate(crcs),
    )


def _labels(tree: ImageTree, found: list[list[tarfile.TarInfo]]) -> np.ndarray:
    """The class of each image: the folder that its path begins with."""
    numbers = {name: number for number, name in enumerate(tree.classes)}
    return np.array([numbers[member.name.partition("/")[0]] for each in found for member in each], np.int64)


def _remove_partial(target: Path) -> None:
    """Removes what a killed run left half written."""
    for pattern in (".train-*.tar", ".val-*.tar", f".{Path(INDEX).stem}-*.npz"):
        for partial in target.glob(pattern):
            partial.unlink()


def _remove_beyond(target: Path, split: str, count: int) -> None:
    """Removes tar files of a tree that had more images."""
    for tar in target.glob(f"{split}-*.tar"):
        number = tar.stem.removeprefix(f"{split}-")
        if number.isdigit() and int(number) >= count:
            tar.unlink()


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """``map`` in a pool that is never further than so many items ahead."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()

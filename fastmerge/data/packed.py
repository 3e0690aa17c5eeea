"""Trees of image files packed into few large ones: what lies where, and how to read it."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

INDEX = "packed.npz"


class PackedFile(str):
    """An image within a tar file, by the path that messages name it with.

    Attributes:
        tar: The tar file.
        offset, size: Where its bytes lie in it.
        crc: CRC-32 of its bytes when they were packed; None where the index has none.
    """

    tar: str
    offset: int
    size: int
    crc: int | None

    def read(self) -> bytes:
        """Its bytes.

        Raises:
            OSError: The tar file can't be read, ends early, or the bytes are not those that were packed.
        """
        handle = os.open(self.tar, os.O_RDONLY | os.O_CLOEXEC)
        try:
            content = os.pread(handle, self.size, self.offset)
        finally:
            os.close(handle)
        if len(content) != self.size:
            raise OSError(f"{self.tar} ends within it")
        if not self.is_whole(content):
            raise OSError("its bytes changed after it was packed (their checksum differs); prepare the tree again")
        return content

    def is_whole(self, content: bytes) -> bool:
        """Whether bytes are those that were packed, as far as the index tells."""
        return len(content) == self.size and self.crc in (None, zlib.crc32(content))


@dataclass(frozen=True)
class Places:
    """Where the images of one split lie.

    Attributes:
        tars: Names of the tar files, in the index's folder.
        sizes: int64, their bytes.
        shard: int32 (N,), which tar file each image is in.
        offset, length: int64 (N,), its bytes there.
        names: uint8, the images' paths in the tree, in UTF-8, one behind another.
        ends: int64 (N,), where each path ends.
        crc: uint32 (N,), CRC-32 of each image's bytes; None where the index was written without them.
    """

    tars: list[str]
    sizes: NDArray[np.int64]
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    names: NDArray[np.uint8]
    ends: NDArray[np.int64]
    crc: NDArray[np.uint32] | None = None


class PackedFiles(Sequence[str]):
    """The images of one split as a list of their paths, each a :class:`PackedFile`; a million of them take arrays alone.

    Args:
        folder: With the tar files.
        places: What lies where.
    """

    def __init__(self, folder: Path, places: Places) -> None:
        self.folder, self.places = folder, places
        self._tars = [str(folder / name) for name in places.tars]

    def __len__(self) -> int:
        return len(self.places.ends)

    @overload
    def __getitem__(self, index: int) -> PackedFile: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> PackedFile | list[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        places = self.places
        number = range(len(self))[index]
        begin = places.ends[number - 1] if number else 0
        name = os.fsdecode(places.names[begin : places.ends[number]].tobytes())
        tar = self._tars[places.shard[number]]
        file = PackedFile(f"{tar}/{name}")
        file.tar, file.offset, file.size = tar, int(places.offset[number]), int(places.length[number])
        file.crc = None if places.crc is None else int(places.crc[number])
        return file


def content(file: str) -> str | io.BytesIO:
    """What Pillow opens an image with: the path of a file, or the bytes of a packed one."""
    return io.BytesIO(file.read()) if isinstance(file, PackedFile) else file


def contents(files: list[str]) -> list[NDArray[np.uint8]]:
    """The bytes of files, packed or not; none of a packed one whose bytes changed, so that no decoder takes them.

    The system is told of all packed ones first, so that a disk fetches them at once.
    """
    handles: dict[str, int] = {}
    found = []
    try:
        for file in files:
            if isinstance(file, PackedFile):
                if file.tar not in handles:
                    handles[file.tar] = os.open(file.tar, os.O_RDONLY | os.O_CLOEXEC)
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(handles[file.tar], file.offset, file.size, os.POSIX_FADV_WILLNEED)
        for file in files:
            if isinstance(file, PackedFile):
                there = os.pread(handles[file.tar], file.size, file.offset)
                found.append(np.frombuffer(there if file.is_whole(there) else b"", np.uint8))
            else:
                found.append(np.fromfile(file, np.uint8))
    finally:
        for handle in handles.values():
            os.close(handle)
    return found


def is_packed(path: Path) -> bool:
    """Whether a folder has an index of packed images."""
    return (path / INDEX).is_file()


def read_index(path: Path) -> tuple[list[str], dict[str, tuple[PackedFiles, NDArray[np.int64]]]]:
    """The classes of a folder of packed images, and by split the files and the class of each.

    Raises:
        ValueError: The index is damaged, or the tar files are not those it was made for.
    """
    classes, splits = read_index_alone(path)
    for files, _ in splits.values():
        for name, size in zip(files.places.tars, files.places.sizes.tolist(), strict=True):
            tar = path / name
            there = tar.stat().st_size if tar.is_file() else None
            if there != size:
                found = "missing" if there is None else f"of {there} bytes"
                raise ValueError(f"{tar} should have {size} bytes and is {found}; prepare the tree again")
    return classes, splits


def read_index_alone(path: Path) -> tuple[list[str], dict[str, tuple[PackedFiles, NDArray[np.int64]]]]:
    """As :func:`read_index`, whatever became of the tar files.

    Raises:
        ValueError: The index is damaged.
    """
    index = path / INDEX
    try:
        with index.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays: dict[str, Any] = {name: file[name] for name in file.files}
        classes = arrays["classes"].tolist()
        splits = {}
        for split in arrays["splits"].tolist():
            part = {name: arrays[f"{split}_{name}"] for name in Places.__annotations__ if name != "crc"}
            part["crc"] = arrays.get(f"{split}_crc")
            places = Places(**part | {"tars": part["tars"].tolist()})
            splits[split] = PackedFiles(path, places), arrays[f"{split}_labels"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{index} is damaged ({error}); prepare the tree again") from error
    for split, (files, labels) in splits.items():
        if problem := _problem(files.places, labels, len(classes)):
            raise ValueError(f"{index} is damaged ({split}: {problem}); prepare the tree again")
    return classes, splits


def _problem(places: Places, labels: NDArray[np.int64], classes: int) -> str:
    """Why a split's index can't be right, or an empty string."""
    counts = {len(places.shard), len(places.offset), len(places.length), len(places.ends), len(labels)}
    if places.crc is not None:
        counts.add(len(places.crc))
    if len(counts) > 1 or len(places.sizes) != len(places.tars):
        return "its arrays differ in length"
    if not len(labels):
        return "it has no images"
    if labels.min() < 0 or labels.max() >= classes:
        return f"classes {labels.min()}..{labels.max()} of {classes}"
    if places.shard.min() < 0 or places.shard.max() >= len(places.tars):
        return "images in tar files that it doesn't name"
    if (places.length <= 0).any() or (places.offset < 0).any():
        return "images without bytes"
    if (places.offset + places.length > places.sizes[places.shard]).any():
        return "images beyond the end of their tar file"
    if np.diff(places.ends, prepend=0).min() <= 0 or places.ends[-1] != len(places.names):
        return "paths that don't fit"
    return ""


def index_arrays(
    classes: list[str], splits: dict[str, tuple[Places, NDArray[np.int64]]]
) -> dict[str, NDArray[np.generic]]:
    """What :func:`read_index` reads, as the arrays of an .npz."""
    arrays: dict[str, Any] = {"classes": np.array(classes), "splits": np.array(list(splits))}
    for split, (places, labels) in splits.items():
        arrays |= {f"{split}_{name}": np.array(value) for name, value in vars(places).items() if value is not None}
        arrays[f"{split}_labels"] = labels
    return arrays

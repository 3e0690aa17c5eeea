"""Images before training: trees of them made small, and all looked through for what can't be read.

A fast network waits for the decoding of large JPEGs, so they are made small once.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fastmerge.data.arrays import find_cifar, load_cifar, load_npz
from fastmerge.data.decoding import (
    JPEG_END,
    BadImageError,
    BadImages,
    OnBadImage,
    bad_files,
    check_header,
    cores,
    in_threads,
    open_image,
    read_image,
)
from fastmerge.data.trees import find_trees, image_files, listed
from fastmerge.files import held

RECORD = "prepared.json"
_PARTIAL = ".partial"
_JPEG = (".jpg", ".jpeg")
_NAMED = 3


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
    outcome: Literal["resized", "copied", "there", "bad"]
    before: int = 0
    after: int = 0
    reason: str = ""


@dataclass
class Summary:
    """What came of a tree.

    Attributes:
        resized: Images made smaller, or encoded anew.
        copied: JPEGs that were small enough already, byte by byte.
        there: Images that an earlier run had done.
        bytes_before, bytes_after: Of those resized or copied in this run.
        bad: Path and reason of each file that can't be read.
        stale: Images in the target that the source has no longer, or never had. They stay, with a warning.
    """

    resized: int = 0
    copied: int = 0
    there: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    stale: list[str] = field(default_factory=list)

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
) -> Summary:
    """Copies a tree of images as JPEGs whose shorter side is at most ``size``.

    Folders and names stay; what was no JPEG gets ``.jpg`` behind its name. Images are resized with a Lanczos filter, the
    right way up, as RGB; a JPEG that is RGB, upright and small enough is copied as it is. Each file appears under its name
    only when it is whole, so a run that was killed goes on where it was. A run later does what changed in the source since: a
    copy has its image's time of change. ``prepared.json`` in the target holds source, size and quality, and shows that what
    is there was made by this function: nothing is written to other folders with files in them.

    Args:
        source: The tree, of any depth.
        target: Where it goes; made if missing.
        size: Pixels of the shorter side; 256 for crops of 224.
        quality: Of the JPEGs, 1 to 100.
        workers: Threads; None is one for each core. Pillow works outside the interpreter's lock.
        on_bad_image: "raise" stops at the first file that can't be read, "skip" goes on; either names it.
        progress: Whether to show a progress bar on stderr; None shows it on a terminal.

    Raises:
        FileNotFoundError: There is no source.
        ValueError: Source and target are one in the other; the source holds no images, was itself prepared from the target, or
            two of its images would get one name; the target holds files that were not prepared, was prepared from another
            source, or with another size or quality, or is being prepared now; a number is out of range.
        BadImageError: A file can't be read, and bad images are to stop the run.
        ImportError: Pillow is not installed.
    """
    source, target = Path(source), Path(target)
    if size < 1 or not 1 <= quality <= 100 or (workers is not None and workers < 1):
        raise ValueError(
            f"prepare needs a size and workers of at least 1 and a quality of 1..100; got size={size}, "
            f"quality={quality}, workers={workers}"
        )
    settings: dict[str, int | str] = {"source": str(source.resolve()), "size": size, "quality": quality}
    _check_apart(source, target)
    bad_images, summary = BadImages(on_bad_image), Summary()
    pairs = _pairs(source, target)
    with _held(target, settings):
        summary.stale = _clean(target, {name for _, name in pairs})
        if summary.stale:
            warnings.warn(
                f"{target} holds {len(summary.stale)} images that {source} does not have, and they stay: "
                f"{listed(summary.stale, _NAMED)}; remove them, or prepare into an empty folder",
                stacklevel=2,
            )
        shown = sys.stderr.isatty() if progress is None else progress
        work = partial(_prepare, size=size, quality=quality)
        with contextlib.closing(in_threads(work, pairs, workers or cores())) as results:
            for result in _with_bar(results, len(pairs)) if shown else results:
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
    whole, there = source.resolve(), target.resolve()
    try:
        made_from = (_noted(source) or {}).get("source")
    except ValueError:  # another program's file
        made_from = None
    if made_from == str(there):
        raise ValueError(f"{source} was prepared from {target}; source and target are the wrong way round")
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
def _held(target: Path, settings: dict[str, int | str]) -> Iterator[None]:
    """Keeps other processes out of the target, and other sources and settings."""
    target.mkdir(parents=True, exist_ok=True)
    if _noted(target) is None and (others := sorted(name for name in os.listdir(target) if name != RECORD)):
        raise ValueError(
            f"{target} holds files that were not prepared ({listed(others, _NAMED)}), and nothing is written beside them; "
            "name a new or empty folder. The first argument is the source, the second the target"
        )
    with contextlib.ExitStack() as closing:
        try:
            record = closing.enter_context(held(target / RECORD))
        except BlockingIOError:
            raise ValueError(f"{target} is being prepared by another process; wait for its end") from None
        there = _noted(target)
        if there is None:
            record.write(json.dumps(settings) + "\n")
            record.flush()
        elif differing := [name for name in settings if there.get(name) != settings[name]]:
            named = ", ".join(f"{name} {there.get(name)}, not {settings[name]}" for name in differing)
            raise ValueError(
                f"{target} was prepared with {named}; choose another target. A source that was moved can be named in "
                f"{target / RECORD}"
            )
        yield


def _noted(folder: Path) -> dict[str, Any] | None:
    """What the record of a prepared folder holds; None where there is none yet.

    Raises:
        ValueError: It is damaged.
    """
    record = folder / RECORD
    try:
        text = record.read_text(encoding="utf-8")
        noted = json.loads(text) if text else None
        if not isinstance(noted, dict | None):
            raise ValueError(f"it holds a {type(noted).__name__}")
        return noted
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{record} is damaged ({error}); prepare into an empty folder") from error


def _clean(target: Path, wanted: set[str]) -> list[str]:
    """Removes what a killed run left half written of the wanted files; returns images that are not wanted."""
    for folder, _, names in os.walk(target):
        for name in names:
            partial = name.startswith(".") and name.endswith(_PARTIAL)
            if partial and str(Path(folder, name[1:].removesuffix(_PARTIAL))) in wanted:
                os.unlink(os.path.join(folder, name))
    return [file for file in image_files(str(target)) if str(Path(file)) not in wanted]


def _prepare(pair: tuple[str, str], size: int, quality: int) -> Done:
    file, target = pair
    if _is_done(file, target):
        return Done(file, "there")
    folder, name = os.path.split(target)
    os.makedirs(folder, exist_ok=True)
    partial = os.path.join(folder, f".{name}{_PARTIAL}")
    try:
        copied = _write(file, partial, size, quality)
        status, after = os.stat(file), os.path.getsize(partial)
        os.utime(partial, ns=(status.st_atime_ns, status.st_mtime_ns))
        os.replace(partial, target)
    except BadImageError as error:
        return Done(file, "bad", reason=error.reason)
    finally:
        with contextlib.suppress(FileNotFoundError):  # it is gone where all went well
            os.unlink(partial)
    return Done(file, "copied" if copied else "resized", status.st_size, after)


def _is_done(file: str, target: str) -> bool:
    """Whether the target is there, whole, and of the source as it is now, which has its time of change."""
    try:
        return os.stat(target).st_mtime_ns == os.stat(file).st_mtime_ns and _begins_and_ends(target)
    except OSError:  # it is missing, or too short to be anything
        return False


def _write(file: str, partial: str, size: int, quality: int) -> bool:
    """Writes the small image; whether it is a copy."""
    encoded, copied = small_jpeg(file, size, quality)
    Path(partial).write_bytes(encoded)
    return copied


def small_jpeg(file: str, size: int, quality: int) -> tuple[bytes, bool]:
    """An image as a JPEG whose shorter side is at most ``size``, RGB and the right way up.

    Args:
        file: Its path.
        size: Pixels of the shorter side.
        quality: Of the JPEG, 1 to 100.

    Returns:
        The bytes, and whether they are the file's own: those of a JPEG that is RGB, upright and small enough stay.

    Raises:
        BadImageError: It can't be read.
    """
    from PIL.Image import Resampling

    if _is_small_jpeg(file, size):
        read_image(file)  # it has to be whole
        return Path(file).read_bytes(), True
    image = read_image(file, draft=(2 * size, 2 * size))
    least = min(image.size)
    if least > size:
        width, height = (round(side * size / least) for side in image.size)
        image = image.resize((width, height), Resampling.LANCZOS)
    written = io.BytesIO()
    image.save(written, "JPEG", quality=quality)
    return written.getvalue(), False


def _begins_and_ends(file: str) -> bool:
    """Whether a file has the markers between which a JPEG lies."""
    with open(file, "rb") as stream:
        begins = stream.read(2)
        stream.seek(-2, 2)
        return begins == b"\xff\xd8" and stream.read(2) == JPEG_END


def _is_small_jpeg(file: str, size: int) -> bool:
    try:
        with open_image(file) as image:
            upright = image.getexif().get(0x112, 1) == 1
            small = image.format == "JPEG" and image.mode == "RGB" and upright and min(image.size) <= size
        return small and _begins_and_ends(file)
    except (OSError, SyntaxError, ValueError):
        return False  # reading it whole will say what is wrong


Check = Literal["headers", "whole"]
Tell = Callable[[int, int, dict[str, str]], object]

_CHUNK = 64
_DECODED = 4  # images of a part that is decoded; an interrupt waits for those under way
_THREADS = 4  # per core, for headers: a disk far away answers slowly, and many at a time
_LISTED = 20


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
            lines += [f"  {file}: {reason}" for file, reason in list(self.bad.items())[:_LISTED]]
            rest = len(self.bad) - _LISTED
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
        names = listed([name for name, _ in more], _LISTED - 1)
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

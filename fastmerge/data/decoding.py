"""From image files to RGB pixels of the final size, and what happens to a file that isn't an image."""

from __future__ import annotations

import contextlib
import math
import os
import stat
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastmerge.data.augmentation import Augmentation, draw_crops

if TYPE_CHECKING:
    from PIL.Image import Image

Item = TypeVar("Item")
Result = TypeVar("Result")
OnBadImage = Literal["raise", "skip"]
ON_BAD_IMAGE: tuple[OnBadImage, ...] = ("raise", "skip")
JPEG_END = b"\xff\xd9"
_AHEAD = 4  # items per thread that wait their turn, so that a million images need no memory
# Pillow goes by a file's content, not by its name, and has readers that start other programs (EPS) or are little tested.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")


class BadImageError(ValueError):
    """A file that can't be read as an image.

    Attributes:
        file: Its path.
        reason: What is wrong with it.
    """

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(f"{file} can't be read as an image: {reason}")
        self.file, self.reason = file, reason

    def __reduce__(self) -> tuple[type[BadImageError], tuple[str, str]]:
        return BadImageError, (self.file, self.reason)


class BadImageWarning(UserWarning):
    """A file that can't be read as an image and was left out, by name."""


class BadImages:
    """What was found unreadable, and whether to go on.

    Args:
        on_bad_image: "raise" stops at the first such file, "skip" leaves it out with a warning. Either names it.

    Attributes:
        found: Path and reason of each file left out.
    """

    def __init__(self, on_bad_image: OnBadImage = "raise") -> None:
        if on_bad_image not in ON_BAD_IMAGE:
            raise ValueError(f"on_bad_image must be 'raise' or 'skip'; got {on_bad_image!r}")
        self.on_bad_image = on_bad_image
        self.found: dict[str, str] = {}

    def report(self, file: str, reason: str) -> None:
        """Says that a file can't be read; once for each file.

        Raises:
            BadImageError: Bad images are to stop the run.
        """
        if self.on_bad_image == "raise":
            raise BadImageError(file, f"{reason}; on_bad_image='skip' leaves such files out")
        if file not in self.found:
            self.found[file] = reason
            warnings.warn(f"{file} can't be read as an image and is left out: {reason}", BadImageWarning, stacklevel=2)


def most_pixels() -> int:
    """Pixels of the largest image that is read: Pillow's own limit, beyond which it takes a file for an attack."""
    from PIL import Image

    return min(2 * (Image.MAX_IMAGE_PIXELS or 2**30), 2**31 - 1)  # DALI's numbers are no larger


def open_image(file: str) -> Image:
    """Opens an image file by its header: the one place where Pillow is given a file.

    Raises:
        OSError: It can't be opened, is no regular file, or of none of :data:`FORMATS`.
        ImportError: Pillow is not installed.
    """
    from PIL import Image

    if not stat.S_ISREG(os.stat(file).st_mode):
        raise OSError("it is no regular file")
    return Image.open(file, formats=FORMATS)


def read_image(file: str, draft: tuple[int, int] | None = None) -> Image:
    """Reads an image file whole, as RGB and the right way up.

    Grey, palette, CMYK and 16-bit images become RGB of 8 bits; transparency is dropped, and an EXIF orientation applied.

    Args:
        file: Its path.
        draft: A width and height above which a JPEG may be decoded at a half, a quarter or an eighth, which is faster.

    Raises:
        BadImageError: It can't be opened, is of none of :data:`FORMATS`, is damaged or ends early.
        ImportError: Pillow is not installed.
    """
    from PIL import ImageOps

    with _named(file), open_image(file) as image:
        if draft is not None:
            image.draft("RGB", draft)
        upright = ImageOps.exif_transpose(image)
        return _rgb(upright)


def check_header(file: str) -> None:
    """Reads the header of an image file, and what its format has in the way of checksums, without decoding it.

    Only a JPEG that doesn't end as JPEGs do, because it is cut off or something follows, is read whole.

    Args:
        file: Its path.

    Raises:
        BadImageError: It can't be opened, is of none of :data:`FORMATS`, is cut off, or its header or a checksum
            is damaged.
        ImportError: Pillow is not installed.
    """
    with _named(file):
        with open_image(file) as image:
            is_jpeg = image.format == "JPEG"
            image.verify()
        if not is_jpeg or _tail(file) == JPEG_END:
            return
    read_image(file)


def _tail(file: str) -> bytes:
    with open(file, "rb") as stream:
        stream.seek(-len(JPEG_END), os.SEEK_END)
        return stream.read()


@contextlib.contextmanager
def _named(file: str) -> Iterator[None]:
    """Whatever goes wrong in reading a file names it."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # for damaged files Pillow's readers raise nearly anything, SyntaxError and KeyError too
        raise BadImageError(file, _reason(file, error)) from error


def bad_files(files: Iterable[str], read: Callable[[str], object] = read_image) -> dict[str, str]:
    """Reads files and returns path and reason of those that can't be."""
    bad = {}
    for file in files:
        try:
            read(file)
        except BadImageError as error:
            bad[error.file] = error.reason
    return bad


def in_threads(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Generator[Result, None, None]:
    """What some work on each of many items comes to, in their order: Pillow works outside the interpreter's lock.

    When the caller stops, what is under way comes to its end and nothing new begins.
    """
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= _AHEAD * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _rgb(image: Image) -> Image:
    from PIL import Image as PillowImage

    if image.mode.startswith("I"):  # 16 bits per pixel; Pillow's own conversion would clip them
        return PillowImage.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert(
            "RGB"
        )
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _reason(file: str, error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if type(error).__name__ == "UnidentifiedImageError":
        return f"its content is none of {', '.join(FORMATS)}" if os.path.getsize(file) else "it is empty"
    return " ".join(str(error).split()) or type(error).__name__


def cores() -> int:
    """How many cores this process may use; of those that torchrun's processes on one machine share, its part."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // sharing())


def sharing() -> int:
    """How many of torchrun's processes share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def read_batch(
    files: Sequence[str],
    samples: NDArray[np.int64],
    size: int,
    augmentation: Augmentation,
    *,
    training: bool,
    seed: int = 0,
    epoch: int = 0,
) -> tuple[NDArray[np.uint8], NDArray[np.int64], dict[str, str]]:
    """Reads images and cuts them to one size.

    Args:
        files: Paths of the whole data set.
        samples: (n,), which of them.
        size: Height and width in the end.
        augmentation: How they are cut; what happens after is for the caller.
        training: Whether crops are random.
        seed, epoch: Of the draws.

    Returns:
        Images (m, size, size, 3), the samples (m,) that they are, and path and reason of each file that can't be read.
    """
    crops = draw_crops(augmentation, seed, epoch, samples) if training and augmentation.scale is not None else None
    images, kept, bad = [], [], {}
    for place, sample in enumerate(samples):
        try:
            image = read_image(files[sample])
        except BadImageError as error:
            bad[error.file] = error.reason
            continue
        if crops is not None:
            areas, ratios, where = (draw[place] for draw in crops)
            top, left, height, width = random_crop(image.height, image.width, areas, ratios, where, augmentation.ratio)
            image = image.crop((left, top, left + width, top + height))
        region = None
        if not training and augmentation.shorter_side is not None:
            region = centre_crop(image.height, image.width, size, round(size * augmentation.shorter_side))
        images.append(resize(np.asarray(image), size, region))
        kept.append(sample)
    stacked = np.stack(images) if images else np.empty((0, size, size, 3), np.uint8)
    return stacked, np.array(kept, np.int64), bad


def resize(
    image: NDArray[np.uint8], size: int, region: tuple[float, float, float, float] | None = None
) -> NDArray[np.uint8]:
    """Resizes an image, or a region of it, to a square: bilinear, and antialiased where it gets smaller.

    Pixels beyond the border are those of the border, as in DALI; Pillow alone would leave them out of the mean.

    Args:
        image: uint8 (H, W, 3).
        size: Height and width in the end.
        region: (top, left, bottom, right) in pixels; None is the whole image.
    """
    from PIL import Image

    top, left, bottom, right = region or (0, 0, *image.shape[:2])
    reach = math.ceil(max((bottom - top) / size, (right - left) / size))
    if reach > 1:
        image = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
        top, left, bottom, right = (edge + reach for edge in (top, left, bottom, right))
    resized = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, (left, top, right, bottom))
    return np.asarray(resized)


def random_crop(
    height: int,
    width: int,
    areas: NDArray[np.float64],
    ratios: NDArray[np.float64],
    place: NDArray[np.float64],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """The crop that draws come to: the first try that fits, or else the largest one of an allowed shape, in the middle.

    Its distribution is that of torchvision's RandomResizedCrop. The DALI graph computes the same.

    Args:
        height, width: Of the image.
        areas, ratios, place: (10,), (10,) and (2,), drawn by :func:`~fastmerge.data.augmentation.draw_crops`.
        ratio: Least and largest width over height.

    Returns:
        (top, left, height, width) in whole pixels.
    """
    area = height * width * areas
    widths, heights = np.floor(np.sqrt(area * ratios) + 0.5), np.floor(np.sqrt(area / ratios) + 0.5)
    fitting = (widths >= 1) & (heights >= 1) & (widths <= width) & (heights <= height)
    if fitting.any():
        first = int(fitting.argmax())
        crop_height, crop_width = int(heights[first]), int(widths[first])
    else:
        crop_height = max(1, min(height, int(np.floor(width / ratio[0] + 0.5))))
        crop_width = max(1, min(width, int(np.floor(height * ratio[1] + 0.5))))
        return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width
    top = int(np.floor(place[0] * (height - crop_height + 1)))
    left = int(np.floor(place[1] * (width - crop_width + 1)))
    return top, left, crop_height, crop_width


def centre_crop(height: int, width: int, size: int, shorter: int) -> tuple[float, float, float, float]:
    """The part of an image that is the centre of ``size`` once the shorter side is resized to ``shorter``.

    It is what torchvision's Resize(shorter) and CenterCrop(size) leave.

    Returns:
        (top, left, bottom, right) in pixels of the image before it is resized.
    """
    least = min(height, width)
    new_height, new_width = height * shorter // least, width * shorter // least
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    down, across = height / new_height, width / new_width
    return top * down, left * across, (top + size) * down, (left + size) * across

"""One image made small: what is left of it as a JPEG."""

from __future__ import annotations

import io

from fastmerge.data.decoding import read_image


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
        with open(file, "rb") as stream:
            return stream.read(), True
    image = read_image(file, draft=(2 * size, 2 * size))
    least = min(image.size)
    if least > size:
        width, height = (round(side * size / least) for side in image.size)
        image = image.resize((width, height), Resampling.LANCZOS)
    written = io.BytesIO()
    image.save(written, "JPEG", quality=quality)
    return written.getvalue(), False


def begins_and_ends(file: str) -> bool:
    """Whether a file has the markers between which a JPEG lies."""
    with open(file, "rb") as stream:
        begins = stream.read(2)
        stream.seek(-2, 2)
        return begins == b"\xff\xd8" and stream.read(2) == b"\xff\xd9"


def _is_small_jpeg(file: str, size: int) -> bool:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            upright = image.getexif().get(0x112, 1) == 1
            small = image.format == "JPEG" and image.mode == "RGB" and upright and min(image.size) <= size
        return small and begins_and_ends(file)
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError):
        return False  # reading it whole will say what is wrong

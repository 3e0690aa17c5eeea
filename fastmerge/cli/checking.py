"""Checks of a data set's images, with a bar of how far they are."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from fastmerge.data.checking import Check, CheckedImages, check_images
from fastmerge.data.decoding import OnBadImage


def checked_with_bar(
    path: Path,
    check: Check,
    workers: int | None,
    *,
    on_bad_image: OnBadImage,
    quiet: bool,
    found: Callable[[str, str], object] | None = None,
) -> CheckedImages | None:
    """As :func:`~fastmerge.data.checking.check_images`, with a bar on stderr where that is a terminal.

    Args:
        path: of the data.
        check: what is read.
        workers: threads that decode; None is one for each core.
        on_bad_image: what happens in the end where there were files that can't be read.
        quiet: no bar.
        found: called with path and reason of each file that can't be read.
    """
    from tqdm import tqdm

    name = "headers" if check == "headers" else "decode"
    shown = sys.stderr.isatty() and not quiet
    with tqdm(desc=name, unit="img", dynamic_ncols=True, disable=not shown) as bar:

        def tell(done: int, total: int, bad: dict[str, str]) -> None:
            if found is not None and bad:
                bar.clear()  # makes room on the same terminal
                for file, reason in bad.items():
                    found(file, reason)
            bar.total = total
            bar.update(done - bar.n)

        return check_images(path, on_bad_image, tell, check, workers)

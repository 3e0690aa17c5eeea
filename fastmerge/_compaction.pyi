"""The compiled extension of csrc/: what it offers to fastmerge.compaction."""

from collections.abc import Sequence

def compact(
    data: int,
    itemsize: int,
    shape: Sequence[int],
    strides: Sequence[int],
    keeps: Sequence[Sequence[int] | None],
    threads: int = 1,
) -> None: ...
def release(begin: int, end: int) -> None: ...

"""Compaction: rows and columns of a tensor stay, in place, at the front of its storage.

Start with ``plan``: the order in which elements move, and why none is overwritten before it has moved. ``in_place`` holds
the function and its reference, ``gather_triton`` the kernel. CPU tensors go through ``csrc/compact.h`` instead
(``fastmerge.compaction``).
"""

from fastmerge.kernels.compact.in_place import SCRATCH_BYTES, compact, compact_reference
from fastmerge.kernels.compact.plan import memory_order

__all__ = ["SCRATCH_BYTES", "compact", "compact_reference", "memory_order"]

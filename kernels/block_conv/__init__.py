"""Convolutions of several networks at once, each pass by the implementation that was measured to be fastest.

Start with ``formulas``: what is computed, the reference, and what the kernels refuse. ``conv2d`` holds the functions; what
autograd and torch.compile see of them is ``ops``. ``passes`` lists the candidates of a ``problem``'s forward pass, input
gradient and weight gradient, ``choice`` times them, and ``cache`` keeps the winners. ``layouts`` says how tensors lie, and
``arithmetic`` what float32 is multiplied in.

Candidates are cuDNN (``cudnn``) and an implicit GEMM in Triton: ``launch_triton`` launches ``correlate_triton`` (forward pass,
input gradient) and ``wgrad_triton`` on the boxes of ``boxes_triton``, in the tile shapes of ``tiles``.
"""

from fastmerge.kernels.block_conv.choice import choice_table, fixed_choice, set_measuring
from fastmerge.kernels.block_conv.conv2d import (
    LiveBlocks,
    block_diagonal_conv2d,
    block_sparse_conv2d,
    grouped_conv2d,
    live_blocks,
)

__all__ = [
    "LiveBlocks",
    "block_diagonal_conv2d",
    "block_sparse_conv2d",
    "choice_table",
    "fixed_choice",
    "grouped_conv2d",
    "live_blocks",
    "set_measuring",
]

"""BatchNorm with what follows it as one operation: residual add, activation, max-pooling, gate.

Start with ``formulas``: what is computed, and the reference. ``act`` decides what runs a call: the C++ extension on a CPU
(``cpu``), Triton on CUDA, by way of custom operators (``ops``, ``pool_ops``) where a tracer looks on.

In Triton the forward pass is ``statistics_triton``, then ``forward_triton`` or ``pool_triton``; the backward pass is
``sums_triton``, then ``backward_triton`` or ``unpool_triton``. All walk their tensors as ``tiles`` cuts them and
``walk_triton`` reads them.
"""

from fastmerge.kernels.batch_norm.act import batch_norm_act, batch_norm_act_streams, why_not_fused
from fastmerge.kernels.batch_norm.formulas import (
    ACTIVATIONS,
    batch_norm_act_pool_reference,
    batch_norm_act_reference,
    joined_of,
)
from fastmerge.kernels.batch_norm.pool import batch_norm_act_pool

__all__ = [
    "ACTIVATIONS",
    "batch_norm_act",
    "batch_norm_act_pool",
    "batch_norm_act_pool_reference",
    "batch_norm_act_reference",
    "batch_norm_act_streams",
    "joined_of",
    "why_not_fused",
]

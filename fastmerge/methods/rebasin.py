"""Git Re-Basin: the teachers' channels are matched, then averaged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from fastmerge.methods.average import average
from fastmerge.methods.matching import align
from fastmerge.methods.registry import register
from fastmerge.methods.samples import family_of


@register("rebasin", needs="weights", source="S. Ainsworth et al., Git Re-Basin (arXiv 2209.04836)")
def rebasin(
    teachers: Sequence[nn.Module],
    batches: Iterable[Any],
    *,
    by: str = "weights",
    samples: int = 512,
    seed: int = 0,
) -> nn.Module:
    """The mean of the weights, with channels matched to the first teacher's by a linear assignment.

    Args:
        teachers: two or more.
        batches: of the data; of weights alone, an example of the inputs.
        by: "weights": the inner product of the parameters is made as large as can be; "activations": the sum of the
            correlations of what layers read.
        samples: for activations.
        seed: of the order in which groups are matched by weights.

    Source: S. Ainsworth et al., Git Re-Basin (arXiv 2209.04836).
    """
    family = family_of(teachers, batches, samples if by == "activations" else 2)
    return average(align(family, by, seed))

"""What one linked big student has learned, put into another of the same teachers that has other candidates left."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastmerge.wide.network import Along, Layout, candidates_along
from fastmerge.wide.population import Population


@torch.no_grad()
def carry_over(layout: Layout, networks: Sequence[nn.Module], populations: Sequence[Population]) -> None:
    """Copies weights and statistics of all candidates that both have.

    Args:
        layout: of both.
        networks: the wide modules of the one that has learned, and of the one that takes over; both linked.
        populations: who is left in them.
    """
    source, target = ({**dict(n.named_parameters()), **dict(n.named_buffers())} for n in networks)
    assert [*populations[0].groups] == [*populations[1].groups]
    for name, dims in candidates_along(networks[0], layout, populations[0].groups):
        pairs = {along.dim: _both(populations, along) for along in dims}
        own, taken = source[name].detach().to(target[name].device), target[name]
        if not pairs:
            taken.copy_(own)
            continue
        (first, (old, new)), *rest = pairs.items()
        piece, place = own.index_select(first, old.to(own.device)), new
        for second, (old, new) in rest:
            piece = piece.index_select(second, old.to(own.device))
            into = taken.index_select(first, place.to(taken.device))
            piece = into.index_copy_(second, new.to(taken.device), piece)
        taken.index_copy_(first, place.to(taken.device), piece)


def _both(populations: Sequence[Population], along: Along) -> tuple[Tensor, Tensor]:
    """Where entries that both have lie in the one, and where in the other: int64."""
    assert not along.in_blocks
    left = [along.left(population).flatten() for population in populations]
    both = left[0] & left[1]
    old, new = ((each.cumsum(0) - 1)[both] for each in left)
    return old, new

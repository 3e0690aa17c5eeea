"""What one linked big student has learned, put into another of the same teachers that has other candidates left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fastmerge.channels.groups import AxisUnits
from fastmerge.wide.layers import WideLayer
from fastmerge.wide.network import Layout
from fastmerge.wide.population import Population

Pair = tuple[Tensor, Tensor]  # int64: where entries lie in the one, and where in the other
Along = tuple[int, AxisUnits, int | None]  # a dimension, what lies along it, and of which teacher, or None for all


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
    for name, along in _tensors(layout, networks[0], populations[0]):
        pairs = {dim: _both(populations, units, teacher) for dim, units, teacher in along}
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


def _tensors(layout: Layout, network: nn.Module, population: Population) -> Iterator[tuple[str, list[Along]]]:
    """The tensors of a linked network, and what lies along their dimensions."""
    groups = population.groups
    for weight, path in layout.layers.items():
        wide = network.get_submodule(path)
        assert isinstance(wide, WideLayer)
        assert wide.linked or not wide.wiring.has_off_diagonal
        along: list[Along] = []
        if wide.wiring.writes_streams:
            along.append((wide.geometry.out_dim, groups.outputs[weight], None))
        if wide.wiring.reads_streams:
            along.append((wide.geometry.in_dim, groups.inputs[weight], None))
        yield f"{path}.weight", along
        if wide.bias is not None:
            yield f"{path}.bias", [(0, groups.outputs[weight], None)] if wide.wiring.writes_streams else []
    for name, place in layout.side_by_side.items():
        dim, units = groups.tensors.get(name, (None, None))
        yield place, [] if dim is None or units is None else [(0, units, None)]
    for place in layout.averaged.values():
        yield place, []
    for name, places in layout.per_teacher.items():
        dim, units = groups.tensors.get(name, (None, None))
        for teacher, place in enumerate(places):
            yield place, [] if dim is None or units is None else [(dim, units, teacher)]


def _both(populations: Sequence[Population], units: AxisUnits, teacher: int | None) -> Pair:
    """Where the entries lie that both have."""
    left = [population.is_left(units) for population in populations]
    both = left[0] & left[1]
    if teacher is None:
        old, new = (population.joined(units)[both] for population in populations)
    else:
        old, new = (population.in_stream(units)[teacher][both[teacher]] for population in populations)
    return old, new

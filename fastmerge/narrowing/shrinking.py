"""Big students with fewer candidates: what drops them, and what takes over from another that has others left.

Weights, statistics, gates and optimizer state shrink together, in their own memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastmerge.compaction import compact_, is_compactable, set_data
from fastmerge.gates import HardConcrete
from fastmerge.narrowing.cuts import SCRATCH_ELEMENTS
from fastmerge.narrowing.optimizer_state import check_state, is_per_element
from fastmerge.wide.network import Along, Layout, candidates_along
from fastmerge.wide.population import Population


@dataclass(frozen=True)
class Move:
    """What stays of a tensor.

    Attributes:
        rows: int64, ascending, along dimension 0; None for all.
        columns: int64, ascending, along dimension 1; None for all. Of a tensor of T blocks of rows (T, columns), each
            teacher's own.
        further: int64, ascending, along a dimension after these, and which; it is copied.
    """

    rows: Tensor | None
    columns: Tensor | None = None
    further: tuple[int, Tensor] | None = None

    @property
    def is_nothing(self) -> bool:
        return self.rows is None and self.columns is None and self.further is None

    def apply(self, tensor: Tensor) -> None:
        """Shrinks a tensor; the object stays. Memory that something else uses too is left to it, and the tensor copied."""
        if self.further is not None:
            dim, index = self.further
            set_data(tensor, tensor.detach().index_select(dim, index.to(tensor.device)))
            return
        if not is_compactable(tensor):
            set_data(tensor, tensor.detach().clone())
        rows = torch.arange(tensor.shape[0]) if self.rows is None else self.rows
        if self.columns is None or self.columns.dim() == 1:
            compact_(tensor, rows, self.columns)
            return
        compact_(tensor, rows)
        count = self.columns.shape[1]
        for block, columns in zip(tensor.detach().chunk(len(self.columns)), self.columns, strict=True):
            columns = columns.to(tensor.device)
            for part in block.split(max(1, SCRATCH_ELEMENTS // max(1, block[:1].numel()))):
                part[:, :count] = part.index_select(1, columns)
        del block, part
        compact_(tensor, torch.arange(tensor.shape[0]), torch.arange(count))


class Shrinking:
    """From one population of a network to a smaller one.

    Everything is planned and checked here, before anything changes.

    Args:
        network: the wide modules.
        layout: where the teachers' tensors lie in it.
        gates: one per group.
        before: who is there.
        after: who stays; of a layer that is not linked, as many of each teacher.
        optimizers: whose state shrinks along.

    Raises:
        ValueError: an optimizer holds none of the parameters, or keeps something for one that can't be cut like it.
    """

    def __init__(
        self,
        network: nn.Module,
        layout: Layout,
        gates: nn.ModuleDict,
        before: Population,
        after: Population,
        optimizers: Sequence[Optimizer],
    ) -> None:
        self.network, self.layout, self.gates = network, layout, gates
        self.before, self.after, self.optimizers = before, after, optimizers
        names: dict[Tensor, str] = {p: name for name, p in [*network.named_parameters(), *gates.named_parameters()]}
        for optimizer in optimizers:
            check_state("compact", optimizer, names)
        self._moves: list[tuple[Tensor, Move]] = []
        tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        for name, dims in candidates_along(network, layout, before.groups):
            kept = {along.dim: self._stay(along) for along in dims}
            further = next(((dim, index) for dim, index in kept.items() if dim > 1 and index is not None), None)
            self._add(tensors[name], Move(kept.get(0), kept.get(1), further))
        for name, gate in gates.items():
            assert isinstance(gate, HardConcrete)
            stays = torch.isin(before.candidates[name], after.candidates[name])
            self._add(gate.loc, Move(None if bool(stays.all()) else stays.nonzero().flatten()))

    def apply(self) -> None:
        """Does it."""
        with torch.no_grad():
            for tensor, move in self._moves:
                states = self._states_of(tensor)
                move.apply(tensor)
                for value in states:
                    move.apply(value)
            for name, gate in self.gates.items():
                assert isinstance(gate, HardConcrete)
                gate.candidates = self.after.candidates[name].to(gate.loc.device)
                gate.channels = len(gate.candidates)

    def _add(self, tensor: Tensor, move: Move) -> None:
        if not move.is_nothing and not any(tensor is other for other, _ in self._moves):
            self._moves.append((tensor, move))

    def _stay(self, along: Along) -> Tensor | None:
        """Of the entries that lie along a dimension now, those that stay, in blocks each teacher's; None for all."""
        before, after = along.left(self.before), along.left(self.after)
        if torch.equal(before, after):
            return None
        if along.in_blocks:
            return torch.stack([new[old].nonzero().flatten() for old, new in zip(before, after, strict=True)])
        return after[before].nonzero().flatten()

    def _states_of(self, tensor: Tensor) -> list[Tensor]:
        """What the optimizers keep for each element of a parameter."""
        entries = [optimizer.state.get(tensor, {}) for optimizer in self.optimizers]
        return [value for entry in entries for value in entry.values() if is_per_element(tensor, value)]


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

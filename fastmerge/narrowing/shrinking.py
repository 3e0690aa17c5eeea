"""Big students with fewer candidates: which groups may lose some, what drops them, and what takes over from another.

Dropping channels changes the sizes of the tensors that the teachers' code handles. That is safe where the code treats each
channel alone, whatever their number (``lowering.values`` has the list), and not where it moves channels about, splits them or
names their number: such groups are left whole. Weights, statistics, gates and optimizer state shrink together, in their own
memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from fastmerge.channels.aten import LAYER_NORMS, MOVEMENTS, RESHAPES, is_pointwise, is_size, op_name, writes_in_place
from fastmerge.channels.layer_calls import LayerCall
from fastmerge.channels.traced_network import module_path
from fastmerge.compaction import compact_, is_compactable, set_data
from fastmerge.gates import HardConcrete
from fastmerge.lowering.graph import stays_joined
from fastmerge.lowering.values import JoinedCall, Placement, is_flattening, joined_call
from fastmerge.narrowing.cuts import SCRATCH_ELEMENTS
from fastmerge.narrowing.optimizer_state import check_state, is_per_element
from fastmerge.wide.analysis import Analysis
from fastmerge.wide.layers import is_depthwise
from fastmerge.wide.network import Along, Layout, candidates_along
from fastmerge.wide.population import Population
from fastmerge.wide.streams import concatenate_joined


@dataclass
class Shrinkable:
    """What is known of the groups, by number.

    Attributes:
        whole: groups that can't lose channels, and why.
        even: groups of which every teacher must keep as many, even when linked.
    """

    whole: dict[int, str] = field(default_factory=dict)
    even: set[int] = field(default_factory=set)


def find_shrinkable(
    analysis: Analysis, network: nn.Module, population: Population, views_follow: bool = False
) -> Shrinkable:
    """Follows every group's channels through both graphs.

    Args:
        analysis: of the first teacher.
        network: the wide modules.
        population: the channels that are left.
        views_follow: whether a view that flattens, with a number of channels in it, is taken for one without.
    """
    found = Shrinkable()
    for mode in analysis.traced.graphs:
        _Walk(analysis, mode, population.num_teachers, found, views_follow).run()
        if not stays_joined(analysis, network, mode, population):
            found.even.update(range(len(analysis.groups)))
    return found


class _Walk:
    def __init__(self, analysis: Analysis, mode: str, num_teachers: int, found: Shrinkable, views_follow: bool) -> None:
        self.analysis, self.mode = analysis, mode
        self.num_teachers, self.found, self.views_follow = num_teachers, found, views_follow
        self.streams = analysis.streams(mode)
        self.places: dict[fx.Node, Placement] = {}
        self.carried: dict[fx.Node, set[int]] = {}  # groups whose channels a value holds, or whose number it tells

    def run(self) -> None:
        for node in self.analysis.traced.graphs[self.mode].nodes:
            self.carried[node] = set().union(*(self.carried[source] for source in node.all_input_nodes))
            call = self.analysis.calls[self.mode].get(node)
            if call is not None:
                self._layer(node, call)
            elif node.op == "output":
                self._leave_whole(self.carried[node], "is returned by the network")
            elif is_size(node):
                self.carried[node] = set()  # of a dimension that is not the channels'
            elif node in self.streams:
                self._operation(node)

    def _leave_whole(self, groups: set[int], why: str) -> None:
        for group in groups:
            self.found.whole.setdefault(group, why)

    def _layer(self, node: fx.Node, call: LayerCall) -> None:
        reads = {*self.analysis.groups.reads[self.mode, node.name].numbers}
        writes = {*self.analysis.groups.outputs[call.weight].numbers}
        place, shape = self.places.get(call.input), self.analysis.shapes.get((self.mode, node.name))
        dim = call.geometry.channel_dim
        # a student of another width has as many blocks as places; compact() leaves each teacher's blocks what they are
        depthwise = is_depthwise(call.groups, call.operand.meta["shape"])
        by_channel = call.is_plain and (depthwise or (self.views_follow and call.groups > 1 and dim == 1))
        by_channel = by_channel and call.geometry.kind == "conv" and self.carried[node] == writes
        if by_channel and self.analysis.is_wide(self.mode, node) and place is not None and place.dim == dim:
            self.places[node] = place if depthwise or shape is None else Placement(dim, shape[dim], len(shape))
            self.found.even.update(self.carried[node] | writes)
            return
        if call.groups > 1:
            self._leave_whole(self.carried[node] | reads | writes, f"passes the grouped convolution '{call.name}'")
        elif reads and (place is None or place.dim != dim % place.rank):
            self._leave_whole(self.carried[node] | reads, f"lies among other dimensions where '{call.name}' reads it")
        if writes and shape is not None:
            self.places[node] = Placement(dim % len(shape), shape[dim], len(shape))
        self.carried[node] = writes

    def _operation(self, node: fx.Node) -> None:
        carried = self.carried[node]
        if node.op == "get_attr":
            if self.analysis.groups.acts_on_several(str(node.target)):
                return  # as many values however many channels are left
            if str(node.target) in self.analysis.groups.tensors:
                carried |= {*self.analysis.groups.tensors[str(node.target)][1].numbers}
            if str(node.target) in self.analysis.held:
                return  # a wide module's, which is cut as its channels are
            if carried and (place := self._place_of(node)) is not None:  # each teacher's own, cut where it is read
                self.places[node] = place
                self.found.even.update(carried)
                return
        shape = self.analysis.shapes.get((self.mode, node.name))
        norm = self.analysis.norms[self.mode].get(node)
        if norm is not None:
            place = self.places.get(norm.input)
            if place is not None and place.dim == 1:
                self.places[node] = place
                self.found.even.update(carried if norm.momentum is None else ())
                return
        elif op_name(node) in {*LAYER_NORMS, "embedding"} and shape is not None and self._is_by_channel(node):
            self.places[node] = Placement(len(shape) - 1, shape[-1], len(shape))
            self.found.even.update(carried)  # run per stream
            return
        elif self.views_follow and op_name(node) == "group_norm" and shape is not None:
            place = self.places.get(node.args[0])  # type: ignore[arg-type]
            if place is not None and place.dim == 1:  # each of its groups is within one place
                self.places[node] = Placement(1, shape[1], len(shape))
                return
        elif node.op != "get_attr":
            operands = {source: self.places[source] for source in node.all_input_nodes if source in self.places}
            call = joined_call(node, operands, shape, self.num_teachers)
            if call is None and self.views_follow and is_flattening(node) and shape is not None:
                place = self.places.get(node.args[0])  # type: ignore[arg-type]
                call = JoinedCall(Placement(1, shape[1], 2)) if place is not None and place.dim == 1 else None
            if call is not None:
                self.places[node] = call.placement
                if call.call is not None and call.call[0] is concatenate_joined:
                    self.found.even.update(carried)
                return
            place = None if shape is None else self._broadcast(node, operands, shape) or self._moved(node, operands)
            if place is not None:
                self.places[node] = place
                self.found.even.update(carried)  # run per stream
                return
        self._leave_whole(carried, f"passes {_describe(node)}, which may count on the number of channels")

    def _broadcast(self, node: fx.Node, operands: dict[fx.Node, Placement], shape: tuple[int, ...]) -> Placement | None:
        """Where the channels lie in what an operation makes element by element of tensors of several ranks; None if not so."""
        from_the_right = {place.rank - place.dim for place in operands.values()}
        if not is_pointwise(op_name(node)) or len(from_the_right) != 1:
            return None
        (back,) = from_the_right
        for source in node.all_input_nodes:
            if source not in operands and not is_size(source):
                other = self.analysis.shapes.get((self.mode, source.name))
                if self.carried[source] or other is None or (len(other) >= back and other[-back] != 1):
                    return None
        return Placement(len(shape) - back, shape[-back], len(shape))

    def _moved(self, node: fx.Node, operands: dict[fx.Node, Placement]) -> Placement | None:
        """Where an operation that moves values leaves the channels, tried with fewer of them; None if it names their number."""
        if len(operands) != 1 or op_name(node) not in {*MOVEMENTS, *RESHAPES, "flatten"} or writes_in_place(node):
            return None
        ((source, place),) = operands.items()
        numbers = torch.arange(math.prod(self.analysis.shapes[self.mode, source.name]), device="cpu")
        numbers = numbers.view(self.analysis.shapes[self.mode, source.name])
        found = set()
        for left in (torch.arange(0, place.channels, 2, device="cpu"), torch.arange(place.channels - 1, device="cpu")):
            try:
                whole, part = (
                    node.target(*(x if a is source else self._number(a) for a in node.args), **node.kwargs)  # type: ignore[operator]
                    for x in (numbers, numbers.index_select(place.dim, left))
                )
            except (RuntimeError, IndexError, TypeError, ValueError):
                return None
            if not isinstance(whole, Tensor) or whole.dim() != part.dim():
                return None
            dims = [d for d in range(whole.dim()) if whole.shape[d] == place.channels and part.shape[d] == len(left)]
            found.add(next((d for d in dims if torch.equal(whole.index_select(d, left), part)), None))
        dim = found.pop()
        return None if found or dim is None else Placement(dim, place.channels, whole.dim())

    def _number(self, argument: Any) -> Any:
        """An argument with sizes in the place of the nodes that compute them.

        Raises:
            ValueError: one is a tensor.
        """
        if isinstance(argument, (list, tuple)):
            return [self._number(a) for a in argument]
        if not isinstance(argument, fx.Node):
            return argument
        if op_name(argument) == "sym_size":
            source, dim = argument.args
            return self.analysis.shapes[self.mode, source.name][dim]  # type: ignore[union-attr,index]
        if not is_size(argument):
            raise ValueError(f"{argument} is a tensor")
        return argument.target(*map(self._number, argument.args))  # type: ignore[operator]

    def _place_of(self, node: fx.Node) -> Placement | None:
        """Where the channels lie in a parameter or buffer, if it can be cut along them."""
        name = str(node.target)
        dim, units = self.analysis.groups.tensors[name]
        if dim is None or name in self.analysis.averaged:
            return None
        return Placement(dim, len(units.group), len(node.meta["shape"]))

    def _is_by_channel(self, node: fx.Node) -> bool:
        """Whether an embedding, or a layer normalisation by gates, has its channels in the last dimension and nowhere else."""
        if op_name(node) == "embedding":
            place = self.places.get(node.args[0])  # type: ignore[arg-type]
            return place is not None and place.dim == place.rank - 1
        units = self.analysis.groups.reads.get((self.mode, node.name))
        x, *parameters = (self.places.get(source) for source in node.all_input_nodes if not is_size(source))
        last, gated = x is not None and x.dim == x.rank - 1, units is not None and bool(units.numbers)
        return last and gated and all(p is not None and p.rank == 1 for p in parameters)


def _describe(node: fx.Node) -> str:
    name = str(node.target) if node.op == "get_attr" else op_name(node) or node.name
    return f"'{name}' in '{module_path(node)}'"


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
        rows = torch.arange(tensor.shape[0], device="cpu") if self.rows is None else self.rows
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
        compact_(tensor, torch.arange(tensor.shape[0], device="cpu"), torch.arange(count, device="cpu"))


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

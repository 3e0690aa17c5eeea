"""From the big student to one teacher's size: every tensor cut down to the candidates that are kept.

Where a class's code counts on the teachers' widths, the student is its traced graphs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fastmerge.channels.aten import LAYER_NORMS, LAYERS, bind, op_name
from fastmerge.channels.groups import AxisUnits, ChannelGroups
from fastmerge.channels.traced_network import TracedNetwork
from fastmerge.isolation import undisturbed
from fastmerge.lowering.programs import function_of
from fastmerge.lowering.values import is_flattening
from fastmerge.narrowing.cuts import (
    BlockSelection,
    Cut,
    Joined,
    OneTeachers,
    Part,
    Selection,
    Sums,
    WeightedMean,
    Whole,
)
from fastmerge.wide.layers import WideLayer
from fastmerge.wide.network import Layout
from fastmerge.wide.population import Population, runs


@dataclass(frozen=True)
class Sources:
    """For each index along a student's dimension, where it comes from.

    Attributes:
        teacher: int64, which teacher.
        index: int64, the index along that teacher's dimension.
        common: bool, whether every teacher has it (network input) instead of one.
    """

    teacher: Tensor
    index: Tensor
    common: Tensor

    @property
    def owner(self) -> Tensor:
        """The teacher, or -1 for all."""
        return torch.where(self.common, -1, self.teacher)


def sources_of(units: AxisUnits, groups: ChannelGroups, kept: Mapping[str, Tensor]) -> Sources:
    """Fills each place of a dimension with the indices of the candidate that was kept for it, in order.

    Where other numbers of candidates are kept than a teacher has channels, the dimension is that much shorter or longer; there
    the places lie in order, which ``check_widths`` has checked.
    """
    group, index, resized = torch.from_numpy(units.group), torch.arange(len(units.group), device="cpu"), {}
    teacher = torch.zeros_like(index)
    for number in units.numbers:
        size, candidates = groups[number].size, kept[groups[number].name].cpu()
        if len(candidates) != size:
            resized[number] = size, candidates
            continue
        by_place = torch.from_numpy(units.places(number, size))
        teacher[by_place] = (candidates // size)[:, None]
        index[by_place] = by_place[candidates % size]
    if not resized:
        return Sources(teacher, index, group < 0)
    parts = []
    for number, start, end in runs(units):
        if number in resized:
            size, candidates = resized[number]
            chosen = torch.arange(start, end, device="cpu").view(size, -1)[candidates % size]
            owner = (candidates // size)[:, None].expand_as(chosen)
            parts.append(
                (owner.flatten(), chosen.flatten(), torch.zeros(chosen.numel(), dtype=torch.bool, device="cpu"))
            )
        else:
            parts.append((teacher[start:end], index[start:end], group[start:end] < 0))
    return Sources(*(torch.cat(each) for each in zip(*parts, strict=True)))


class Compressor:
    """Cuts the tensors of a wide network down to the kept channels.

    Args:
        network: the wide modules.
        layout: where the teachers' tensors lie in it.
        kept: per group the candidates to keep.
        population: those that are left in the network.

    Attributes:
        sources: per parameter or buffer of the student, the wide tensors it is cut from.
        magnitudes: per magnitude of a normalised weight, the norm of what was cut, the weight and its norms' dimension.
    """

    def __init__(self, network: nn.Module, layout: Layout, kept: Mapping[str, Tensor], population: Population) -> None:
        self.groups, self.kept, self.population = population.groups, kept, population
        self.sources: dict[str, list[Tensor]] = {}
        self.magnitudes = layout.magnitudes
        self._cuts: dict[str, Cut] = {}
        tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        for weight, path in layout.layers.items():
            wide = network.get_submodule(path)
            assert isinstance(wide, WideLayer)
            self.sources[weight], self._cuts[weight] = [wide.weight], self._weight(wide, weight)
            if wide.bias is not None:
                bias = layout.biases[weight]
                self.sources[bias], self._cuts[bias] = [wide.bias], self._bias(wide, weight)
        for name, place in layout.side_by_side.items():
            self.sources[name], self._cuts[name] = [tensors[place]], self._side_by_side(name)
        for name, place in layout.averaged.items():
            self.sources[name], self._cuts[name] = [tensors[place]], Whole()
        for name, places in layout.per_teacher.items():
            self.sources[name] = [tensors[place] for place in places]
            self._cuts[name] = self._per_teacher(name, self.sources[name])
        uses = Counter(id(tensor) for sources in self.sources.values() for tensor in sources)
        self._alone = {name: all(uses[id(t)] == 1 for t in sources) for name, sources in self.sources.items()}

    def cut_all(self, in_place: bool) -> dict[str, Tensor]:
        """The student's parameters and buffers by name, one after another in their sources' memory if ``in_place``."""
        tensors = {name: self.cut(name, sources, in_place) for name, sources in self.sources.items()}
        for magnitude, (weight, dim) in self.magnitudes.items():
            tensors[magnitude] = torch.norm_except_dim(tensors[weight], 2, dim)
            # where all is zero any direction will do, but none of length zero
            tensors[weight] += tensors[magnitude] == 0
        return tensors

    def cut(self, name: str, sources: Sequence[Tensor], in_place: bool) -> Tensor:
        """A parameter or buffer of the student, or what an optimizer keeps for each of its elements.

        Args:
            name: of the parameter or buffer.
            sources: its :attr:`sources`, or tensors that belong to them, of the same shapes.
            in_place: whether their memory is used up.
        """
        cut = self._cuts[name]
        return cut.take(sources) if in_place and self._alone[name] else cut.copy(sources)

    def _weight(self, wide: WideLayer, name: str) -> Cut:
        geometry, wiring = wide.geometry, wide.wiring
        outputs, inputs = self.groups.outputs[name], self.groups.inputs[name]
        rows, columns = (sources_of(units, self.groups, self.kept) for units in (outputs, inputs))
        if wiring.has_off_diagonal and not wide.linked:
            swapped = geometry.out_dim != 0
            first, second = (columns, rows) if swapped else (rows, columns)
            along_first, along_second = (inputs, outputs) if swapped else (outputs, inputs)
            lie = self.population.joined(along_first), self.population.in_stream(along_second)
            return BlockSelection(lie[0][:, first.index], first.owner, lie[1][:, second.index], second.owner)
        selected: dict[int, Tensor] = {}
        if wiring.writes_streams:
            selected[geometry.out_dim] = self._positions(outputs, rows)
        if not wiring.reads_streams:
            return Selection(selected.get(0), selected.get(1)) if selected else Whole()
        selected[geometry.in_dim] = self._positions(inputs, columns)
        summed = columns.common.nonzero().flatten()
        every = self.population.joined(inputs)[:, columns.index[summed]]
        return Selection(
            selected.get(0), selected.get(1), Sums(geometry.in_dim, summed, every) if len(summed) else None
        )

    def _positions(self, units: AxisUnits, sources: Sources) -> Tensor:
        """Where a student's entries lie in a tensor of all teachers'."""
        return self.population.joined(units)[sources.teacher, sources.index]

    def _bias(self, wide: WideLayer, weight: str) -> Cut:
        if not wide.wiring.writes_streams:
            return Whole()
        units = self.groups.outputs[weight]
        return Selection(self._positions(units, sources_of(units, self.groups, self.kept)))

    def _side_by_side(self, name: str) -> Cut:
        """From the teachers' tensors along the first dimension."""
        if name not in self.groups.tensors:  # a counter of each teacher
            return Part(0)
        dim, units = self.groups.tensors[name]
        sources, size = sources_of(units, self.groups, self.kept), len(units.group)
        if dim is None:
            return Part(int(sources.teacher[0]) * size, size)
        assert dim == 0, name
        return Selection(self._positions(units, sources))

    def _per_teacher(self, name: str, parts: Sequence[Tensor]) -> Cut:
        if name not in self.groups.tensors:  # a counter, the same for all
            assert not parts[0].is_floating_point(), name
            return OneTeachers(0)
        dim, units = self.groups.tensors[name]
        sources = sources_of(units, self.groups, self.kept)
        if self.groups.acts_on_several(name):
            counts = torch.bincount(sources.teacher, minlength=len(parts))
            return WeightedMean(counts.double() / len(sources.teacher))
        if dim is None:
            return OneTeachers(int(sources.teacher[0]))
        return Joined(self._positions(units, sources), dim)


class TracedStudent(nn.Module):
    """Runs a network's traced operations over tensors of other widths, by the names that the network's own have.

    Args:
        network: of the teachers' class, with the tensors; its own code is not run.
        traced: the graphs of a teacher.
    """

    def __init__(self, network: nn.Module, traced: TracedNetwork) -> None:
        super().__init__()
        for name, module in [*network.named_children(), *traced.with_root(nn.Module()).root.named_children()]:
            self.add_module(name, module)
        for name, parameter in network.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in network.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self._traced = traced.with_root(nn.Module())
        self.training = network.training
        self._compile()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network gives; inputs are of the structure that it was traced with."""
        mode = "train" if self.training else "eval"
        return self._traced.structured(self._forwards[mode](self, *self._traced.flat(args, kwargs)), mode)

    def extra_repr(self) -> str:
        return f"{self._traced.name}, traced"

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {key: value for key, value in state.items() if key != "_forwards"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._compile()

    def _compile(self) -> None:
        self._forwards = {
            mode: function_of(self._flexible(mode), f"{mode} forward of a traced student")
            for mode in self._traced.graphs
        }

    def _flexible(self, mode: str) -> fx.Graph:
        """A graph whose views have no number of channels in them."""
        graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        for node in self._traced.graphs[mode].nodes:
            if is_flattening(node):
                copied[node] = graph.call_function(torch.flatten, (copied[node.args[0]], 1))
            else:
                copied[node] = _of_any_width(graph.node_copy(node, copied.__getitem__), node)
        return graph


def _of_any_width(new: fx.Node, node: fx.Node) -> fx.Node:
    """A copied operation that asks its operands for numbers of channels, in place of those of the network that was traced."""
    graph, name, arguments = new.graph, op_name(node), list(new.args)
    if name not in {*LAYER_NORMS, "group_norm", *LAYERS} or (name in LAYERS and bind(node).get("groups", 1) == 1):
        return new
    with graph.inserting_before(new):
        if name in LAYER_NORMS:
            *outer, _ = bind(node)["normalized_shape"]
            arguments[1] = [*outer, graph.call_function(torch.ops.aten.sym_size.int, (arguments[0], -1))]
        elif name == "group_norm":
            each = node.args[0].meta["shape"][1] // bind(node)["num_groups"]  # type: ignore[union-attr]
            arguments[1] = graph.call_function(_blocks, (arguments[0], 1, each))
        else:
            rows, groups = bind(node)["weight"].meta["shape"][0], bind(node)["groups"]
            place = list(bind(node)).index("groups")
            arguments[place] = graph.call_function(_blocks, (arguments[1], 0, rows // groups))
    new.args = tuple(arguments)
    return new


def _blocks(x: Tensor, dim: int, size: int) -> int:
    return x.shape[dim] // size


def runs_at_its_width(network: nn.Module, traced: TracedNetwork) -> bool:
    """Whether a network's own code does at the widths of its tensors what was traced, on inputs of the traced shapes."""
    like = next(network.parameters())
    inputs = pytree.tree_map_only(Tensor, lambda x: _filled(x, like), traced.inputs)

    def outputs_of(module: nn.Module, mode: str) -> list[Any]:
        args, kwargs = pytree.tree_unflatten(pytree.tree_map_only(Tensor, torch.clone, inputs), traced.in_spec)
        torch.default_generator.manual_seed(0)
        return pytree.tree_leaves(module.train(mode == "train")(*args, **kwargs))

    with undisturbed([*network.parameters(), *inputs]):
        for mode in ("eval", "train"):
            try:
                found = outputs_of(network, mode)
            except Exception:  # whatever the user's forward raises
                return False
            if [tuple(y.shape) if isinstance(y, Tensor) else None for y in found] != traced.output_shapes(mode):
                return False
            # a group normalisation without parameters has as many groups as the code names, at any width
            if mode == "eval" and not all(map(_is_close, found, outputs_of(TracedStudent(network, traced), mode))):
                return False
    return True


def _filled(x: Tensor, like: Tensor) -> Tensor:
    """Values for an input that is described: by chance where they may be fractions, else zeros."""
    if not x.is_floating_point():
        return torch.zeros_like(x, device=like.device)
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(like.device, x.dtype)


def _is_close(y: Any, expected: Any) -> bool:
    if not isinstance(y, Tensor) or not y.is_floating_point() or not bool(expected.isfinite().all()):
        return True
    return bool((y - expected).norm() <= torch.finfo(y.dtype).eps ** 0.5 * expected.norm())

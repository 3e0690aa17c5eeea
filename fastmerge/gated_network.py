"""The teachers side by side as one module: built, run with gates, printed and copied."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastmerge.channels.groups import ChannelGroups
from fastmerge.channels.traced_network import Name, samples_in
from fastmerge.gates import GroupMeans, HardConcrete, draw_gates, given_gates
from fastmerge.isolation import ONE_THREAD, without_search
from fastmerge.kernels.gate import open_probability
from fastmerge.lowering.fusion import NormUse
from fastmerge.lowering.programs import Programs
from fastmerge.narrowing.shrinking import find_shrinkable
from fastmerge.self_check import check_exact
from fastmerge.wide.analysis import Analysis
from fastmerge.wide.blueprint import build
from fastmerge.wide.heads import Parts
from fastmerge.wide.layers import WideLayer
from fastmerge.wide.network import attach_missing
from fastmerge.wide.norms import WideBatchNorm
from fastmerge.wide.population import Keep, Population, check_widths, student_widths

if TYPE_CHECKING:
    from typing_extensions import Self  # of typing from Python 3.11


_MOST_PROGRAMS = 64  # that are kept for inputs of other shapes, in one mode each


class GatedNetwork(nn.Module):
    """What a :class:`~fastmerge.BigStudent` is between two steps of its journey: a network to be run and trained.

    Its modules hold what is trained; its programs, made from the teachers' code, run them.

    Args:
        teachers: two or more networks of one architecture.
        example_inputs: what their forward takes, or None to infer it.
        outputs: names of the outputs that are predictions, or None for those that no parameter follows.
        heads: what becomes of the teachers' outputs: their mean, or each teacher's own, in one tensor or in a tuple.
        keep: how many channels of each group the student has, where not as many as a teacher.
        tie_streams: whether channels that a LayerNorm takes together are kept together.
        verify: whether to compare it with the teachers, and with what it compresses to.

    Attributes:
        group_means: means of values of all candidates, per channel group.

    Raises:
        TypeError, ValueError: see :class:`~fastmerge.BigStudent`.
    """

    def __init__(
        self,
        *teachers: nn.Module,
        example_inputs: Any = None,
        outputs: Sequence[Name] | None = None,
        heads: str = "average",
        keep: Keep = None,
        tie_streams: bool = False,
        verify: bool = True,
    ) -> None:
        super().__init__()
        self.heads = heads
        self._blueprint, analysis, self.network, inputs = build(teachers, example_inputs, outputs, heads, tie_streams)
        self.groups: ChannelGroups = self._blueprint.groups
        self.num_teachers = len(teachers)
        self._asked, self.widths = keep, student_widths(self.groups, self.num_teachers, keep)
        like, sizes = next(teachers[0].parameters()), {g.name: self.num_teachers * g.size for g in self.groups}
        self.gates = nn.ModuleDict(
            {name: HardConcrete(size, device=like.device, dtype=like.dtype) for name, size in sizes.items()}
        )
        self._linked = False
        self._gates_open = False
        self._fused: bool | str = "auto"
        self._lower(analysis)
        if not self.is_of_teachers_widths:
            whole = find_shrinkable(analysis, self.network, self._population, views_follow=True).whole
            check_widths(analysis, self._population, self.widths, whole)
        self.train(teachers[0].training)
        if verify:
            check_exact(teachers, self, inputs)

    def forward(self, *inputs: Any, gates: Mapping[str, Tensor] | None = None, **kwargs: Any) -> Any:
        """The teachers' forward, gated: same inputs, same output structure.

        Args:
            gates: by name of the group, gates of its candidates that are left, (candidates,) or (N, candidates), in place of
                those that would be drawn; the output is differentiable in them.

        Raises:
            TypeError: if no input is a tensor.
            ValueError: if the first input has no batch dimension, or given gates are of another shape.
        """
        flat = self._blueprint.flat(inputs, kwargs)
        if not any(isinstance(x, Tensor) for x in flat):
            got = ", ".join(type(x).__name__ for x in flat)
            raise TypeError(f"BigStudent needs a tensor to run on; got {got}. torch.as_tensor(x) makes one of an array")
        matrix = None if self._gates_open and not gates else self._draw_gates(flat, gates)
        each = matrix is None and self._blueprint.each and not self._is_compacted
        way = "train" if self.training else "eval", each, self.linked
        output = self._programs_for(flat).run(way, self.network, matrix, flat)
        return output if self.heads != "separate" else self._parts.split(output, way[0])

    @contextmanager
    def open_gates(self) -> Iterator[Self]:
        """Within this context every gate is 1: until trained, the output is exactly the mean of the teachers' outputs.

        Some networks apply a function after their last layer (SqueezeNet's final ReLU, a log-softmax). Here the mean is taken
        after it; otherwise it is taken in the last layer, since only that mean can be compressed into one network. Outputs of
        whole numbers (an argmax) have no mean: here they are what most teachers say, the least of several.
        """
        before, self._gates_open = self._gates_open, True
        try:
            yield self
        finally:
            self._gates_open = before

    @property
    def fused(self) -> bool | str:
        """Whether each BatchNorm runs as one operation with the add, activation, max-pooling and gate that follow it.

        True, False, or "auto", the default: where there is such an operation, on CUDA devices and, with the C++ extension, on
        CPUs in training mode. The results are the same up to rounding; ``fastmerge.info(big)`` says which normalisations can.
        """
        return self._fused

    @fused.setter
    def fused(self, value: bool | str) -> None:
        if not isinstance(value, bool) and value != "auto":
            raise ValueError(f'BigStudent.fused needs True, False or "auto"; got {value!r}')
        self._fused = value
        for module in self.network.modules():
            if isinstance(module, WideBatchNorm):
                module.fused = value

    def predictions(self, output: Any) -> list[Any]:
        """Picks the predictions from an output of this network, a teacher or the student, run in this network's mode."""
        mode = "train" if self.training else "eval"
        predicted: Collection[int] = self._blueprint.predicted[mode]
        if self.heads == "separate":
            count = self._blueprint.traced.out_specs[mode].num_leaves
            predicted = self._parts.positions(self._blueprint.predicted[mode], count, mode)
        return [leaf for k, leaf in enumerate(pytree.tree_leaves(output)) if k in predicted]

    @property
    def _parts(self) -> Parts:
        parts = self._blueprint.parts
        assert parts is not None
        return parts

    def norms(self) -> tuple[NormUse, ...]:
        """For each call of a normalisation in the training forward, what runs in one operation with it, or why nothing does."""
        return self._programs["train", False, self.linked].norms

    @property
    def linked(self) -> bool:
        """Whether the off-diagonal weights are there and trained."""
        return self._linked or any(layer.linked for layer in self._layers)

    def extra_repr(self) -> str:
        norms = self.norms()
        fused = f", {sum(bool(norm.fused) for norm in norms)} of {len(norms)} normalisations fused" if norms else ""
        linked = "linked" if self.linked else "not linked"
        return f"{self.num_teachers} teachers, {len(self.groups)} channel groups, {linked}{fused}"

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        # compiled from the template's code, and again after loading
        state["_programs"] = state["_other_programs"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lower(self._blueprint.analyse())

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        clone.__dict__.pop("_compiled_call_impl", None)  # it would run this network, not the copy
        return clone

    def open_state(self) -> tuple[Tensor, Tensor]:
        """Of every channel group, in the order of ``groups``, P and the mean of (dP/dloc)², each (G,), in float32 or better.

        P is the mean of P[g > 0]. Candidates that were dropped count as closed.
        """
        opened = self.open_candidates()
        with torch.no_grad():
            slopes = self.group_means((opened * (1 - opened)).square())
        return self.group_means(opened), slopes

    def open_candidates(self, loc: Tensor | None = None) -> Tensor:
        """P[g > 0] of all candidates, one group's after another's, in float32 or better.

        Args:
            loc: (..., candidates), of other big students of these shapes; None: their own.
        """
        gates = self._gate_modules
        loc = torch.cat([gate.loc for gate in gates]) if loc is None else loc
        loc = loc.to(torch.promote_types(loc.dtype, torch.float32))
        return open_probability(loc, beta=gates[0].beta, gamma=gates[0].gamma, zeta=gates[0].zeta)

    @without_search()
    def _lower(self, analysis: Analysis) -> None:
        self._population = Population.of(self.groups, self.num_teachers, self.gates, self.widths)
        wholes = [self.num_teachers * group.size for group in self.groups]
        gates = self._gate_modules = tuple(self._gate(group.name) for group in self.groups)
        self.group_means = GroupMeans([gate.channels for gate in gates], wholes, gates[0].loc.device)
        self._is_compacted = bool(self._population.total < sum(wholes))  # here, for a compiler not to follow it
        self._layers = tuple(module for module in self.network.modules() if isinstance(module, WideLayer))
        self._programs = Programs(analysis, self.network, self._population, self.linked)
        self._other_programs: dict[Any, Programs] = {}  # by shapes of inputs

    def _programs_for(self, inputs: Sequence[Any]) -> Programs:
        """The programs for inputs of a shape: those of the example inputs, or others where the code does something else."""
        dtype, mode = self._gate_modules[0].loc.dtype, "train" if self.training else "eval"
        if dtype == self._blueprint.dtype and self._blueprint.traced.is_for(inputs, mode):
            return self._programs
        known = self._other_programs.get(_key(mode, dtype, inputs, True)) or self._other_programs.get(
            _key(mode, dtype, inputs, False)
        )
        if known is not None:
            return known
        if torch.compiler.is_compiling():
            shapes = ", ".join(str(tuple(x.shape)) for x in inputs if isinstance(x, Tensor))
            raise ValueError(
                f"this big student was compiled or exported before it had seen inputs of shape {shapes} in {dtype}; call it "
                "once on such inputs before"
            )
        with ONE_THREAD:
            analysis, is_open = self._blueprint.analyse_for(inputs, dtype, mode)
            others = self._programs
            if analysis is not None:
                self._check_compacted(analysis)
                attach_missing(self.network, analysis)
                others = Programs(analysis, self.network, self._population, self.linked)
            for of, is_of_any in is_open.items():
                self._other_programs[_key(of, dtype, inputs, is_of_any)] = others
            while len(self._other_programs) > _MOST_PROGRAMS:
                del self._other_programs[next(iter(self._other_programs))]
        return others

    @property
    def is_of_teachers_widths(self) -> bool:
        """Whether the student has as many channels as a teacher everywhere."""
        return all(self.widths[group.name] == group.size for group in self.groups)

    @property
    def target(self) -> float | dict[str, float]:
        """The part of all candidates that the student keeps: 1/T, or by group where it has widths of its own."""
        if self.is_of_teachers_widths:
            return 1 / self.num_teachers
        return {group.name: self.widths[group.name] / (self.num_teachers * group.size) for group in self.groups}

    def shares(self, like: Tensor) -> Tensor | float:
        """:attr:`target`, by group as a tensor (G,)."""
        target = self.target
        if isinstance(target, float):
            return target
        return torch.tensor([*target.values()], dtype=like.dtype, device=like.device)

    def _check_compacted(self, analysis: Analysis) -> None:
        """Raises a ValueError if the code for inputs of another shape might count on channels that were dropped."""
        whole = find_shrinkable(analysis, self.network, self._population).whole if self._is_compacted else {}
        for number, why in whole.items():
            group = self.groups[number]
            if len(self._population.candidates[group.name]) < self.num_teachers * group.size:
                raise ValueError(
                    f"compact() has dropped channels of group '{group.name}', which can't lose any for inputs of this "
                    f"shape: it {why}. Build the big student with example_inputs of this shape"
                )

    def _draw_gates(self, inputs: Sequence[Any], given: Mapping[str, Tensor] | None = None) -> Tensor:
        """All groups' gates side by side and, where some channel has none, a column of ones: (N or 1, columns)."""
        shape = next((tuple(x.shape) for x in inputs if isinstance(x, Tensor) and x.dim()), ())
        if len(shape) < (dims := self._blueprint.input_dims):
            raise ValueError(
                f"BigStudent draws one gate per sample, so its input needs a batch dimension: {dims} dimensions; "
                f"got shape {shape}"
            )
        count = samples_in(inputs)
        gates, with_ones = self._gate_modules, self._programs.has_ungated_channels
        if not given:
            return draw_gates(gates, count if self.training else None, with_ones)
        if always := sorted(self._population.open_groups.intersection(given)):
            raise ValueError(f"gates= can't have group '{always[0]}', whose gates are fixed; leave it out")
        sizes = [gate.channels for gate in gates]
        if self._gates_open:
            drawn = gates[0].loc.new_ones(1, sum(sizes) + int(with_ones))
        else:
            drawn = draw_gates(gates, count if self.training else None, with_ones)
        return given_gates(drawn, [group.name for group in self.groups], sizes, given, count)

    def _gate(self, name: str) -> HardConcrete:
        gate = self.gates[name]
        assert isinstance(gate, HardConcrete)
        return gate


def _key(mode: str, dtype: torch.dtype, inputs: Sequence[Any], is_open: bool) -> tuple[Any, ...]:
    """What inputs have in common that need the same program, of any batch size of two or more or of theirs."""
    count = samples_in(inputs)
    size = "any" if is_open and count != 1 else count

    def shape(x: Tensor) -> tuple[Any, ...]:
        return tuple(size if d == 0 and n == count else n for d, n in enumerate(x.shape))

    kinds = ((x.is_floating_point() or x.dtype, shape(x)) if isinstance(x, Tensor) else (type(x), x) for x in inputs)
    return mode, dtype, *kinds

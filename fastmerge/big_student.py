"""The big student: several teachers as one network, gated, trainable, and compressible to one teacher's size."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastmerge.channels.examples import infer_example_inputs
from fastmerge.channels.grouping import group_channels
from fastmerge.channels.groups import ChannelGroups
from fastmerge.channels.ids import run_on_ids
from fastmerge.channels.tracing import trace
from fastmerge.gates import HardConcrete
from fastmerge.kernels.gate import hard_concrete_mean, sample_gates
from fastmerge.validation import check_same_code, check_teachers
from fastmerge.wide.closing import Compaction, checked_choice, choose
from fastmerge.wide.compression import Compressor, kept_candidates
from fastmerge.wide.fusion import NormUse
from fastmerge.wide.in_place import changes_reshaped
from fastmerge.wide.layers import WideLayer
from fastmerge.wide.layout import prefers_channels_last, to_channels_last, to_contiguous
from fastmerge.wide.lowering import Program, lower
from fastmerge.wide.network import Analysis, build_network
from fastmerge.wide.norms import WideBatchNorm
from fastmerge.wide.optimizer_state import StateCarrier, carry_through_link
from fastmerge.wide.population import Population
from fastmerge.wide.shapes import find_shapes
from fastmerge.wide.shrinkable import find_shrinkable
from fastmerge.wide.shrinking import Shrinking
from fastmerge.wide.spent import spend
from fastmerge.wide.streams import GateStreams
from fastmerge.wide.template import StudentTemplate


class BigStudent(nn.Module):
    """Several networks of one architecture as one network, with a gate on every channel that can be left out.

    Layer by layer the teachers stand side by side: hidden layers block-diagonal, the first reading the shared input, the
    last giving the mean. With every gate open its output is exactly the mean of the teachers' outputs; trained with
    :meth:`gate_loss`, the gates learn which 1/T of the channels to keep; :meth:`compress` keeps them, in a network of the
    teachers' own class.

    In training mode every sample draws its own gates, one per channel, whichever layers read it; in eval mode gates are
    deterministic.

    Args:
        teachers: two or more networks of one architecture, on one device; they are copied and never changed.
        example_inputs: a tensor (N, C, ...) or tuple of tensors that their forward takes; needed only where it can't be
            inferred from the first layer.

    Attributes:
        gates: ``nn.ModuleDict`` of one :class:`~fastmerge.HardConcrete` per channel group; candidate t·n + j is channel j
            of teacher t.
        groups: the :class:`~fastmerge.channels.grouping.ChannelGroups`.
        network: the wide modules under the teachers' own paths.
        num_teachers: T.
        linked: whether the off-diagonal weights are there and trained.

    Raises:
        TypeError: if a teacher is no network, or they are of different classes.
        ValueError: if they can't be merged, naming the layer and what is needed.

    Source: Pašen & Boža, "Merging of neural networks" (arXiv 2204.09973), section 2.
    """

    def __init__(self, *teachers: nn.Module, example_inputs: Any = None) -> None:
        super().__init__()
        check_teachers(teachers)
        traced = trace(teachers[0], example_inputs)
        for number, teacher in enumerate(teachers[1:], start=1):
            check_same_code(traced, trace(teacher, example_inputs), number)
        inputs = infer_example_inputs(traced, example_inputs)
        record = run_on_ids(traced, inputs)
        self.groups: ChannelGroups = group_channels(record)
        if not len(self.groups):
            raise ValueError(
                f"{type(teachers[0]).__name__} has no hidden channels to choose among: there is nothing to merge"
            )
        self.num_teachers = len(teachers)
        self._shapes = find_shapes(traced, inputs)
        analysis = Analysis(traced, self.groups, self._shapes)
        self._each = analysis.needs_each(record.nonlinear_nodes)
        self.network, self._layout = build_network(analysis, teachers, keep_each_bias=self._each)
        reference = next(teachers[0].parameters())
        self.gates = nn.ModuleDict(
            {
                group.name: HardConcrete(self.num_teachers * group.size, device=reference.device, dtype=reference.dtype)
                for group in self.groups
            }
        )
        self._linked = False
        self._num_inputs = len(inputs)
        self._template = (StudentTemplate(teachers[0], self._layout),)  # in a tuple: no submodule of this one
        self._input_dims = inputs[0].dim()
        self._gates_open = False
        self._fused: bool | str = "auto"
        self._lower(analysis)
        self.train(teachers[0].training)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The teachers' forward, gated: same inputs, same output structure.

        Raises:
            ValueError: if the first input has no batch dimension.
        """
        mode = "train" if self.training else "eval"
        gates = None if self._gates_open else self._draw_gates(inputs, kwargs)
        each = self._gates_open and self._each and not self._is_compacted
        program = self._programs[mode, each, self.linked]
        if self.linked or not self._may_change_layout or not prefers_channels_last(inputs):
            return program.forward(self.network, gates, *inputs, **kwargs)
        return to_contiguous(program.forward(self.network, gates, *to_channels_last(inputs), **kwargs))

    @property
    def fused(self) -> bool | str:
        """Whether each BatchNorm runs as one operation with the add, ReLU, max-pooling and gate that follow it.

        True, False, or "auto", the default: on CUDA devices alone, where that saves memory traffic. The results are the same
        up to rounding; ``fastmerge.info(big)`` says which normalisations can.
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

    def norms(self) -> tuple[NormUse, ...]:
        """For each call of a normalisation in the training forward, what runs in one operation with it, or why nothing does."""
        return self._programs["train", False, self.linked].norms

    @property
    def linked(self) -> bool:
        """Whether the off-diagonal weights are there and trained."""
        return self._linked or any(layer.linked for layer in self._layers)

    def link(self, optimizer: Optimizer | None = None) -> None:
        """Turns block-diagonal layers into dense ones, whose off-diagonal weights start at zero and are trained.

        The output does not change. Parameters stay the same objects with data of the new shape, so an optimizer goes on
        working if it is passed here. Wrap in DistributedDataParallel or compile after linking.

        Args:
            optimizer: whose state (momentum, moments) grows along.
        """
        for layer in self._layers:
            if layer.wiring.has_off_diagonal and not layer.linked:
                if optimizer is not None:
                    carry_through_link(optimizer, layer)
                layer.link()
        self._linked = True

    def compact(
        self,
        optimizer: Optimizer | None = None,
        gate_optimizer: Optimizer | None = None,
        *,
        threshold: float = 0.05,
        settled: bool = False,
        multiple: int = 8,
    ) -> Compaction:
        """Drops candidates whose gates are closed for good, so that every step from here on costs less.

        Closed for good are gates that are 0 in eval mode and open in less than ``threshold`` of the training samples. Their
        weights, statistics, gates and optimizer state go together, in their own memory; parameters stay the same objects. In
        eval mode the output stays what it was, and in training mode it is as if the dropped gates were 0; :meth:`compress`
        gives the student that it would have given. At least n candidates of every group stay.

        A group is left whole where the network's code might count on its number of channels: a view or chunk, a grouped
        convolution, a constant or parameter outside layers. Until :meth:`link`, and where streams are concatenated, every
        teacher keeps as many candidates as the one with the most.

        Call it between two steps, as often as you like; compile, wrap in DistributedDataParallel or capture a CUDA graph
        anew afterwards. :meth:`open_gates` then opens the gates that are left.

        Args:
            optimizer, gate_optimizer: whose state shrinks along; one that holds all parameters will do.
            threshold: of P[g > 0], in (0, 0.5).
            settled: whether to leave a group alone until each of its gates is closed for good or surely open
                (P[g > 0] above ``1 - threshold``).
            multiple: keep a multiple of so many candidates (before linking, of each teacher), the most open of the closed
                ones making up the number: convolutions of 31 channels are slower than of 32.

        Returns:
            What was dropped, and which groups were left whole, and why.

        Raises:
            ValueError: a number is out of range, or an optimizer's state can't be cut; nothing has changed then.
        """
        if not 0 < threshold < 0.5:
            raise ValueError(f"compact needs a threshold of P[g > 0] in (0, 0.5); got {threshold}")
        if multiple < 1:
            raise ValueError(f"compact needs a multiple of at least 1; got {multiple}")
        analysis = self._analyse()
        shrinkable = find_shrinkable(analysis, self.network, self._population)
        after, done = choose(self._population, self.gates, shrinkable, self.linked, threshold, settled, multiple)
        self._shrink_to(after, [o for o in (optimizer, gate_optimizer) if o is not None], analysis)
        return done

    def _shrink_to(self, after: Population, optimizers: Sequence[Optimizer], analysis: Analysis) -> None:
        shrinking = Shrinking(self.network, self._layout, self.gates, self._population, after, optimizers)
        if after.total < self._population.total:
            shrinking.apply()
            del self.network.gates_before  # lowering makes them anew, for the channels that are left
            self._lower(analysis)

    @contextmanager
    def open_gates(self) -> Iterator[BigStudent]:
        """Within this context every gate is 1: until trained, the output is exactly the mean of the teachers' outputs.

        Where a network goes on after its last layer (SqueezeNet's final ReLU, a log-softmax), the mean is taken at the
        output here and in the last layer otherwise, since only the latter can be compressed into one network.
        """
        before, self._gates_open = self._gates_open, True
        try:
            yield self
        finally:
            self._gates_open = before

    def gate_loss(self) -> Tensor:
        """``sum over groups of (1/T - mean of P[g > 0])²``, a 0-d tensor; zero when each group is on course to keep 1/T."""
        return (torch.stack(list(self.open_probabilities().values())) - 1 / self.num_teachers).square().sum()

    def open_probabilities(self) -> dict[str, Tensor]:
        """Per group the mean of P[g > 0] over all T·n candidates, those dropped counting as closed: 0-d tensors."""
        sums = {group.name: self.gates[group.name].open_probability().sum() for group in self.groups}  # type: ignore[operator]
        return {group.name: sums[group.name] / (self.num_teachers * group.size) for group in self.groups}

    def gate_parameters(self) -> Iterator[nn.Parameter]:
        """The gates' ``loc``; to be trained by a group or optimizer of its own, without weight decay."""
        return self.gates.parameters()

    def weight_parameters(self) -> Iterator[nn.Parameter]:
        """All parameters but the gates'."""
        return self.network.parameters()

    def keep(self) -> dict[str, Tensor]:
        """What :meth:`compress` would keep now: per group the candidates with the most open gates.

        Returns:
            int64 (n,) per group name, ascending; candidate t·n + j is channel j of teacher t.
        """
        return kept_candidates(self.groups, self.gates)

    def compress(self, optimizer: Optimizer | None = None, *, in_place: bool = False) -> Any:
        """Keeps the n most open candidates of every group and drops the gates.

        The result computes what this network computes in eval mode with the kept gates at 1 and the others at 0.

        Args:
            optimizer: an optimizer of this network's parameters; it is pointed at the student's parameters, with its state
                cut down like them, in place, and the gates' group gone.
            in_place: whether the student takes over this network's tensors, compacted one by one in their own memory, so that
                both never exist side by side. Any later use of this network raises a RuntimeError. A tensor that something
                else uses too (a view of it is alive, two layers share it) is copied and left to the other.

        Returns:
            A network of the teachers' class, in this network's mode, dtype and device, with all parameters trainable.

        Raises:
            ValueError: the optimizer is not this network's, or its state can't be cut; nothing has changed then.
        """
        compressor = Compressor(self.network, self._layout, self.groups, self.keep(), self._population)
        carrier = None if optimizer is None else StateCarrier(optimizer, compressor)
        template, training, like = self._template[0], self.training, next(self.gates.parameters())
        try:
            with torch.no_grad():
                tensors = {
                    name: compressor.cut(name, tensors, in_place) for name, tensors in compressor.sources.items()
                }
                student = template.build(tensors, like)
                if carrier is not None:
                    carrier.carry(student)
        finally:
            if in_place:
                spend(self)
        return student.train(training)

    def extra_repr(self) -> str:
        norms = self.norms()
        fused = f", {sum(bool(norm.fused) for norm in norms)} of {len(norms)} normalisations fused" if norms else ""
        linked = "linked" if self.linked else "not linked"
        return f"{self.num_teachers} teachers, {len(self.groups)} channel groups, {linked}{fused}"

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_programs"] = None  # compiled from the template's code, and again after loading
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lower(self._analyse())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes the state of a compacted big student, as which it drops what that had dropped."""
        left = self.candidates_in(state_dict, prefix)
        if left:
            self.keep_only(left, link=self._is_linked_in(state_dict, f"{prefix}network.", left))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def candidates_in(self, state_dict: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        """Which candidates the state of a compacted big student has, by group; empty for one that was not compacted."""
        given = {group.name: state_dict.get(f"{prefix}gates.{group.name}.candidates") for group in self.groups}
        return {name: candidates for name, candidates in given.items() if candidates is not None}

    def keep_only(self, candidates: Mapping[str, Tensor], link: bool = False) -> None:
        """Drops all other candidates, as :meth:`compact` would have.

        Args:
            candidates: int64 ascending by name of the group; groups that are not there keep what they have.
            link: whether to link first.

        Raises:
            ValueError: a candidate was dropped before, or a group can't lose these.
        """
        analysis = self._analyse()
        shrinkable = find_shrinkable(analysis, self.network, self._population)
        after = checked_choice(self._population, candidates, shrinkable, self.linked or link)
        if link:
            self.link()
        self._shrink_to(after, [], analysis)

    def _is_linked_in(self, state_dict: dict[str, Any], prefix: str, left: Mapping[str, Tensor]) -> bool:
        """Whether the weights in the state of a compacted big student have their off-diagonal blocks."""
        after = Population(self.groups, self.num_teachers, left)
        for weight, path in self._layout.layers.items():
            wide, given = self.network.get_submodule(path), state_dict.get(f"{prefix}{path}.weight")
            if isinstance(wide, WideLayer) and wide.wiring.has_off_diagonal and given is not None:
                along = self.groups.outputs if wide.geometry.out_dim == 1 else self.groups.inputs
                return given.shape[1] == int(after.is_left(along[weight]).sum())
        return self.linked

    def __deepcopy__(self, memo: dict[int, Any]) -> BigStudent:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        return clone

    def _analyse(self) -> Analysis:
        traced = trace(self._template[0].skeleton, (None,) * self._num_inputs)
        return Analysis(traced, self.groups, self._shapes)

    def _lower(self, analysis: Analysis) -> None:
        self._population = Population.of(self.groups, self.num_teachers, self.gates)
        everyone = self.num_teachers * sum(group.size for group in self.groups)
        self._is_compacted = bool(self._population.total < everyone)  # here, for a compiler not to follow it
        self._programs: dict[tuple[str, bool, bool], Program] = {
            (mode, each, joined): lower(analysis, self.network, mode, self._population, each, joined)
            for mode, each, joined in product(("train", "eval"), {False, self._each}, (False, True))
        }
        self._may_change_layout = not any(
            changes_reshaped(graph, analysis.traced.root, partial(lambda m, n: n in analysis.calls[m], mode))
            for mode, graph in analysis.traced.graphs.items()
        )
        self._layers = tuple(module for module in self.network.modules() if isinstance(module, WideLayer))
        total = self._population.total
        readers = [module for module in self.network.modules() if isinstance(module, GateStreams)]
        self._has_ungated_channels = any(bool((reader.index == total).any()) for reader in readers)

    def _draw_gates(self, inputs: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        """All groups' gates side by side and, where some channel has none, a column of ones: (N or 1, columns)."""
        x = next(value for value in (*inputs, *kwargs.values()) if isinstance(value, Tensor))
        if x.dim() < self._input_dims:
            raise ValueError(
                f"BigStudent draws one gate per sample, so its input needs a batch dimension: {self._input_dims} "
                f"dimensions; got shape {tuple(x.shape)}"
            )
        first, *_ = modules = self._gate_modules()
        loc = torch.cat([gate.loc for gate in modules])
        if self.training:
            gates = sample_gates(loc, x.shape[0], beta=first.beta, gamma=first.gamma, zeta=first.zeta)
        else:
            gates = hard_concrete_mean(loc, gamma=first.gamma, zeta=first.zeta).unsqueeze(0)
        if self._has_ungated_channels:
            gates = torch.cat([gates, gates.new_ones(gates.shape[0], 1)], dim=1)
        return gates

    def _gate_modules(self) -> list[HardConcrete]:
        return [self.gates[group.name] for group in self.groups]  # type: ignore[misc]

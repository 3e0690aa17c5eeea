"""The big student: several teachers as one network, gated, trainable, and compressible to one teacher's size."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastmerge.gated_network import GatedNetwork
from fastmerge.gates import checked_candidates, kept_candidates
from fastmerge.narrowing.closing import (
    Compaction,
    UnsettledGatesWarning,
    checked_choice,
    choose,
    fitting_multiple,
    unsettled,
)
from fastmerge.narrowing.compression import Compressor, TracedStudent, runs_at_its_width
from fastmerge.narrowing.optimizer_state import StateCarrier, carry_through_link, check_state
from fastmerge.narrowing.parts import activation_counts, consecutive_parts
from fastmerge.narrowing.shrinking import Shrinking, carry_over, find_shrinkable
from fastmerge.wide.analysis import Analysis
from fastmerge.wide.heads import SeparateHeads
from fastmerge.wide.layers import WideLayer
from fastmerge.wide.population import Population

_FIXED = 30.0  # a loc from which neither chance nor a gradient moves a gate
_SPENT = (
    "this big student was compressed in place: its tensors are the student's now, and nothing is left to use. "
    "Use the student that compress() returned, or compress(in_place=False) to keep both"
)


class BigStudent(GatedNetwork):
    """Several networks of one architecture as one network, with a gate on every channel that can be left out.

    Layer by layer the teachers stand side by side: hidden layers block-diagonal, the first reading the shared input, the
    last giving the mean. With every gate open its output is exactly the mean of the teachers' outputs; trained with
    :meth:`gate_loss`, the gates learn which 1/T of the channels to keep; :meth:`compress` keeps them, in a network of the
    teachers' own class.

    In training mode every sample draws its own gates, one per channel, whichever layers read it; in eval mode gates are
    deterministic.

    Other threads may build and train networks at the same time, but random numbers that they draw while this one is built may
    be drawn again.

    Args:
        teachers: two or more networks of one architecture, on one device; they are copied and never changed.
        example_inputs: what their forward takes: a tensor (N, C, ...), a tuple of arguments, a dict of keyword arguments, or a
            pair of both. Needed only where it can't be inferred from the first layer.
        outputs: which outputs are predictions: keys, attributes or positions, or tuples that lead to nested ones. None: those
            that no parameter follows. The big student gives the teachers' mean of them. Other outputs, such as feature maps,
            are the teachers' mean only with open gates, and may be anything in the student.
        heads: what becomes of the teachers' outputs. "average": their mean. "concatenate", for teachers of different label
            sets, whose last layers may differ in their number of classes: each teacher's own, side by side in the teachers'
            order, so that the student is a network of the teachers' class with K_1 + … + K_T classes. "separate": a tuple of
            T such parts; the student is then a :class:`~fastmerge.wide.heads.SeparateHeads` around that network.
        keep: how many channels the student has, as a fraction of a teacher's in 1/4..T, or such fractions, or numbers of
            channels, by name of the channel group; None: as many as a teacher. Groups whose number of channels the network's
            code relies on are refused. The student is a network of the teachers' class with other widths, like one that the
            class's constructor builds with these widths. If the class's code contains a width (``x.view(-1, 400)``), it is a
            :class:`~fastmerge.narrowing.compression.TracedStudent` with the same names of weights.
        tie_streams: whether the channels of a stream that LayerNorms or RMSNorms take together, such as a transformer's
            residual stream, have one gate per teacher, so that the student takes the stream from one teacher. Otherwise they
            are chosen one by one, and a norm's statistics weigh them by their gates.
        verify: whether to compare it with the teachers, and with the network that it compresses to, on the example inputs, in
            eval and in training mode. The second comparison is made once per class and shape of large networks in a process.

    Attributes:
        gates: ``nn.ModuleDict`` of one :class:`~fastmerge.HardConcrete` per channel group; candidate t·n + j is channel j
            of teacher t.
        groups: the :class:`~fastmerge.channels.groups.ChannelGroups`.
        network: the wide modules under the teachers' own paths.
        num_teachers: T.
        linked: whether the off-diagonal weights are there and trained.

    Raises:
        TypeError: if a teacher is no network, or they are of different classes.
        ValueError: if they can't be merged, naming the layer and what is needed; or if what was built is wrong, saying by how
            much and which layer is the first to differ, where that can be found.

    Source: Pašen & Boža, "Merging of neural networks" (arXiv 2204.09973), section 2.
    """

    _told_of_eval_mode = False

    def link(self, optimizer: Optimizer | None = None) -> None:
        """Turns block-diagonal layers into dense ones, whose off-diagonal weights start at zero and are trained.

        The output does not change. Parameters stay the same objects with data of the new shape, so an optimizer goes on
        working if it is passed here. Wrap in DistributedDataParallel or compile after linking.

        Args:
            optimizer: whose state (momentum, moments) grows along.

        Raises:
            ValueError: the optimizer is not this big student's, or its state can't grow; nothing has changed then.
        """
        if optimizer is not None:
            check_state("link", optimizer, {parameter: name for name, parameter in self.named_parameters()})
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
        multiple: int | None = None,
    ) -> Compaction:
        """Drops candidates whose gates are closed for good, so that every step from here on costs less.

        Closed for good are gates that are 0 in eval mode and open in less than ``threshold`` of the training samples. Their
        weights, statistics, gates and optimizer state go together, in their own memory; parameters stay the same objects. In
        eval mode the output stays what it was, and in training mode it is as if the dropped gates were 0; :meth:`compress`
        gives the student that it would have given. At least n candidates of every group stay.

        A group is left whole where the network's code might count on its number of channels: a view or chunk, a grouped
        convolution, a constant, or a parameter outside layers and normalisations. Until :meth:`link`, and where streams are
        concatenated or layer-normed, every teacher keeps as many candidates as the one with the most.

        Call it between two steps, as often as you like; compile, wrap in DistributedDataParallel or capture a CUDA graph
        anew afterwards. :meth:`open_gates` then opens the gates that are left.

        Args:
            optimizer: whose state shrinks along; one that holds all parameters will do.
            gate_optimizer: a second one, if gates have their own.
            threshold: of P[g > 0], in (0, 0.5).
            settled: whether to leave a group alone until each of its gates is closed for good or surely open
                (P[g > 0] above ``1 - threshold``).
            multiple: the number of candidates that stay is a multiple of this (before linking, for each teacher); the most
                open of the closed ones fill it up. None: 8 on a CUDA device, for its tensor cores; 1 elsewhere.

        Returns:
            What was dropped, and which groups were left whole, and why.

        Raises:
            ValueError: a number is out of range, or an optimizer's state can't be cut; nothing has changed then.
        """
        multiple = fitting_multiple(next(self.gates.parameters()).device) if multiple is None else multiple
        analysis = self._blueprint.analyse()
        shrinkable = find_shrinkable(analysis, self.network, self._population)
        after, done = choose(
            self._population, self.gates, shrinkable, self.linked, threshold, settled, multiple, self.widths
        )
        self._shrink_to(after, [o for o in (optimizer, gate_optimizer) if o is not None], analysis)
        return done

    def parts(self, count: int) -> list[list[str]]:
        """Cuts the depth into consecutive parts whose channel groups have about equally many activations.

        Groups that :meth:`compact` can't narrow are of the first part.

        Args:
            count: how many parts.

        Returns:
            Names of channel groups for each part; every group is in one.

        Raises:
            ValueError: there are fewer groups that can lose channels than parts, or no parts.
        """
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"parts needs a whole number of at least 1; got {count!r}")
        analysis = self._blueprint.analyse()
        whole = find_shrinkable(analysis, self.network, self._population).whole
        free = [number for number in range(len(self.groups)) if number not in whole]
        if len(free) < count:
            why = "".join(f" ('{self.groups[number].name}' {reason})" for number, reason in list(whole.items())[:1])
            raise ValueError(
                f"layerwise={count} needs {count} channel groups that can be narrowed; this network has {len(free)}{why}. Take "
                "a smaller layerwise"
            )
        sizes = activation_counts(analysis)
        parts = [[free[k] for k in part] for part in consecutive_parts([sizes[number] for number in free], count)]
        parts[0] = sorted([*parts[0], *whole])
        return [[self.groups[number].name for number in part] for part in parts]

    @torch.no_grad()
    def fix(self, kept: Mapping[str, Tensor | Sequence[int]]) -> None:
        """Opens the gates of some candidates for good, and closes those of all others in their groups, in training too.

        No gradient moves such gates, and ``loc`` may not be changed by hand any more. :meth:`compact` drops what is closed;
        where all that is left of a group is open, nothing is multiplied by its gates any more.

        Args:
            kept: by name of the group, the candidates: as many as the student has, or more.

        Raises:
            TypeError, ValueError: these are no candidates that are left; nothing has changed then.
        """
        given = checked_candidates(self.groups, self.num_teachers, self.gates, self.widths, kept, what="fix", more=True)
        for name, candidates in given.items():
            gate = self._gate(name)
            gate.loc.copy_(torch.where(torch.isin(gate.numbers(), candidates), _FIXED, -_FIXED))
            gate.fixed = True

    def adopt(self, other: BigStudent) -> None:
        """Takes the weights and statistics of all candidates that another big student of these teachers has, too.

        Raises:
            TypeError: it is no big student.
            ValueError: one of them is not linked, or they are of teachers of different architectures.
        """
        if not isinstance(other, BigStudent):
            raise TypeError(f"adopt needs another BigStudent; got a {type(other).__name__}")
        if not (self.linked and other.linked):
            raise ValueError("adopt needs linked big students; call link() on both first")
        if other.num_teachers != self.num_teachers or not other.groups.same_channels(self.groups):
            raise ValueError("adopt needs a big student of as many teachers, of the same architecture")
        carry_over(self._blueprint.layout, (other.network, self.network), (other._population, self._population))

    def _shrink_to(self, after: Population, optimizers: Sequence[Optimizer], analysis: Analysis) -> None:
        shrinking = Shrinking(self.network, self._blueprint.layout, self.gates, self._population, after, optimizers)
        if after.total < self._population.total:
            shrinking.apply()
            del self.network.gates_before  # lowering makes them anew, for the channels that are left
            self._lower(analysis)

    def gate_loss(self, open_now: Tensor | None = None) -> Tensor:
        """``sum over groups of (1/T - mean of P[g > 0])²``, a 0-d tensor; zero when each group is on course to keep 1/T.

        With ``keep``, each group has its own part of the candidates in place of 1/T.

        Args:
            open_now: the means, (..., G), where they are known; see :meth:`open_state`.
        """
        if open_now is None and not (self.training or self._told_of_eval_mode) and torch.is_grad_enabled():
            self._told_of_eval_mode = True
            warnings.warn(
                "gate_loss() is called for gradients while the big student is in eval mode, as its first teacher was: no gates "
                "are drawn, and BatchNorm's statistics do not change. Call big.train() before training",
                stacklevel=2,
            )
        open_now = self.group_means(self.open_candidates()) if open_now is None else open_now
        return (open_now - self.shares(open_now)).square().sum(-1)

    def open_probabilities(self) -> dict[str, Tensor]:
        """Per group the mean of P[g > 0] over all T·n candidates, those dropped counting as closed: 0-d tensors."""
        means = self.group_means(self.open_candidates()).unbind()
        return {group.name: mean for group, mean in zip(self.groups, means, strict=True)}

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

        Raises:
            ValueError: a gate is NaN.
        """
        self._check_gates("keep")
        return kept_candidates(self.widths, self.gates)

    def compress(
        self,
        optimizer: Optimizer | None = None,
        *,
        in_place: bool = False,
        keep: Mapping[str, Tensor | Sequence[int]] | None = None,
    ) -> Any:
        """Keeps the n most open candidates of every group, or as many as ``keep`` said, and drops the gates.

        The result computes what this network computes in eval mode with the kept gates at 1 and the others at 0. Its BatchNorms
        keep this network's statistics, which were taken while other channels were open, too; :func:`fastmerge.recalibrate`
        estimates them anew, which matters most without fine-tuning. Warns if the gates do not say which channels are needed.

        Args:
            optimizer: an optimizer of this network's parameters. It is changed in place: it then has the student's parameters,
                with its state cut down like them, and no gates.
            in_place: whether the student takes over this network's tensors, compacted one by one in their own memory, so that
                both never exist side by side. Any later use of this network raises a RuntimeError. A tensor that something
                else uses too (a view of it is alive, two layers share it) is copied and left to the other.
            keep: by name of the group, n candidates to keep in place of those that its gates choose; candidate t·n + j is
                channel j of teacher t.

        Returns:
            A network of the teachers' class, in this network's mode, dtype and device, with all parameters trainable; with
            ``heads="separate"`` within a module that splits its output.

        Raises:
            ValueError: a gate is NaN, ``keep`` is not n candidates of each group that it names, the optimizer is not this
                network's, or its state can't be cut; nothing has changed then.
        """
        given = checked_candidates(self.groups, self.num_teachers, self.gates, self.widths, keep or {})
        self._check_gates("compress", given)
        self._warn_of_gates(given)
        kept = kept_candidates(self.widths, self.gates) | given
        compressor = Compressor(self.network, self._blueprint.layout, kept, self._population)
        carrier = None if optimizer is None else StateCarrier(optimizer, compressor)
        blueprint, heads, training = self._blueprint, self.heads, self.training
        like, resized = next(self.gates.parameters()), not self.is_of_teachers_widths
        try:
            with torch.no_grad():
                student = blueprint.template.build(compressor.cut_all(in_place), like)
                if resized and not runs_at_its_width(copy.deepcopy(student), blueprint.traced):
                    student = TracedStudent(student, blueprint.traced)
                if carrier is not None:
                    carrier.carry(student)
        finally:
            if in_place:
                _spend(self)
        if heads == "separate" and blueprint.parts is not None:
            student = SeparateHeads(student, blueprint.parts)
        return student.train().train(training)  # what a network keeps of its own for evaluation it makes anew

    def _check_gates(self, method: str, given: Collection[str] = ()) -> None:
        for group, gate in zip(self.groups, self._gate_modules, strict=True):
            count = int(gate.loc.isnan().sum())
            if count and group.name not in given:
                raise ValueError(
                    f"{method} needs gates that are numbers; {count} of {len(gate.loc)} gates of '{group.name}' "
                    f"{'is' if count == 1 else 'are'} NaN. The training has diverged: go back to an earlier checkpoint, and "
                    "lower the learning rates"
                )

    def _warn_of_gates(self, given: Collection[str]) -> None:
        with torch.no_grad():
            opened = self.open_candidates()
            means, spreads = (self.group_means(v).tolist() for v in (opened, 4 * opened * (1 - opened)))
        mean, spread = (
            {name: value for name, value in zip(self.gates, values, strict=True) if name not in given}
            for values in (means, spreads)
        )
        found = unsettled(mean, spread, self.target)
        if found:
            warnings.warn(
                f"compress() chooses by gates that have not settled: {'. '.join(found.values())}. Train for more "
                "steps or with a larger weight of gate_loss(), or choose the channels yourself with keep=",
                UnsettledGatesWarning,
                stacklevel=3,
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes the state of a compacted big student, as which it drops what that had dropped."""
        left = self.candidates_in(state_dict, prefix)
        if left:
            after = Population(self.groups, self.num_teachers, left)
            self.keep_only(left, link=self._is_linked_in(state_dict, prefix, after))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def candidates_in(self, state_dict: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        """Which candidates the state of a compacted big student has, by group; empty for one that was not compacted."""
        given = {group.name: state_dict.get(f"{prefix}gates.{group.name}.candidates") for group in self.groups}
        return {name: candidates for name, candidates in given.items() if candidates is not None}

    def _is_linked_in(self, state_dict: Mapping[str, Tensor], prefix: str, left: Population) -> bool:
        """Whether weights in the state of a compacted big student, with so many candidates, have off-diagonal blocks."""
        for weight, path in self._blueprint.layout.layers.items():
            wide, given = self.network.get_submodule(path), state_dict.get(f"{prefix}network.{path}.weight")
            if isinstance(wide, WideLayer) and wide.wiring.has_off_diagonal and given is not None:
                along = self.groups.outputs if wide.geometry.out_dim == 1 else self.groups.inputs
                return given.shape[1] == int(left.is_left(along[weight]).sum())
        return self.linked

    def keep_only(self, candidates: Mapping[str, Tensor], link: bool = False) -> None:
        """Drops all other candidates, as :meth:`compact` would have.

        Args:
            candidates: int64 ascending by name of the group; groups that are not there keep what they have.
            link: whether to link first.

        Raises:
            ValueError: a candidate was dropped before, or a group can't lose these.
        """
        analysis = self._blueprint.analyse()
        shrinkable = find_shrinkable(analysis, self.network, self._population)
        after = checked_choice(self._population, candidates, shrinkable, self.linked or link, self.widths)
        if link:
            self.link()
        self._shrink_to(after, [], analysis)


class SpentBigStudent(nn.Module):
    """A big student after ``compress(in_place=True)``: any use raises a RuntimeError that says so."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__"):
            return super().__getattribute__(name)
        raise RuntimeError(_SPENT)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise RuntimeError(_SPENT)

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise RuntimeError(_SPENT)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise RuntimeError(_SPENT)

    def __repr__(self) -> str:
        return "SpentBigStudent(compressed in place)"


def _spend(network: nn.Module) -> None:
    """Lets go of everything a network holds and leaves a :class:`SpentBigStudent` in its place."""
    network.__dict__.clear()
    network.__dict__["_compiled_call_impl"] = None
    network.__class__ = SpentBigStudent

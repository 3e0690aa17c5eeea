"""What a big student is built after: its teachers' code and channels, checked and analysed, without their weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastmerge.channels.examples import Inputs, example_arguments, failure, few_samples, two_samples
from fastmerge.channels.grouping import group_channels, mixing_tensors
from fastmerge.channels.groups import ChannelGroups
from fastmerge.channels.ids import changed_tensors, run_on_ids
from fastmerge.channels.same_code import code_key, without_batch
from fastmerge.channels.traced_network import MODES, Name, TracedNetwork, predictions
from fastmerge.channels.tracing import trace
from fastmerge.isolation import copied, without_search
from fastmerge.problems import Problem, UnmergeableError, WrongTeacherError
from fastmerge.validation import check_teachers, code_difference, same_graphs, teacher_errors
from fastmerge.wide.analysis import Analysis
from fastmerge.wide.heads import HEADS, Parts, find_heads, find_parts, joined
from fastmerge.wide.network import Layout, StudentTemplate, build_network


@dataclass
class Blueprint:
    """What stays the same of a big student however it is trained.

    Attributes:
        template: a teacher without its weights.
        traced: a teacher's graphs, over a copy without its weights.
        groups: the channel groups.
        layout: where the teachers' tensors lie in the wide network.
        each: whether the mean of the teachers' outputs is another one than what follows from the mean of their last layers.
        predicted: per mode the positions of the flat outputs that are predictions.
        outputs: which the user named, if any.
        dtype: of the teachers.
        common: names of buffers that are the same in all teachers.
        tie_streams: whether channels that a LayerNorm takes together are kept together.
        parts: where each teacher's outputs lie in the output, where they do not give their mean.
    """

    template: StudentTemplate
    traced: TracedNetwork
    groups: ChannelGroups
    layout: Layout
    each: bool
    predicted: dict[str, frozenset[int]]
    outputs: Sequence[Name] | None
    dtype: torch.dtype
    common: frozenset[str]
    tie_streams: bool
    parts: Parts | None = None

    def __post_init__(self) -> None:
        self._takes_tensors = bool(self.traced.in_spec == pytree.tree_structure((tuple(self.traced.inputs), {})))

    def analyse(self) -> Analysis:
        """The analysis of a teacher, made anew."""
        return Analysis(self.traced, self.groups, self.each)

    def flat(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Sequence[Any]:
        """The arguments of a call of the big student in the order of its graphs' inputs."""
        fits = self._takes_tensors and not kwargs and len(args) == len(self.traced.inputs)
        if fits and all(isinstance(x, Tensor) for x in args):
            return args
        return self.traced.flat(args, kwargs)

    def analyse_for(
        self, inputs: Sequence[Any], dtype: torch.dtype, mode: str
    ) -> tuple[Analysis | None, dict[str, bool]]:
        """The analysis of a teacher for inputs of another shape.

        Args:
            inputs: flat.
            dtype: of the big student's weights.
            mode: in which it is run, "train" or "eval".

        Returns:
            The analysis, None where its graphs are those for the example inputs; and per mode that it is for whether it is for
            other batch sizes of two or more, too.

        Raises:
            ValueError: if the network does not run on them or can't be traced for them, or its channels belong together in
                another way.
        """
        leaves = [_cast(x.detach(), dtype) if isinstance(x, Tensor) else x for x in inputs]
        like = next(x for x in leaves if isinstance(x, Tensor))
        given: Inputs = pytree.tree_unflatten(leaves, self.traced.in_spec)
        teacher = self.template.blank(like.device, dtype)
        how = self.outputs, self.common, self.tie_streams
        shapes = ", ".join(str(tuple(x.shape)) for x in leaves if isinstance(x, Tensor))
        try:
            traced, groups, *_ = read_network(teacher, two_samples(given), *how)
        except UnmergeableError:
            why = failure(teacher, two_samples(given))
            if why is not None:
                raise ValueError(f"{self.traced.name} does not run on inputs of shape {shapes}: {why}") from why
            raise
        if not traced.is_for(leaves, mode):  # one sample, for which it does something else
            try:
                traced, groups, *_ = read_network(teacher, given, *how)
            except UnmergeableError:  # a BatchNorm takes no single value in training, but in eval mode
                traced, groups, *_ = read_network(teacher, given, *how, modes=(mode,))
        is_open = {m: is_open for m, is_open in traced.is_open.items() if traced.is_for(leaves, m)}
        if same_graphs(self.traced, traced):
            return None, is_open
        if not groups.same_channels(self.groups):
            raise ValueError(
                f"{type(teacher).__name__}'s channels belong together in another way for inputs of shape {shapes} than for the "
                "example inputs; build the big student with example_inputs of the shape that it is trained with"
            )
        self.template.strip(traced.root)
        return Analysis(traced, groups, self.each), is_open

    @property
    def input_dims(self) -> int:
        """The number of dimensions of the first tensor of the inputs that has any."""
        return next((x.dim() for x in self.traced.inputs if isinstance(x, Tensor) and x.dim()), 0)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


# what was read of the last architectures, so that replicates of one are read once
_Known = tuple[TracedNetwork, ChannelGroups, set[tuple[str, str]], dict[str, frozenset[int]]]
_KNOWN: OrderedDict[Hashable, _Known] = OrderedDict()
_MOST_KNOWN = 64


@without_search()
def read_network(
    teacher: nn.Module,
    inputs: Inputs,
    outputs: Sequence[Name] | None,
    common: frozenset[str] = frozenset(),
    tie_streams: bool = False,
    modes: Sequence[str] = MODES,
) -> _Known:
    """A network's graphs and channel groups, the (mode, node name) pairs that do not commute with a mean, its predictions.

    Args:
        teacher: the network.
        inputs: that it is run on.
        outputs: which outputs are predictions; see :func:`~fastmerge.channels.traced_network.predictions`.
        common: names of buffers that are the same in all teachers; see :func:`common_buffers`.
        tie_streams: see :class:`~fastmerge.BigStudent`.
        modes: whose graphs; see :func:`~fastmerge.channels.tracing.trace`.
    """
    code = code_key(teacher, inputs)
    asked = None if outputs is None else tuple(outputs), common, tie_streams, modes
    # none, or that of the inputs and, where it is not 1, that of inputs of any other batch size
    keys: list[Hashable] = [(each, *asked) for each in (code, code and without_batch(code)) if each is not None]
    key = next((key for key in keys if key in _KNOWN), None)
    if key is not None:
        _KNOWN.move_to_end(key)
        known = _KNOWN[key]
        return known[0].with_root(copied(teacher)), *known[1:]
    traced = trace(teacher, inputs, modes)
    predicted = predictions(traced, outputs)
    leaves, is_open = pytree.tree_leaves(inputs), all(traced.is_open[mode] for mode in traced.graphs)
    leaves = few_samples(leaves) if is_open else leaves
    record = run_on_ids(traced, leaves, predicted, tie_streams=tie_streams)
    groups = group_channels(record)
    constant = (common & mixing_tensors(record)) - changed_tensors(traced)
    if constant:  # that would keep what it meets from one teacher as a whole
        other = run_on_ids(traced, leaves, predicted, constant, tie_streams)
        others = group_channels(other)
        if others.choice.fixed < groups.choice.fixed or constant.intersection(record.without_channels):
            record, groups = other, others
    known = (traced, groups, record.nonlinear_nodes, predicted)
    if keys:
        _KNOWN[keys[-1] if is_open else keys[0]] = (traced.with_root(nn.Module()), *known[1:])
        while len(_KNOWN) > _MOST_KNOWN:
            _KNOWN.popitem(last=False)
    return known


def common_buffers(teachers: Sequence[nn.Module]) -> frozenset[str]:
    """Names of floating buffers that are the same in all teachers, such as an adjacency matrix or frequencies of rotations."""
    others = [dict(teacher.named_buffers()) for teacher in teachers[1:]]
    return frozenset(
        name
        for name, buffer in teachers[0].named_buffers()
        if buffer.is_floating_point()
        and buffer.numel() > 1
        and all(name in other and torch.equal(buffer, other[name]) for other in others)
    )


def code_errors(traced: TracedNetwork, teachers: Mapping[int, nn.Module], inputs: Inputs) -> Iterator[UnmergeableError]:
    """Where teachers compute in another way than teacher 0, one error for each.

    Args:
        traced: teacher 0.
        teachers: by number; others than teacher 0 are of its class and structure.
        inputs: what their forward takes.
    """
    first = code_key(teachers[0], inputs)
    for number, teacher in teachers.items():
        if number and (first is None or code_key(teacher, inputs) != first):
            error = code_difference(traced, trace(teacher, inputs), number)
            if error is not None:
                first_run, its = (trace(_having_run(t, inputs), inputs) for t in (teachers[0], teacher))
                if code_difference(first_run, its, number) is not None:
                    yield error


def _having_run(network: nn.Module, inputs: Inputs) -> nn.Module:
    """A copy that has run, and keeps what it finds out of its inputs once, such as a detector its anchors.

    Its buffers are as before.
    """
    network = copied(network)
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    failure(network, inputs)
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            if name in before and buffer.shape == before[name].shape:
                buffer.copy_(before[name])
    return network


def join_heads(
    teachers: Sequence[nn.Module], example_inputs: Any = None, outputs: Sequence[Name] | None = None
) -> tuple[list[nn.Module], Parts]:
    """Gives each teacher the outputs of all teachers, so that the mean output is all teachers' outputs side by side.

    Teacher t of K_t classes gets a last layer of K_1 + … + K_T outputs: its own rows, T times as large, among zeros. All other
    tensors are the teachers' own, not copies. Any method that merges networks of one architecture takes the result.

    Args:
        teachers: two or more, of one architecture but for the number of classes.
        example_inputs: as :class:`~fastmerge.BigStudent`'s.
        outputs: as :class:`~fastmerge.BigStudent`'s.

    Returns:
        The networks, in the teachers' order, and where their parts lie in the output.

    Raises:
        TypeError: a teacher is no network, or they are of different classes.
        ValueError: the last layers can't grow, or something else differs, naming the layer.
    """
    for error in teacher_errors(teachers):  # what would make the search for last layers fail
        if isinstance(error, WrongTeacherError) or len(teachers) < 2:
            raise error
    inputs = example_arguments(teachers[0], example_inputs)
    traced, groups, nonlinear, _ = read_network(teachers[0], inputs, outputs)
    heads = find_heads(Analysis(traced, groups), nonlinear, teachers)
    networks = [joined(teacher, heads, number) for number, teacher in enumerate(teachers)]
    check_teachers(networks)
    try:
        whole, *_ = read_network(networks[0], inputs, outputs)
    except ValueError as error:
        raise ValueError(
            f"heads= needs code that takes any number of classes; with {sum(heads[0].sizes)} of them it fails: {error}"
        ) from error
    return networks, Parts({mode: find_parts(traced, whole, heads, mode) for mode in whole.graphs})


@without_search()
def build(
    teachers: Sequence[nn.Module],
    example_inputs: Any,
    outputs: Sequence[Name] | None = None,
    heads: str = "average",
    tie_streams: bool = False,
) -> tuple[Blueprint, Analysis, nn.Module, Inputs]:
    """Finds out all about networks that are to be one big student.

    Args:
        teachers: two or more networks.
        example_inputs: what the user gave, if anything.
        outputs: which outputs are predictions; see :func:`~fastmerge.channels.traced_network.predictions`.
        heads: one of :data:`~fastmerge.wide.heads.HEADS`.
        tie_streams: see :class:`~fastmerge.BigStudent`.

    Returns:
        The blueprint, the first teacher's analysis, the wide modules, and the inputs that the teachers were run on.

    Raises:
        TypeError: if a teacher is no network, or they are of different classes.
        ValueError: if they can't be merged, naming the layer and what is needed.
    """
    if heads not in HEADS:
        raise ValueError(f"BigStudent needs heads of {', '.join(map(repr, HEADS))}; got {heads!r}")
    parts = None
    if heads != "average":
        teachers, parts = join_heads(teachers, example_inputs, outputs)
    check_teachers(teachers)
    inputs, common = example_arguments(teachers[0], example_inputs), common_buffers(teachers)
    traced, groups, nonlinear, predicted = read_network(teachers[0], inputs, outputs, common, tie_streams)
    for error in code_errors(traced, dict(enumerate(teachers)), inputs):
        raise error
    if not len(groups):
        what = f"{type(teachers[0]).__name__} has no hidden channels to choose among: there is nothing to merge"
        raise UnmergeableError(Problem(what))
    analysis = Analysis(traced, groups)
    analysis.each = parts is None and analysis.needs_each(nonlinear)
    network, layout = build_network(analysis, teachers)
    template = StudentTemplate(teachers[0], layout)
    template.strip(traced.root)
    dtype = next(teachers[0].parameters()).dtype
    blueprint = Blueprint(
        template, traced, groups, layout, analysis.each, predicted, outputs, dtype, common, tie_streams, parts
    )
    return blueprint, analysis, network, inputs

"""What a big student is built after: its teachers' code and channels, checked and analysed, without their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastmerge.channels.examples import infer_example_inputs
from fastmerge.channels.grouping import group_channels
from fastmerge.channels.groups import ChannelGroups
from fastmerge.channels.ids import run_on_ids
from fastmerge.channels.shapes import Shapes
from fastmerge.channels.tracing import trace
from fastmerge.validation import check_same_code, check_teachers
from fastmerge.wide.analysis import Analysis
from fastmerge.wide.network import Layout, build_network
from fastmerge.wide.template import StudentTemplate


@dataclass
class Blueprint:
    """What stays the same of a big student however it is trained.

    Attributes:
        template: a teacher without its weights.
        groups: the channel groups.
        layout: where the teachers' tensors lie in the wide network.
        shapes: of the values in a teacher's graphs.
        each: whether the mean of the teachers' outputs is another one than what follows from the mean of their last layers.
        num_inputs: how many its forward takes.
        input_dims: the number of dimensions of the first.
    """

    template: StudentTemplate
    groups: ChannelGroups
    layout: Layout
    shapes: Shapes
    each: bool
    num_inputs: int
    input_dims: int

    def analyse(self) -> Analysis:
        """The analysis of a teacher, made anew."""
        traced = trace(self.template.skeleton, (None,) * self.num_inputs)
        return Analysis(traced, self.groups, self.shapes, self.each)


def build(teachers: Sequence[nn.Module], example_inputs: Any) -> tuple[Blueprint, Analysis, nn.Module, tuple[Any, ...]]:
    """Finds out all about networks that are to be one big student.

    Args:
        teachers: two or more networks.
        example_inputs: what the user gave, if anything.

    Returns:
        The blueprint, the first teacher's analysis, the wide modules, and the inputs that the teachers were run on.

    Raises:
        TypeError: if a teacher is no network, or they are of different classes.
        ValueError: if they can't be merged, naming the layer and what is needed.
    """
    check_teachers(teachers)
    traced = trace(teachers[0], example_inputs)
    for number, teacher in enumerate(teachers[1:], start=1):
        check_same_code(traced, trace(teacher, example_inputs), number)
    inputs = infer_example_inputs(traced, example_inputs)
    record = run_on_ids(traced, inputs)
    groups = group_channels(record)
    if not len(groups):
        raise ValueError(
            f"{type(teachers[0]).__name__} has no hidden channels to choose among: there is nothing to merge"
        )
    analysis = Analysis(traced, groups, record.shapes)
    analysis.each = analysis.needs_each(record.nonlinear_nodes)
    network, layout = build_network(analysis, teachers)
    template = StudentTemplate(teachers[0], layout)
    blueprint = Blueprint(template, groups, layout, analysis.shapes, analysis.each, len(inputs), inputs[0].dim())
    return blueprint, analysis, network, inputs

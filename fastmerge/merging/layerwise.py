"""Gates learned in K consecutive parts of the depth, of which one at a time is wide.

The big student's channel groups, in the order of the network, are cut into parts of about equally many activations. While a
part is learned, its groups have all T·n candidates, as in any merge. All other groups have n: of the parts before it those
that were chosen, of the parts after it n/T of each teacher, those with the largest weights. Their gates are fixed at 1, those
of all other candidates at 0, and what is closed is dropped. So each part trains a big student like any other, which is as
exact: it compresses to what it computes with n of T·n gates open. With the next part its candidates come back, with the weights
that their teachers have between candidates that are there and zeros elsewhere; what was trained before stays.

Where one network has activations of size A and W weights, a step keeps about (1 + (T - 1)/K) A in place of T·A, and parameters
between W and T²·W. What it costs in accuracy: parts are chosen one after another, each between networks that are not the
teachers any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fastmerge.big_student import BigStudent
from fastmerge.merging.options import Options
from fastmerge.narrowing.parts import representatives
from fastmerge.stack import Stack


class Parts:
    """The parts of a merge stage.

    Args:
        teachers: networks of one architecture; what is built stands where they are, so that memory on a card need hold no
            more than one part's big student where they are on the CPU.
        examples: what their forward takes.
        options: of the merge.
        verify: as :class:`BigStudent`'s.

    Attributes:
        groups: names of the channel groups of each part.
        ends: epochs of the merge stage after which each part ends.

    Raises:
        ValueError: there are more parts than channel groups that can be narrowed, or the teachers are stacks.
    """

    def __init__(self, teachers: Sequence[nn.Module], examples: Any, options: Options, verify: bool = True) -> None:
        if isinstance(teachers[0], Stack):
            raise ValueError("layerwise goes with networks, not with a Stack of replicates; merge them one by one")
        self.teachers, self.examples, self.options = teachers, examples, options
        big = BigStudent(*teachers, example_inputs=examples, **options.of_big, verify=verify)
        self.groups = big.parts(options.layerwise)
        self.ends = [round((k + 1) * options.merge_epochs / options.layerwise) for k in range(options.layerwise)]
        self._others = representatives(big.groups, teachers, big.widths)

    def __len__(self) -> int:
        return len(self.groups)

    def beginning_with(self, epoch: int) -> int:
        """The number of the part that begins with an epoch, counted from 0."""
        return [0, *self.ends].index(epoch)

    def first(self, number: int) -> int:
        """The epoch, counted from 0, with which a part begins."""
        return 0 if number == 0 else self.ends[number - 1]

    def options_of(self, number: int) -> Options:
        """The options of a part as if it were the whole merge stage: its epochs, and milestones counted from its first."""
        first = self.first(number)
        milestones = [max(0, milestone - first) for milestone in self.options.merge_milestones or ()]
        link_at = self.options.link_at if number == 0 else 0.0
        return replace(
            self.options,
            merge_epochs=self.ends[number] - first,
            merge_milestones=milestones,
            link_at=link_at,
            layerwise=1,
        )

    def build(self, number: int, chosen: Mapping[str, Tensor]) -> BigStudent:
        """The big student of a part, as its teachers have the weights; linked but for the first part.

        Args:
            number: of the part.
            chosen: the candidates of the groups of all parts before.
        """
        big = BigStudent(*self.teachers, example_inputs=self.examples, **self.options.of_big, verify=False)
        own = self.groups[number]
        big.fix({name: chosen.get(name, other) for name, other in self._others.items() if name not in own})
        big.compact()  # block by block first: what is dropped need not be linked
        if number:
            big.link()
            big.compact()
        return big.train()

    def chosen(self, state: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
        """The candidates of the groups of all parts before one, as a checkpoint of that part has them."""
        names = [name for part in self.groups[:number] for name in part]
        return {name: _open(state, name) for name in names}


def _open(state: Mapping[str, Tensor], name: str) -> Tensor:
    opened = state[f"gates.{name}.loc"] > 0
    candidates = state.get(f"gates.{name}.candidates")
    return opened.nonzero().flatten() if candidates is None else candidates[opened]


def stage_networks(
    teachers: Sequence[nn.Module], examples: Any, options: Options, verify: bool = True
) -> Iterator[tuple[str, BigStudent, Options]]:
    """The big students that a merge stage trains one after another, as they are at first: a name, each, its own options."""
    if options.layerwise == 1:
        yield "", BigStudent(*teachers, example_inputs=examples, **options.of_big, verify=verify), options
        return
    parts = Parts(teachers, examples, options, verify)
    for number in range(len(parts)):
        yield f" part {number + 1}", parts.build(number, {}), parts.options_of(number)


def phases(big: BigStudent, options: Options) -> Iterator[tuple[str, int]]:
    """How many epochs a big student is trained block-diagonal and then linked, as it is while each of the two is told."""
    apart = options.merge_epochs - options.linked_epochs
    if apart:
        yield "block-diagonal", apart
    if options.linked_epochs:
        big.link()
        yield "linked", options.linked_epochs

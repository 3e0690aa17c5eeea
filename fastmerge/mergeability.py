"""Whether networks can be merged: every problem at once, and how much there is to choose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fastmerge.big_student import BigStudent
from fastmerge.channels.aten import op_name
from fastmerge.channels.examples import example_arguments
from fastmerge.channels.groups import ChannelGroups, Choice, choice_warning
from fastmerge.channels.traced_network import Name, TracedNetwork, module_path
from fastmerge.isolation import quietly
from fastmerge.problems import Problem, UnmergeableError
from fastmerge.validation import differences, kind_of, same_teachers, teacher_errors
from fastmerge.wide.blueprint import code_errors, common_buffers, join_heads, read_network
from fastmerge.wide.population import Keep


@dataclass(frozen=True)
class Mixing:
    """An operation that mixes channels, which therefore are kept from one teacher as a whole.

    Attributes:
        where: path of the module that calls it.
        operation: its ATen name.
        code: ``file:line`` of the user's code, where known.
    """

    where: str
    operation: str
    code: str = ""


@dataclass(frozen=True)
class Report:
    """What :func:`check` found; ``str()`` is for people.

    Attributes:
        network: the class of the teachers.
        problems: all reasons why they can't be merged.
        groups: the channel groups; None where the network could not be read.
        mixing: operations that mix channels, which therefore can't be chosen one by one.
        notes: what a merge would warn of.
    """

    network: str
    problems: tuple[Problem, ...] = ()
    groups: ChannelGroups | None = None
    mixing: tuple[Mixing, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the networks can be merged."""
        return not self.problems

    @property
    def choice(self) -> Choice | None:
        """How much there is to choose; None where the network could not be read."""
        return None if self.groups is None else self.groups.choice

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        count = len(self.problems)
        found = f"can't be merged: {count} problem{'s' if count > 1 else ''}"
        yield f"{self.network} {found if count else 'can be merged'}"
        for number, problem in enumerate(self.problems, start=1):
            place = ", ".join(part for part in (problem.where, problem.code) if part)
            yield f"{number:>3}. {place or self.network}"
            yield f"     what    {problem.what}"
            if problem.remedy:
                yield f"     remedy  {problem.remedy}"
        yield from (f"warning: {note}" for note in self.notes)
        if self.groups is None:
            yield "how much there is to choose is not known: the network could not be read"
            return
        if not self.groups.choice.is_small:  # else a warning has said so
            yield f"to choose: {self.choice}"
        if self.mixing:
            yield "these operations mix channels, which are kept from one teacher as a whole:"
            rows = [("module", "operation", "code"), *((m.where, m.operation, m.code) for m in self.mixing)]
            widths = [max(len(row[i]) for row in rows) for i in range(2)]
            yield from (f"  {a:{widths[0]}}  {b:{widths[1]}}  {c}".rstrip() for a, b, c in rows)


def check(
    *teachers: nn.Module,
    example_inputs: Any = None,
    outputs: Sequence[Name] | None = None,
    heads: str = "average",
    keep: Keep = None,
    tie_streams: bool = False,
    verify: bool = True,
) -> Report:
    """Says whether networks can be merged, with every reason why not, and how many channels can be chosen.

    If nothing is in the way, it builds a big student and throws it away. The networks are never changed. Networks that can't
    be merged raise nothing: the report says why.

    Args:
        teachers: the networks, as :class:`~fastmerge.BigStudent` takes them.
        example_inputs: what their forward takes; needed only where it can't be inferred.
        outputs: which outputs are predictions.
        heads: what becomes of the teachers' outputs, as :class:`~fastmerge.BigStudent` takes it.
        keep: how many channels the student is to have, as :class:`~fastmerge.BigStudent` takes it.
        tie_streams: as :class:`~fastmerge.BigStudent` takes it.
        verify: whether to compare what is built with the networks.

    Returns:
        A report; ``print`` shows it, ``report.ok`` is whether they can be merged.
    """
    if heads != "average":
        try:
            teachers = tuple(join_heads(teachers, example_inputs, outputs)[0])
        except (ValueError, TypeError) as error:
            whole = check(*teachers, example_inputs=example_inputs, outputs=outputs, verify=False)
            found = error.problems if isinstance(error, UnmergeableError) else (Problem(str(error)),)
            return replace(whole, problems=(*found, *(p for p in whole.problems if p not in found)))
    problems = [problem for error in teacher_errors(teachers) for problem in error.problems]
    networks = {number: teacher for number, teacher in enumerate(teachers) if isinstance(teacher, nn.Module)}
    if not networks:
        return Report("what was passed", tuple(problems))
    number, first = next(iter(networks.items()))
    first = networks[number] = _unwrapped(first)
    traced = groups = None
    try:
        inputs = example_arguments(first, example_inputs)
        common = frozenset() if problems else common_buffers(list(networks.values()))
        traced, groups, *_ = read_network(first, inputs, outputs, common, tie_streams)
        if number == 0:
            alike = {n: t for n, t in networks.items() if n == 0 or _is_alike(first, t, n)}
            problems += [problem for error in code_errors(traced, alike, inputs) for problem in error.problems]
        if not problems:
            with quietly():  # of what is noted below
                built: dict[str, Any] = {"outputs": outputs, "keep": keep, "tie_streams": tie_streams, "verify": verify}
                BigStudent(*teachers, example_inputs=example_inputs, **built)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the user's code raises
        problems += _problems_of(error, is_sure=not problems)
    notes = [note for note in (same_teachers(teachers), groups and choice_warning(groups)) if note]
    mixing = () if traced is None or groups is None else tuple(_mixing(traced, groups))
    return Report(type(first).__name__, tuple(problems), groups, mixing, tuple(notes))


def _unwrapped(network: nn.Module) -> nn.Module:
    """The network within a wrapper, which is a problem that hides others."""
    inner = getattr(network, "_orig_mod", None)
    if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner = network.module
    return inner if isinstance(inner, nn.Module) else network


def _is_alike(first: nn.Module, other: nn.Module, number: int) -> bool:
    return kind_of(first) is kind_of(other) and next(differences(first, other, number), None) is None


def _problems_of(error: Exception, is_sure: bool) -> list[Problem]:
    """What an error says.

    Args:
        error: that reading or building raised.
        is_sure: whether nothing was wrong before, which may have caused it.
    """
    if isinstance(error, UnmergeableError):
        return list(error.problems)
    if isinstance(error, (ValueError, TypeError)):
        return [Problem(str(error))]
    return [Problem(f"{type(error).__name__}: {error}")] if is_sure else []


def _mixing(traced: TracedNetwork, groups: ChannelGroups) -> Iterator[Mixing]:
    for where, operation in groups.kept_whole:
        nodes = [node for graph in traced.graphs.values() for node in graph.nodes if module_path(node) == where]
        nodes.sort(key=lambda node: op_name(node) not in operation.lstrip("_") or not op_name(node))
        yield Mixing(where, operation, next((code for node in nodes if (code := node.meta.get("code"))), ""))

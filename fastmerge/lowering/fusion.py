"""BatchNorms and the patterns that follow them as one operation each, in a lowered graph."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from fastmerge.channels.aten import op_name
from fastmerge.channels.traced_network import module_path
from fastmerge.lowering.patterns import Lowered, Pattern, match, why_alone
from fastmerge.wide.layers import GroupedLayer, WideLayer
from fastmerge.wide.norms import WideBatchNorm


@dataclass(frozen=True)
class NormUse:
    """One call of a normalisation in a network's training forward.

    Attributes:
        name: its path, or the name of the functional call.
        fused: what runs in one operation with it: "add", an activation such as "ReLU", "max-pool", "gate", or "added" where it
            is itself what another adds; empty if it runs alone.
        reason: why it runs alone.
    """

    name: str
    fused: tuple[str, ...] = ()
    reason: str = ""


def fuse(lowered: Lowered, nodes: Iterator[fx.Node]) -> list[NormUse]:
    """Puts wide BatchNorms and what follows them into one call each, in place.

    Args:
        lowered: the graph.
        nodes: of the teacher's graph that are normalisations.
    """
    uses, added, calls = {}, set(), []
    for node in nodes:
        name = lowered.norms.get(node, module_path(node))
        if node not in lowered.norms:
            uses[node] = NormUse(name, reason=_no_kernel(node))
            continue
        pattern = match(lowered, node)
        if pattern.parts:
            added.update(pattern.residual or [])
            calls.append(_rewrite(lowered, pattern))
            uses[node] = NormUse(name, pattern.parts)
        else:
            uses[node] = NormUse(name, reason=why_alone(lowered, node))
    for node, use in uses.items():
        if node in lowered.norms and not use.fused and added.issuperset(lowered.values[node]):
            (call,) = {part.args[0] for part in lowered.values[node]}
            assert isinstance(call, fx.Node)
            call.kwargs = {"activation": "identity"}
            uses[node] = replace(use, fused=("added",), reason="")
    for fused in calls:
        _hand_out_twice(lowered, fused)
    return list(uses.values())


def _hand_out_twice(lowered: Lowered, fused: fx.Node) -> None:
    """Gives each of two readers of a fused call's results its own, so that its backward pass adds up their gradients.

    A value that is read by the next convolution and the next add has two. Wide modules alone read without changing in place.
    """
    parts = sorted(fused.users, key=lambda part: int(part.args[1]))  # type: ignore[arg-type]
    readers = list(parts[0].users)
    if len(readers) < 2 or any(list(part.users) != readers for part in parts):
        return
    if not all(_is_wide(lowered, reader) for reader in readers):
        return
    fused.kwargs = {**fused.kwargs, "readers": 2}
    for position, part in enumerate(parts):
        with lowered.graph.inserting_after(part):
            twin = lowered.graph.call_function(operator.getitem, (fused, len(parts) + position))
        for reader in readers[1:]:
            reader.replace_input_with(part, twin)


def _is_wide(lowered: Lowered, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    return isinstance(lowered.network.get_submodule(str(node.target)), (WideLayer, WideBatchNorm, GroupedLayer))


def _no_kernel(node: fx.Node) -> str:
    if op_name(node) == "batch_norm":
        return "its parameters or statistics are used elsewhere too, or by another mode in another way"
    return f"{op_name(node)} has no fused operation"


def _rewrite(lowered: Lowered, pattern: Pattern) -> fx.Node:
    """Replaces the calls of a pattern by one, which it returns."""
    graph, values = lowered.graph, lowered.values
    (call,) = {part.args[0] for part in values[pattern.norm]}
    assert isinstance(call, fx.Node)
    kwargs: dict[str, Any] = {"activation": pattern.activation}
    old = list(values[pattern.last])
    if pattern.gate is not None:
        old = sorted(pattern.gate.users, key=lambda part: int(part.args[1]))  # type: ignore[arg-type]
    start = call
    if pattern.residual is not None:
        kwargs["residual"] = tuple(pattern.residual)
        start = values[pattern.middle[0]][0]
    if pattern.pool is not None:
        kwargs["pool"] = pattern.pool
    with graph.inserting_before(start):
        if pattern.gate is not None:
            kwargs["gates"] = pattern.gate.args[0]
            kwargs["gate"] = graph.get_attr(str(pattern.gate.target))
        fused = graph.call_module(str(call.target), call.args, kwargs)
        new = [graph.call_function(operator.getitem, (fused, t)) for t in range(len(old))]
    for before, after in zip(old, new, strict=True):
        before.replace_all_uses_with(after)
    stages = [values[node] for node in (pattern.norm, *pattern.middle)]
    doomed = [call, *(part for stage in stages for part in stage)]
    doomed += [] if pattern.gate is None else [pattern.gate, *old]
    for node in reversed(doomed):
        graph.erase_node(node)
    return fused

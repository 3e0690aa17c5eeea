"""BatchNorms and the patterns that follow them as one operation each, in a lowered graph."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from fastmerge.lowering.patterns import Lowered, Pattern, match, why_alone
from fastmerge.wide.norms import WideBatchNorm


@dataclass(frozen=True)
class NormUse:
    """One call of a normalisation in a network's training forward.

    Attributes:
        name: its path, or the name of the functional call.
        fused: what runs in one operation with it: "add", "ReLU", "max-pool", "gate", or "added" where it is itself what
            another adds; empty if it runs alone.
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
    uses, wide, added = {}, set(), set()
    for node in nodes:
        name = str(node.target) if node.op == "call_module" else node.name
        module = lowered.network.get_submodule(name) if node.op == "call_module" else None
        if not isinstance(module, WideBatchNorm):
            uses[node] = NormUse(name, reason=_no_kernel(node, module))
            continue
        wide.add(node)
        pattern = match(lowered, node)
        if pattern.parts:
            added.update(pattern.residual or [])
            _rewrite(lowered, pattern)
            uses[node] = NormUse(name, pattern.parts)
        else:
            uses[node] = NormUse(name, reason=why_alone(lowered, node))
    for node, use in uses.items():
        if node in wide and not use.fused and added.issuperset(lowered.values[node]):
            (call,) = {part.args[0] for part in lowered.values[node]}
            assert isinstance(call, fx.Node)
            call.kwargs = {"activation": "identity"}
            uses[node] = replace(use, fused=("added",), reason="")
    return list(uses.values())


def _no_kernel(node: fx.Node, module: nn.Module | None) -> str:
    if module is None:
        return "called as a function, with parameters of the network's own"
    if isinstance(module, nn.ModuleList):
        module = module[0]
    return f"{type(module).__name__} has no fused operation"


def _rewrite(lowered: Lowered, pattern: Pattern) -> None:
    graph, values = lowered.graph, lowered.values
    (call,) = {part.args[0] for part in values[pattern.norm]}
    assert isinstance(call, fx.Node)
    kwargs: dict[str, Any] = {"activation": "relu" if pattern.relu else "identity"}
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

"""BatchNorms together with what follows them: [add] → [ReLU] → [max-pool] → [gate], found in a lowered graph.

A pattern is taken where every value in it has one reader, so that nobody misses what is no longer computed: a value that is
also read without its gate, or by a second operation, ends the pattern before it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastmerge.wide.channelwise import writes_in_place
from fastmerge.wide.norms import WideBatchNorm
from fastmerge.wide.streams import GateStreams

_RELU = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_", nn.ReLU}
_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_ADD_IN_PLACE = {operator.iadd, "add_"}
_POOL_ARGUMENTS = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")


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


@dataclass
class Lowered:
    """What a teacher's graph became.

    Attributes:
        graph: the lowered graph.
        values: per node of the teacher's graph the lowered nodes of its value, before gating.
        gates: per node of the teacher's graph the lowered call that gates its value, if any.
        shapes: per node of the teacher's graph its shape for one teacher.
        root: the teacher.
        network: the wide modules.
    """

    graph: fx.Graph
    values: Mapping[fx.Node, list[fx.Node]]
    gates: Mapping[fx.Node, fx.Node]
    shapes: Mapping[fx.Node, tuple[int, ...]]
    root: nn.Module
    network: nn.Module


@dataclass
class _Pattern:
    """A normalisation and what follows it.

    Attributes:
        norm: the normalisation's node in the teacher's graph.
        last: the last node that is part of the pattern.
        residual: the lowered nodes of what is added, if anything.
        relu: whether a ReLU follows.
        pool: arguments of the max-pooling, if one follows.
        gate: the lowered call of the gate, if one follows.
        middle: the nodes after the normalisation.
    """

    norm: fx.Node
    last: fx.Node
    residual: list[fx.Node] | None = None
    relu: bool = False
    pool: tuple[Any, Any, Any] | None = None
    gate: fx.Node | None = None
    middle: list[fx.Node] = field(default_factory=list)

    @property
    def parts(self) -> tuple[str, ...]:
        present = {
            "add": self.residual is not None,
            "ReLU": self.relu,
            "max-pool": self.pool is not None,
            "gate": self.gate is not None,
        }
        return tuple(name for name, there in present.items() if there)


def fuse(lowered: Lowered, nodes: Iterator[fx.Node]) -> list[NormUse]:
    """Puts wide BatchNorms and what follows them into one call each, in place.

    Args:
        lowered: the graph.
        nodes: of the teacher's graph that are normalisations.
    """
    uses, added = {}, set()
    for node in nodes:
        name = str(node.target) if node.op == "call_module" else node.name
        module = lowered.network.get_submodule(name) if node.op == "call_module" else None
        if not isinstance(module, WideBatchNorm):
            uses[node] = NormUse(name, reason=_no_kernel(node, module))
            continue
        pattern = _match(lowered, node)
        if pattern.parts:
            added.update(pattern.residual or [])
            _rewrite(lowered, pattern)
            uses[node] = NormUse(name, pattern.parts)
        else:
            uses[node] = NormUse(name, reason=_reason(lowered, node))
    for node, use in uses.items():
        if not use.fused and added.issuperset(lowered.values.get(node, [node])):
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


def _match(lowered: Lowered, norm: fx.Node) -> _Pattern:
    pattern = _Pattern(norm, norm)

    def extend(node: fx.Node) -> None:
        pattern.middle.append(node)
        pattern.last = node

    user = _only_user(lowered, norm)
    if user is not None and (residual := _residual(lowered, norm, user)) is not None:
        pattern.residual = residual
        extend(user)
        user = _only_user(lowered, user)
    if user is not None and _target(lowered, user) in _RELU:
        pattern.relu = True
        extend(user)
        user = _only_user(lowered, user)
    if user is not None and pattern.relu and pattern.residual is None and (pool := _pool(lowered, user)) is not None:
        pattern.pool = pool
        extend(user)
    gate = lowered.gates.get(pattern.last)
    if gate is not None and all(set(part.users) == {gate} for part in lowered.values[pattern.last]):
        module = lowered.network.get_submodule(str(gate.target))
        assert isinstance(module, GateStreams)
        rank = len(lowered.shapes[pattern.last])
        if module.sample_dim == 0 and module.channel_dim % rank == 1:
            pattern.gate = gate
    return pattern


def _target(lowered: Lowered, node: fx.Node) -> Any:
    return type(lowered.root.get_submodule(str(node.target))) if node.op == "call_module" else node.target


def _only_user(lowered: Lowered, node: fx.Node) -> fx.Node | None:
    """The one operation that reads a value, stream by stream, if there is one."""
    parts = lowered.values[node]
    for user in node.users:
        theirs = lowered.values.get(user, [])
        if len(theirs) == len(parts) and all(
            list(part.users) == [their] for part, their in zip(parts, theirs, strict=True)
        ):
            return user
    return None


def _residual(lowered: Lowered, norm: fx.Node, user: fx.Node) -> list[fx.Node] | None:
    """The lowered nodes of what is added to a normalisation's output, if it is a plain sum of two values of one shape."""
    if user.target not in _ADD or len(user.args) != 2 or user.kwargs or user.op == "call_module":
        return None
    first, second = user.args
    if first is second or not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return None
    if user.target in _ADD_IN_PLACE and first is not norm:
        return None
    shapes = {lowered.shapes.get(node) for node in (first, second, user)}
    if len(shapes) != 1 or _moves_past_a_change(lowered, norm, user):
        return None
    position = 1 if first is norm else 0
    residual = [part.args[position] for part in lowered.values[user]]
    return [node for node in residual if isinstance(node, fx.Node)]


def _moves_past_a_change(lowered: Lowered, norm: fx.Node, user: fx.Node) -> bool:
    """Whether a normalisation computed where its output is added might read, or count, something else than in its place."""
    nodes = list(norm.graph.nodes)
    between = nodes[nodes.index(norm) + 1 : nodes.index(user)]
    return any(
        (node.op == "call_module" and node.target == norm.target) or writes_in_place(node, lowered.root)
        for node in between
    )


def _pool(lowered: Lowered, node: fx.Node) -> tuple[Any, Any, Any] | None:
    """Kernel size, stride and padding of a plain max-pooling in two dimensions."""
    if node.op == "call_module":
        module = lowered.root.get_submodule(str(node.target))
        if type(module) is not nn.MaxPool2d:
            return None
        options = {name: getattr(module, name) for name in _POOL_ARGUMENTS[1:]}
    elif node.target is F.max_pool2d:
        options = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}
        options |= {**dict(zip(_POOL_ARGUMENTS, node.args, strict=False)), **node.kwargs}
        if any(isinstance(value, fx.Node) for name, value in options.items() if name != "input"):
            return None
    else:
        return None
    plain = options["dilation"] in (1, (1, 1), [1, 1]) and not options["ceil_mode"] and not options["return_indices"]
    kernel_size = options["kernel_size"]
    return (kernel_size, options["stride"] or kernel_size, options["padding"]) if plain else None


def _rewrite(lowered: Lowered, pattern: _Pattern) -> None:
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


def _reason(lowered: Lowered, norm: fx.Node) -> str:
    """Why nothing was found to run with a normalisation."""
    users = list(norm.users)
    if len(users) == 1 and (user := _only_user(lowered, norm)) is not None:
        target = _target(lowered, user)
        what = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        return f"followed by {what}; what can follow is an add of two tensors, a ReLU, a max-pooling after it, a gate"
    names = ", ".join(user.name for user in users)
    return f"its output is read by {names}, and not all of that with its gate"

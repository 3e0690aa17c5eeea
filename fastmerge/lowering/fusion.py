"""BatchNorms and the patterns that follow them as one operation each, in a lowered graph.

The pattern is [add] → [activation] → [max-pool] → [gate]. It is taken where every value in it has one reader, so that nobody
misses what is no longer computed: a value that is also read without its gate, or by a second operation, ends the pattern
before it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from fastmerge.channels.aten import ACTIVATIONS, bind, op_name, writes_in_place
from fastmerge.channels.traced_network import module_path
from fastmerge.wide.layers import GroupedLayer, WideLayer
from fastmerge.wide.norms import WideBatchNorm
from fastmerge.wide.streams import GateStreams

_OTHER_ACTIVATIONS = {*ACTIVATIONS, "prelu", "glu", "softmax"}
# What a fused operation includes: its names, and how they are written in what is reported.
FUSED_ACTIVATIONS = {"relu": "ReLU", "relu6": "ReLU6", "silu": "SiLU", "hardswish": "Hardswish"}


@dataclass
class Lowered:
    """What a teacher's graph became.

    Attributes:
        graph: the lowered graph.
        values: per node of the teacher's graph the lowered nodes of its value, before gating.
        gates: per node of the teacher's graph the lowered call that gates its value, if any.
        shapes: per node of the teacher's graph its shape for one teacher.
        norms: per node of the teacher's graph that is a wide BatchNorm the path of its module.
        network: the wide modules.
    """

    graph: fx.Graph
    values: Mapping[fx.Node, list[fx.Node]]
    gates: Mapping[fx.Node, fx.Node]
    shapes: Mapping[fx.Node, tuple[int, ...]]
    norms: Mapping[fx.Node, str]
    network: nn.Module


@dataclass
class Pattern:
    """A normalisation and what follows it.

    Attributes:
        norm: the normalisation's node in the teacher's graph.
        residual: the lowered nodes of what is added, if anything.
        activation: of ``FUSED_ACTIVATIONS``, or "identity" if none follows.
        pool: arguments of the max-pooling, if one follows.
        gate: the lowered call of the gate, if one follows.
        middle: the nodes after the normalisation.
    """

    norm: fx.Node
    residual: list[fx.Node] | None = None
    activation: str = "identity"
    pool: tuple[Any, Any, Any] | None = None
    gate: fx.Node | None = None
    middle: list[fx.Node] = field(default_factory=list)

    @property
    def last(self) -> fx.Node:
        """The last node that is part of the pattern."""
        return self.middle[-1] if self.middle else self.norm

    @property
    def parts(self) -> tuple[str, ...]:
        present = {
            "add": self.residual is not None,
            FUSED_ACTIVATIONS.get(self.activation, ""): self.activation != "identity",
            "max-pool": self.pool is not None,
            "gate": self.gate is not None,
        }
        return tuple(name for name, there in present.items() if there)


def match(lowered: Lowered, norm: fx.Node) -> Pattern:
    """The longest pattern after a normalisation; without parts if there is none."""
    pattern = Pattern(norm)
    user = _only_user(lowered, norm)
    if user is not None and (residual := _residual(lowered, norm, user)) is not None:
        pattern.residual = residual
        pattern.middle.append(user)
    activation, nodes = _activation(lowered, pattern.last)
    if nodes:
        pattern.activation = activation
        pattern.middle.extend(nodes)
    user = _only_user(lowered, pattern.last)
    if user is not None and nodes and pattern.residual is None and (pool := _pool(lowered, user)) is not None:
        pattern.pool = pool
        pattern.middle.append(user)
    gate = lowered.gates.get(pattern.last)
    if gate is not None and all(set(part.users) == {gate} for part in lowered.values[pattern.last]):
        module = lowered.network.get_submodule(str(gate.target))
        assert isinstance(module, GateStreams)
        rank = len(lowered.shapes[pattern.last])
        if module.sample_dim == 0 and not module.samples_are_fast and module.channel_dim % rank == 1:
            pattern.gate = gate
    return pattern


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


def _activation(lowered: Lowered, node: fx.Node) -> tuple[str, list[fx.Node]]:
    """The activation that alone reads a value, and the nodes that make it; no nodes if there is none to fuse.

    Clamping to 0 and 6 is not ReLU6: at both ends its gradient passes. SiLU may be written as x · sigmoid(x).
    """
    user = _only_user(lowered, node)
    if user is not None:
        name, options = op_name(user), bind(user) if op_name(user) == "hardtanh" else {}
        if (options.get("min_val"), options.get("max_val")) == (0, 6):
            name = "relu6"
        return name, [user] if name in FUSED_ACTIVATIONS else []
    users = list(node.users)
    if [op_name(n) for n in users] != ["sigmoid", "mul"] or _only_user(lowered, users[0]) is not users[1]:
        return "", []
    parts = [lowered.values[n] for n in (node, *users)]
    alone = all(set(part.users) == {own, product} for part, own, product in zip(*parts, strict=True))
    return "silu", users if alone else []


def _residual(lowered: Lowered, norm: fx.Node, user: fx.Node) -> list[fx.Node] | None:
    """The lowered nodes of what is added to a normalisation's output, if it is a plain sum of two values of one shape."""
    if op_name(user) != "add" or len(user.args) != 2 or user.kwargs:
        return None
    first, second = user.args
    if first is second or not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return None
    if writes_in_place(user) and first is not norm:
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
    return any(lowered.norms.get(node) == lowered.norms[norm] or writes_in_place(node) for node in between)


def _pool(lowered: Lowered, node: fx.Node) -> tuple[Any, Any, Any] | None:
    """Kernel size, stride and padding of a plain max-pooling in two dimensions."""
    if op_name(node) != "max_pool2d":
        return None
    options = bind(node)
    if any(isinstance(value, fx.Node) for name, value in options.items() if name != "self"):
        return None
    plain = options["dilation"] in (1, [1], [1, 1]) and not options["ceil_mode"]
    kernel_size, stride, padding = (_pair(options[name]) for name in ("kernel_size", "stride", "padding"))
    return (kernel_size, stride or kernel_size, padding) if plain else None


def _pair(value: Any) -> Any:
    """An int or ints as the fused operation takes them: a tuple, of two where there is one."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * 2 if len(values) == 1 else values


def _why_alone(lowered: Lowered, norm: fx.Node) -> str:
    """Why no pattern was found after a normalisation."""
    user = _only_user(lowered, norm)
    if user is None:
        readers = [module_path(node) or op_name(node) for node in norm.users]
        if len(readers) == 1:
            return f"followed by {readers[0]}, which reads it without a gate, or gates another dimension"
        return f"read by {' and '.join(readers)}; what is fused has one reader, or layers alone, all with its gate"
    name = op_name(user)
    if name in _OTHER_ACTIVATIONS:
        return f"the activation after it is {name}, which no fused operation includes"
    if name == "add":
        return "the add after it is not the sum of two tensors of one shape, made where both are complete"
    if name == "max_pool2d":
        return "a max-pooling after it has a fused operation only where there is an activation between them"
    return f"followed by {name}, which no fused operation includes"


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
            uses[node] = NormUse(name, reason=_why_alone(lowered, node))
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

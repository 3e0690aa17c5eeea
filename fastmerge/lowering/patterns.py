"""The patterns [add] → [activation] → [max-pool] → [gate] after a BatchNorm, or why there is none.

A pattern is taken where every value in it has one reader, so that nobody misses what is no longer computed: a value that is
also read without its gate, or by a second operation, ends the pattern before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from fastmerge.channels.aten import ACTIVATIONS, bind, op_name, writes_in_place
from fastmerge.channels.traced_network import module_path
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


def why_alone(lowered: Lowered, norm: fx.Node) -> str:
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

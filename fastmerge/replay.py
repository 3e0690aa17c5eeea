"""A function of tensors as the list of operations that it runs, without what it takes to find them out.

A training step written with ``torch.func`` spends most of its time in Python where networks are small: modules,
``vmap``, ``grad``. Traced once, the step is a few dozen ATen operations; calling those alone takes a fraction of the
time, and gives the same numbers. On a CUDA device they are captured as a graph, and one launch replays them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fastmerge.cpu_convolutions import split_convolutions

_aten = torch.ops.aten
_VIEWS = (
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.expand.default,
    _aten.alias.default,
    _aten.detach.default,
)


def replayed(function: Callable[..., Sequence[Tensor]], *examples: Tensor, replicates: int = 1) -> Callable[..., Any]:
    """Traces a function of tensors and returns one that runs its operations alone.

    Random numbers are drawn anew in every call. What the function changes in place (BatchNorm's statistics) is changed
    in every call, too.

    Args:
        function: takes tensors, returns a sequence of tensors. Its control flow is that of the examples.
        examples: arguments of the shapes, dtypes and devices of all calls to come; they are not changed.
        replicates: how many networks are stacked in the function, which tells how to run its convolutions on a CPU.

    Returns:
        A function of the same arguments that returns a tuple of tensors, to be called without gradients enabled.
    """
    devices = {tensor.device.index for tensor in examples if tensor.is_cuda}
    # One mode keeps the shapes of all results: without it, each result makes one of its own, which takes half of the time.
    context = tracing(TracingContext(FakeTensorMode()))
    with torch.random.fork_rng(devices=sorted(devices)), context:
        module = make_fx(function)(*[tensor.clone() for tensor in examples])
    _simplify(module.graph)
    if not devices and replicates > 1:
        split_convolutions(module.graph, replicates)
    module.graph.lint()
    return _compile(module)


def _simplify(graph: fx.Graph) -> None:
    """Removes operations that change nothing; what is left computes bit by bit the same."""
    ones: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
            ones.clear()
        if node.target is _aten.ones_like.default or (node.target in _VIEWS and node.args[0] in ones):
            ones.add(node)
        source = _same_as(node, ones)
        if source is not None:
            node.replace_all_uses_with(source)
    graph.eliminate_dead_code()


def _same_as(node: fx.Node, ones: set[fx.Node]) -> fx.Node | None:
    """The argument that a node returns unchanged, if it does."""
    target, args = node.target, cast(Any, node.args)
    if target in _VIEWS:
        return cast(fx.Node, args[0]) if _same_layout(node, args[0]) else None
    if target is _aten.transpose.int:
        before = args[0]
        undone = before.target is _aten.transpose.int and set(before.args[1:]) == set(args[1:])
        return before.args[0] if undone else None
    if target is _aten.mul.Scalar and args[1] == 1:
        return args[0] if _same_layout(node, args[0]) else None
    if target is _aten.mul.Tensor:
        for factor, other in (args, args[::-1]):
            if factor in ones and isinstance(other, fx.Node) and _same_layout(node, other):
                return other
    return None


def _same_layout(node: fx.Node, other: Any) -> bool:
    mine, its = node.meta.get("val"), other.meta.get("val") if isinstance(other, fx.Node) else None
    if not (isinstance(mine, Tensor) and isinstance(its, Tensor)):
        return False
    return mine.shape == its.shape and mine.stride() == its.stride() and mine.dtype == its.dtype


def _compile(module: fx.GraphModule) -> Callable[..., Any]:
    """Writes the graph as a Python function that calls the operators' C++ bindings and frees what is read no more."""
    namespace: dict[str, Any] = {}
    last_reader = {source: node for node in module.graph.nodes for source in node.all_input_nodes}
    arguments, lines = [], []

    def constant(value: Any) -> str:
        name = f"constant_{len(namespace)}"
        namespace[name] = value
        return name

    def write(value: Any) -> str:
        if isinstance(value, fx.Node):
            return value.name
        if isinstance(value, (list, tuple)):
            return f"({''.join(f'{write(item)}, ' for item in value)})"
        return repr(value) if value is None or type(value) in (bool, int) else constant(value)

    for node in module.graph.nodes:
        if node.op == "placeholder":
            arguments.append(node.name)
        elif node.op == "get_attr":
            namespace[node.name] = getattr(module, node.target)
        elif node.op == "call_function":
            call = constant(getattr(node.target, "_op", node.target))
            given = [write(value) for value in node.args]
            given += [f"{key}={write(value)}" for key, value in node.kwargs.items()]
            lines.append(f"{node.name} = {call}({', '.join(given)})")
            done = [s.name for s in node.all_input_nodes if last_reader[s] is node and s.op == "call_function"]
            lines += [f"del {', '.join(done)}"] if done else []
        else:
            lines.append(f"return {write(tuple(node.args[0]))}")
    source = "\n    ".join([f"def replay({', '.join(arguments)}):", *lines])
    exec(compile(source, "<replayed function>", "exec"), namespace)
    replay: Callable[..., Any] = namespace["replay"]
    return replay

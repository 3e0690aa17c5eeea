"""Which operations change a tensor in place, and whether it matters how that tensor lies in memory."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable

import torch
from torch import fx, nn

_IN_PLACE_FUNCTIONS = {
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow),
    *(operator.iand, operator.ior, operator.ixor, operator.setitem),
}


def writes_in_place(node: fx.Node, root: nn.Module) -> bool:
    """Whether an operation changes one of its operands."""
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    if node.op != "call_function":
        return False
    if node.target in _IN_PLACE_FUNCTIONS or node.kwargs.get("out") is not None:
        return True
    name = getattr(node.target, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or _in_place_argument(node)


def changes_reshaped(graph: fx.Graph, root: nn.Module, is_layer: Callable[[fx.Node], bool]) -> bool:
    """Whether an operation in place may reach a tensor through its reshaped view: the layout decides whether that is one."""
    reshapes = {"view", "reshape", "flatten", torch.reshape, torch.flatten, nn.Flatten, nn.Unflatten, "unflatten"}
    for changing in graph.nodes:
        waiting = list(changing.all_input_nodes) if writes_in_place(changing, root) else []
        seen = set(waiting)
        while waiting:
            node = waiting.pop()
            target = type(root.get_submodule(str(node.target))) if node.op == "call_module" else node.target
            if target in reshapes:
                return True
            sources = [] if is_layer(node) else [s for s in node.all_input_nodes if s not in seen]
            waiting += sources
            seen.update(sources)
    return False


def _in_place_argument(node: fx.Node) -> bool:
    if "inplace" in node.kwargs:
        return bool(node.kwargs["inplace"])
    try:
        names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a builtin
        return False
    return "inplace" in names and bool(dict(zip(names, node.args, strict=False)).get("inplace", False))

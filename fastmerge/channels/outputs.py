"""What a network returns: predictions, which the big student gives the teachers' mean of, and what it returns beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from fastmerge.channels.aten import is_size
from fastmerge.channels.traced_network import TracedNetwork, numbered

Name = str | int | tuple[str | int, ...]


def predictions(traced: TracedNetwork, names: Sequence[Name] | None = None) -> dict[str, frozenset[int]]:
    """The outputs that are predictions: per mode their positions among the flat outputs.

    Args:
        traced: the network.
        names: which they are: a key of a dict, an attribute of a dataclass, a position in a tuple, or a tuple of such names
            that leads to a nested one. None: those that no parameter follows, so that feature maps on the way are left out.

    Raises:
        ValueError: if a name fits no output.
    """
    found = {mode: frozenset(_of_mode(traced, mode, names)) for mode in traced.graphs}
    if names is not None:
        every = {path for mode in traced.graphs for path in _paths(traced.out_specs[mode])}
        for name in names:
            wanted = name if isinstance(name, tuple) else (name,)
            if not any(path[: len(wanted)] == wanted for path in every):
                known = ", ".join(repr(path[0] if len(path) == 1 else path) for path in sorted(every, key=str) if path)
                raise ValueError(
                    f"outputs names {wanted}, which the network does not return; it returns {known or 'one tensor'}"
                )
    return found


def _of_mode(traced: TracedNetwork, mode: str, names: Sequence[Name] | None) -> set[int]:
    nodes = {
        k: node for k, node in enumerate(traced.outputs(mode)) if isinstance(node, fx.Node) and "shape" in node.meta
    }
    if names is None:
        followed = _followed(traced, mode)
        last = {k for k, node in nodes.items() if node not in followed}
        return last or set(nodes)
    paths = _paths(traced.out_specs[mode])
    wanted = [name if isinstance(name, tuple) else (name,) for name in names]
    named = {k for k in nodes if any(paths[k][: len(name)] == name for name in wanted)}
    return named or _of_mode(traced, mode, None)  # a mode that returns something else, such as one tensor


def _followed(traced: TracedNetwork, mode: str) -> set[fx.Node]:
    """The values that reach another operation on a parameter."""
    graph = traced.graphs[mode]
    parameters = {name for name, _ in traced.root.named_parameters(remove_duplicate=False)}
    followed: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function":
            continue
        own = any(s.op == "get_attr" and str(s.target) in parameters for s in node.all_input_nodes)
        if own or node in followed:
            followed.update(s for s in node.all_input_nodes if s.op != "get_attr" and not is_size(s))
    return followed


def _paths(spec: Any) -> list[tuple[str | int, ...]]:
    """Where each output lies in what the network returns."""
    return [tuple(_name(key) for key in path) for path, _ in pytree.tree_flatten_with_path(numbered(spec))[0]]


def _name(key: Any) -> str | int:
    if isinstance(key, pytree.SequenceKey):
        return key.idx
    return str(key.name) if isinstance(key, pytree.GetAttrKey) else key.key

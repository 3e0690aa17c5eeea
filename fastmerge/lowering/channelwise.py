"""Which operations treat each channel alone, so that they may run once on a joined tensor instead of once per stream.

A list of what is known to be so; whatever is not on it runs per stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fastmerge.channels.aten import (
    NORMS,
    RESHAPES,
    SAME,
    SPATIAL,
    SPATIAL_DROPOUTS,
    bind,
    is_pointwise,
    is_size,
    may_alias,
    op_name,
    writes_in_place,
)
from fastmerge.wide.streams import concatenate_joined

Shape = tuple[int, ...]
_SPATIAL_DIMS = {f"{name}{d}d": d for name in SPATIAL for d in (1, 2, 3)}
_REDUCTIONS = {"mean", "sum", "amax", "amin"}
_RESHAPED = {*RESHAPES, "flatten", "unflatten"}


@dataclass(frozen=True)
class Placement:
    """Where the channels lie in a joined tensor.

    Attributes:
        dim: the dimension, from 0.
        channels: of one teacher.
        rank: number of dimensions.
    """

    dim: int
    channels: int
    rank: int


@dataclass(frozen=True)
class JoinedCall:
    """An operation to run on joined tensors.

    Attributes:
        placement: of the result.
        may_alias: whether the result may share memory with what it was computed from.
        call: what to emit instead of the operation itself: a function and its further arguments; None: the operation.
    """

    placement: Placement
    may_alias: bool = False
    call: tuple[Callable[..., Any], tuple[Any, ...]] | None = None


def joined_call(
    node: fx.Node, operands: Mapping[fx.Node, Placement], shape: Shape | None, num_teachers: int
) -> JoinedCall | None:
    """How an operation runs on joined tensors; None if it must run per stream.

    Args:
        node: of a teacher's graph; not a layer.
        operands: those of its operands that are joined.
        shape: of one teacher's result, if it is a tensor.
        num_teachers: T.
    """
    tensors = [source for source in node.all_input_nodes if not is_size(source)]
    if shape is None or not operands or any(source not in operands for source in tensors):
        return None
    name, placements = op_name(node), list(operands.values())
    first = placements[0]
    result = replace(first, rank=len(shape))
    if is_pointwise(name) or name in SAME:
        fits = set(placements) == {first} and len(shape) == first.rank
        return JoinedCall(result, may_alias(node)) if fits and name != "type_as" else None
    if name in _SPATIAL_DIMS or name in SPATIAL_DROPOUTS:
        spatial = _SPATIAL_DIMS.get(name, first.rank - 2)
        fits = len(placements) == 1 and first.dim == 1 and first.rank == spatial + 2 == len(shape)
        return JoinedCall(result) if fits else None
    if name.startswith(("upsample_", "_upsample_")):
        return JoinedCall(result) if len(placements) == 1 and first.dim == 1 and first.rank > 2 else None
    if name in ("pad", "constant_pad_nd"):
        return JoinedCall(result) if first.dim < first.rank - len(bind(node)["pad"]) // 2 else None
    if name == "flatten":
        return _flatten(node, first, shape)
    if name in RESHAPES:
        return _flattening_view(node, first, shape)
    if name in _REDUCTIONS:
        return _reduction(node, first, shape)
    if name in ("cat", "concat", "concatenate"):
        return _concatenation(node, placements, shape, num_teachers)
    return None


def is_norm(node: fx.Node) -> bool:
    """Whether an operation is a batch, group or instance normalisation."""
    return op_name(node) in NORMS


def changes_reshaped(graph: fx.Graph, is_layer: Callable[[fx.Node], bool]) -> bool:
    """Whether an operation in place may reach a tensor through its reshaped view: the layout decides whether that is one."""
    reshaped: set[fx.Node] = set()  # what may be such a view, or is computed from one
    for node in graph.nodes:
        reads = not reshaped.isdisjoint(node.all_input_nodes)
        if reads and writes_in_place(node):
            return True
        if op_name(node) in _RESHAPED or (reads and not is_layer(node)):
            reshaped.add(node)
    return False


def _flatten(node: fx.Node, place: Placement, shape: Shape) -> JoinedCall | None:
    """All dimensions from the channels' on become one, or some after it."""
    arguments = bind(node)
    start, end = arguments["start_dim"] % place.rank, arguments["end_dim"] % place.rank
    if start < place.dim <= end or end < place.dim:
        return None
    return JoinedCall(Placement(place.dim, shape[place.dim], len(shape)), may_alias=True)


def _flattening_view(node: fx.Node, place: Placement, shape: Shape) -> JoinedCall | None:
    """``x.view(x.size(0), -1)`` and the like, which is ``x.flatten(1)``."""
    sizes = node.args[1] if len(node.args) > 1 else None
    if not isinstance(sizes, (tuple, list)) or len(sizes) != 2 or len(shape) != 2 or place.dim != 1:
        return None
    if not isinstance(sizes[0], fx.Node) or op_name(sizes[0]) != "sym_size" or sizes[1] != -1:
        return None
    return JoinedCall(Placement(1, shape[1], 2), may_alias=True, call=(torch.flatten, (1,)))


def is_flattening(node: fx.Node) -> bool:
    """Whether an operation is ``x.flatten(1)``, written as a view that may have the number of channels in it."""
    sizes = node.args[1] if op_name(node) in RESHAPES and len(node.args) > 1 else None
    before = node.args[0].meta.get("shape") if node.args and isinstance(node.args[0], fx.Node) else None
    if not isinstance(sizes, (tuple, list)) or len(sizes) != 2 or before is None or len(before) < 2:
        return False
    shape = (before[0], math.prod(before[1:]))
    is_batch = sizes[0] == -1 or (isinstance(sizes[0], fx.Node) and op_name(sizes[0]) == "sym_size")
    return is_batch and sizes[1] in (-1, shape[1]) and node.meta.get("shape") == shape


def _reduction(node: fx.Node, place: Placement, shape: Shape) -> JoinedCall | None:
    dims = bind(node).get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    if not isinstance(dims, (tuple, list)) or not dims:
        return None
    reduced = {d % place.rank for d in dims}
    if place.dim in reduced:
        return None
    gone = 0 if len(shape) == place.rank else sum(d < place.dim for d in reduced)
    return JoinedCall(Placement(place.dim - gone, place.channels, len(shape)))


def _concatenation(node: fx.Node, placements: list[Placement], shape: Shape, num_teachers: int) -> JoinedCall | None:
    dim, first = bind(node)["dim"], placements[0]
    if any((p.dim, p.rank) != (first.dim, first.rank) for p in placements):
        return None
    if dim % first.rank != first.dim:
        return JoinedCall(first) if set(placements) == {first} else None
    call = (concatenate_joined, (num_teachers, first.dim))
    return JoinedCall(Placement(first.dim, shape[first.dim], first.rank), call=call)

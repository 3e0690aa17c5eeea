"""Example inputs for running a network once: the user's own, or inferred from its first layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from fastmerge.channels.layer_calls import LayerCall, layer_call, parameter_names
from fastmerge.channels.tracing import TracedNetwork, undisturbed

_SIZES = (64, 32, 28, 96, 128, 224, 299, 16, 8, 48, 256, 20, 24, 40, 56, 84, 112, 160, 192, 384, 512)


def infer_example_inputs(traced: TracedNetwork, given: Any = None) -> tuple[Any, ...]:
    """The inputs to run the network with once.

    Args:
        traced: the network.
        given: a tensor, a tuple or list of tensors, or None to infer.

    Raises:
        TypeError: if what is given is not tensors.
        ValueError: if nothing is given and it can't be inferred, or the network does not run on what is given.
    """
    name = type(traced.root).__name__
    if given is not None:
        inputs = (given,) if isinstance(given, Tensor) else tuple(given) if isinstance(given, (tuple, list)) else None
        if not inputs or not all(isinstance(x, Tensor) for x in inputs):
            raise TypeError(f"example_inputs needs a tensor or a tuple of tensors; got {type(given).__name__}")
        inputs = tuple(torch.cat([x, x]) if x.dim() and x.shape[0] == 1 else x for x in inputs)
        error = _failure(traced, inputs)
        if error is not None:
            shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
            raise ValueError(f"{name} does not run on the example_inputs of shape {shapes}: {error}")
        return inputs
    last_error: Exception | None = None
    for candidate in _candidates(traced):
        last_error = _failure(traced, (candidate,), keeps_batch=True)
        if last_error is None:
            return (candidate,)
    raise ValueError(
        f"the input of {name} can't be inferred from its first layer"
        + (f" (last try: {str(last_error).splitlines()[0]})" if last_error else "")
        + "; pass example_inputs=x, a tensor (N, C, ...) or a tuple of tensors that its forward takes"
    )


def _failure(traced: TracedNetwork, inputs: tuple[Any, ...], keeps_batch: bool = False) -> Exception | None:
    """Why the network does not run on these inputs, if so.

    Args:
        traced: the network.
        inputs: what its forward takes.
        keeps_batch: whether a batch that changes its size on the way is a failure: ``x.view(-1, 400)`` accepts images of a
            wrong size that way.
    """
    with undisturbed(inputs):
        for mode in ("eval", "train"):
            try:
                out = fx.Interpreter(**traced.in_mode(mode)).run(*inputs)
            except Exception as error:  # whatever the user's forward raises on a wrong shape
                return error
            sizes = [y.shape[0] for y in tree_leaves(out) if isinstance(y, Tensor) and y.dim()]
            if keeps_batch and any(size != inputs[0].shape[0] for size in sizes):
                return ValueError(f"a batch of {inputs[0].shape[0]} comes out as {sizes}")
    return None


def _candidates(traced: TracedNetwork) -> Iterator[Tensor]:
    graph = traced.graphs["eval"]
    required = [n for n in graph.nodes if n.op == "placeholder" and not n.args]
    call = _first_call(graph, traced.root)
    if len(required) != 1 or call is None:
        return
    weight = dict(traced.root.named_parameters())[call.weight]
    channels = weight.shape[call.geometry.in_dim] * (call.groups if call.geometry.kind == "conv" else 1)
    for shape in _shapes(call, channels):
        generator = torch.Generator().manual_seed(0)
        yield torch.randn(2, *shape, generator=generator).to(weight.device, weight.dtype)


def _shapes(call: LayerCall, channels: int) -> Iterator[tuple[int, ...]]:
    spatial = call.geometry.spatial_dims
    if spatial:
        sizes = _SIZES if spatial < 3 else (16, 32, 8, 64)
        yield from ((channels, *[s] * spatial) for s in sizes)
        return
    yield (channels,)
    for colours in (1, 3):
        side = math.isqrt(channels // colours)
        if colours * side * side == channels:
            yield (colours, side, side)


def _first_call(graph: fx.Graph, root: nn.Module) -> LayerCall | None:
    names = parameter_names(root)
    return next((call for node in graph.nodes if (call := layer_call(node, root, names)) is not None), None)

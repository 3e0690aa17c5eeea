"""Where the samples of a batch lie in what each layer reads: mostly in dimension 0, but not in a network with time first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmerge.channels.layer_calls import layer_call, parameter_names
from fastmerge.channels.shapes import Shapes, find_shapes
from fastmerge.channels.tracing import TracedNetwork


def find_sample_dims(
    traced: TracedNetwork, example_inputs: tuple[Any, ...], shapes: Shapes
) -> dict[tuple[str, str], int]:
    """The dimension along which the samples lie, by comparing shapes of two batches of different size.

    Where a network takes no other batch size, such as one that holds the graph that it works on, it is the one dimension,
    besides the channels', of the batch's size.

    Args:
        traced: the network; its buffers change, as it runs in training mode too.
        example_inputs: a batch; all tensors in it have the samples in dimension 0.
        shapes: of the values that this batch gives.

    Returns:
        Per (mode, node name) of a layer call whose input has one dimension that grows with the batch. A dimension that
        holds samples and something else counts, the samples being the slower index.
    """
    larger = tuple(torch.cat([x, x[:1]]) if isinstance(x, Tensor) else x for x in example_inputs)
    others: Shapes | None
    try:
        others = find_shapes(traced, larger)
    except Exception:  # whatever the user's forward raises on a batch of another size
        others = None
    names, found = parameter_names(traced.root), {}
    samples = next(x.shape[0] for x in example_inputs if isinstance(x, Tensor))
    for mode, graph in traced.graphs.items():
        for node in graph.nodes:
            call = layer_call(node, traced.root, names)
            if call is not None:
                read, channels = shapes[mode, call.input.name], call.geometry.channel_dim
                if others is None:
                    dims = [d for d, size in enumerate(read) if size == samples and d != channels % len(read)]
                else:
                    dims = [d for d, size in enumerate(read) if others[mode, call.input.name][d] != size]
                if len(dims) == 1:
                    found[mode, node.name] = dims[0]
    return found

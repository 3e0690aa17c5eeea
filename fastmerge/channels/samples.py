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

    Args:
        traced: the network; its buffers change, as it runs in training mode too.
        example_inputs: a batch; all tensors in it have the samples in dimension 0.
        shapes: of the values that this batch gives.

    Returns:
        Per (mode, node name) of a layer call whose input has one dimension that grows with the batch. A dimension that
        holds samples and something else counts, the samples being the slower index.
    """
    larger = tuple(torch.cat([x, x[:1]]) if isinstance(x, Tensor) else x for x in example_inputs)
    others = find_shapes(traced, larger)
    names, found = parameter_names(traced.root), {}
    for mode, graph in traced.graphs.items():
        for node in graph.nodes:
            call = layer_call(node, traced.root, names)
            if call is not None:
                read, other = shapes[mode, call.input.name], others[mode, call.input.name]
                grown = [d for d, size in enumerate(read) if other[d] != size]
                if len(grown) == 1:
                    found[mode, node.name] = grown[0]
    return found

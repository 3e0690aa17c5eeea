"""Where the samples of a batch lie in what each layer reads: mostly in dimension 0, but not in a network with time first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fastmerge.channels.layer_calls import layer_call, parameter_names
from fastmerge.channels.tracing import TracedNetwork


class _ShapeInterpreter(fx.Interpreter):
    """Runs a graph and notes the shape of what each layer reads."""

    def __init__(self, traced: TracedNetwork, mode: str) -> None:
        super().__init__(traced.graph_module(mode))
        self.root = traced.root
        self.names = parameter_names(traced.root)
        self.shapes: dict[str, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        call = layer_call(n, self.root, self.names)
        if call is not None:
            self.shapes[n.name] = self.env[call.input].shape
        return super().run_node(n)


def find_sample_dims(traced: TracedNetwork, example_inputs: tuple[Any, ...]) -> dict[tuple[str, str], int]:
    """The dimension along which the samples lie, by comparing shapes of two batches of different size.

    Args:
        traced: the network; its buffers change, as it runs in training mode too.
        example_inputs: a batch; all tensors in it have the samples in dimension 0.

    Returns:
        Per (mode, node name) of a layer call whose input has one dimension that grows with the batch. A dimension that
        holds samples and something else counts, the samples being the slower index.
    """
    larger = tuple(torch.cat([x, x[:1]]) if isinstance(x, Tensor) else x for x in example_inputs)
    found = {}
    for mode in traced.graphs:
        shapes = [_shapes(traced, mode, inputs) for inputs in (example_inputs, larger)]
        for name, shape in shapes[0].items():
            other = shapes[1].get(name)
            grown = [d for d, size in enumerate(shape) if other is not None and other[d] != size]
            if len(grown) == 1:
                found[mode, name] = grown[0]
    return found


def _shapes(traced: TracedNetwork, mode: str, inputs: tuple[Any, ...]) -> dict[str, torch.Size]:
    devices = [x.device for x in inputs if isinstance(x, Tensor) and x.is_cuda]
    interpreter = _ShapeInterpreter(traced, mode)
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        interpreter.run(*inputs)
    return interpreter.shapes

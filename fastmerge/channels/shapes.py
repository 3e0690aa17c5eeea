"""The shape of every value in a teacher's graphs: where its channels lie and how many there are."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from fastmerge.channels.tracing import TracedNetwork, undisturbed

Shapes = dict[tuple[str, str], tuple[int, ...]]


class _ShapeInterpreter(fx.Interpreter):
    """Runs a graph and notes its values' shapes."""

    def __init__(self, traced: TracedNetwork, mode: str) -> None:
        super().__init__(**traced.in_mode(mode))
        self.shapes: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n.name] = tuple(value.shape)
        return value


def find_shapes(traced: TracedNetwork, example_inputs: tuple[Any, ...]) -> Shapes:
    """Runs a network once in each mode.

    Args:
        traced: the network; its buffers change, as it runs in training mode too.
        example_inputs: a batch.

    Returns:
        Per (mode, node name) the shape of a value that is a tensor.
    """
    found: Shapes = {}
    for mode in traced.graphs:
        interpreter = _ShapeInterpreter(traced, mode)
        with undisturbed(example_inputs):
            interpreter.run(*example_inputs)
        found.update({(mode, name): shape for name, shape in interpreter.shapes.items()})
    return found

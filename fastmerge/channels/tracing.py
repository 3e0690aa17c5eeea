"""From a network's code to graphs: one of its training forward, one of its eval forward.

A network may do different things in the two modes (auxiliary heads, functional dropout), so each is traced with
``torch.fx``. Layers of ``torch.nn`` stay single nodes; containers and the user's own modules are looked into.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn


@dataclass(frozen=True)
class TracedNetwork:
    """The graphs of one network.

    Attributes:
        root: a copy of the network that the graphs' targets refer to; running it leaves the original alone.
        graphs: ``{"train": graph, "eval": graph}``.
    """

    root: nn.Module
    graphs: dict[str, fx.Graph]

    def in_mode(self, mode: str) -> dict[str, Any]:
        """What an ``fx.Interpreter`` takes to run one mode's graph over :attr:`root`, the root switched to that mode."""
        return {"module": self.root.train(mode == "train"), "graph": self.graphs[mode]}


class _PathTracer(fx.Tracer):
    """A tracer that knows which module it is in when tracing fails."""

    def __init__(self) -> None:
        super().__init__(param_shapes_constant=True)
        self.entered: list[str] = []

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Buffers become nodes too, like parameters: they hold per-channel values."""
        if isinstance(attr_val, Tensor) and not isinstance(attr_val, nn.Parameter):
            name = next((n for n, buffer in self.root.named_buffers() if buffer is attr_val), None)
            if name is not None:
                if name not in parameter_proxy_cache:
                    parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
                return parameter_proxy_cache[name]
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.entered.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.entered.pop()  # not in a finally: after a failure the path says where it was
        return result


def trace(model: nn.Module, example_inputs: Any = None) -> TracedNetwork:
    """Traces a network's training and eval forward.

    Args:
        model: the network.
        example_inputs: what the user gave, if anything; arguments with a default that it does not reach keep their default.

    Raises:
        ValueError: if the code can't be traced, naming the module and the reason.
    """
    root = copy.deepcopy(model)
    graphs = {}
    for mode in ("train", "eval"):
        root.train(mode == "train")
        tracer = _PathTracer()
        try:
            graphs[mode] = tracer.trace(root, concrete_args=_defaults(root, example_inputs))
        except Exception as error:
            where = f"module '{tracer.entered[-1]}'" if tracer.entered else "its forward"
            raise ValueError(
                f"{type(model).__name__} can't be traced: {where} ({mode} mode) needs its input's values or a construct "
                f"torch.fx can't follow ({type(error).__name__}: {str(error).splitlines()[0]}). "
                "Make the control flow independent of the data"
            ) from error
    return TracedNetwork(root, graphs)


def _defaults(root: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """The forward's optional arguments, of which a network's code may depend, with their defaults."""
    given = len(example_inputs) if isinstance(example_inputs, (tuple, list)) else 1
    arguments = list(inspect.signature(root.forward).parameters.values())
    return {a.name: a.default for a in arguments[given:] if a.default is not inspect.Parameter.empty}


def tensor_at(root: nn.Module, path: str) -> Tensor:
    """The parameter or buffer at a dotted path."""
    owner, _, attribute = path.rpartition(".")
    tensor = getattr(root.get_submodule(owner), attribute)
    assert isinstance(tensor, Tensor), path
    return tensor


@contextmanager
def undisturbed(inputs: Sequence[Any]) -> Iterator[None]:
    """To run a network once, without gradients and without using up anybody's random numbers.

    Args:
        inputs: what it is run on.
    """
    devices = list({x.device for x in inputs if isinstance(x, Tensor) and x.is_cuda})
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        yield


def module_path(node: fx.Node) -> str:
    """Where in the network a node comes from, for messages: the module's path, or the node's own name at the top."""
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack")
    innermost = str(list(stack.values())[-1][0]) if stack else ""
    return innermost or node.name

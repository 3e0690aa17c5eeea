"""A student as its traced graphs, where its class's code counts on the teachers' widths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fastmerge.channels.aten import LAYER_NORMS, LAYERS, bind, op_name
from fastmerge.channels.traced_network import TracedNetwork
from fastmerge.isolation import undisturbed
from fastmerge.lowering.channelwise import is_flattening
from fastmerge.lowering.programs import function_of


class TracedStudent(nn.Module):
    """Runs a network's traced operations over tensors of other widths, by the names that the network's own have.

    Args:
        network: of the teachers' class, with the tensors; its own code is not run.
        traced: the graphs of a teacher.
    """

    def __init__(self, network: nn.Module, traced: TracedNetwork) -> None:
        super().__init__()
        for name, module in [*network.named_children(), *traced.with_root(nn.Module()).root.named_children()]:
            self.add_module(name, module)
        for name, parameter in network.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in network.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self._traced = traced.with_root(nn.Module())
        self.training = network.training
        self._compile()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network gives; inputs are of the structure that it was traced with."""
        mode = "train" if self.training else "eval"
        return self._traced.structured(self._forwards[mode](self, *self._traced.flat(args, kwargs)), mode)

    def extra_repr(self) -> str:
        return f"{self._traced.name}, traced"

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {key: value for key, value in state.items() if key != "_forwards"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._compile()

    def _compile(self) -> None:
        self._forwards = {
            mode: function_of(self._flexible(mode), f"{mode} forward of a traced student")
            for mode in self._traced.graphs
        }

    def _flexible(self, mode: str) -> fx.Graph:
        """A graph whose views have no number of channels in them."""
        graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        for node in self._traced.graphs[mode].nodes:
            if is_flattening(node):
                copied[node] = graph.call_function(torch.flatten, (copied[node.args[0]], 1))
            else:
                copied[node] = _of_any_width(graph.node_copy(node, copied.__getitem__), node)
        return graph


def _of_any_width(new: fx.Node, node: fx.Node) -> fx.Node:
    """A copied operation that asks its operands for numbers of channels, in place of those of the network that was traced."""
    graph, name, arguments = new.graph, op_name(node), list(new.args)
    if name not in {*LAYER_NORMS, "group_norm", *LAYERS} or (name in LAYERS and bind(node).get("groups", 1) == 1):
        return new
    with graph.inserting_before(new):
        if name in LAYER_NORMS:
            *outer, _ = bind(node)["normalized_shape"]
            arguments[1] = [*outer, graph.call_function(torch.ops.aten.sym_size.int, (arguments[0], -1))]
        elif name == "group_norm":
            each = node.args[0].meta["shape"][1] // bind(node)["num_groups"]  # type: ignore[union-attr]
            arguments[1] = graph.call_function(_blocks, (arguments[0], 1, each))
        else:
            rows, groups = bind(node)["weight"].meta["shape"][0], bind(node)["groups"]
            place = list(bind(node)).index("groups")
            arguments[place] = graph.call_function(_blocks, (arguments[1], 0, rows // groups))
    new.args = tuple(arguments)
    return new


def _blocks(x: Tensor, dim: int, size: int) -> int:
    return x.shape[dim] // size


def runs_at_its_width(network: nn.Module, traced: TracedNetwork) -> bool:
    """Whether a network's own code does at the widths of its tensors what was traced, on inputs of the traced shapes."""
    like = next(network.parameters())
    inputs = pytree.tree_map_only(Tensor, lambda x: _filled(x, like), traced.inputs)

    def outputs_of(module: nn.Module, mode: str) -> list[Any]:
        args, kwargs = pytree.tree_unflatten(pytree.tree_map_only(Tensor, torch.clone, inputs), traced.in_spec)
        torch.default_generator.manual_seed(0)
        return pytree.tree_leaves(module.train(mode == "train")(*args, **kwargs))

    with undisturbed([*network.parameters(), *inputs]):
        for mode in ("eval", "train"):
            try:
                found = outputs_of(network, mode)
            except Exception:  # whatever the user's forward raises
                return False
            if [tuple(y.shape) if isinstance(y, Tensor) else None for y in found] != traced.output_shapes(mode):
                return False
            # a group normalisation without parameters has as many groups as the code names, at any width
            if mode == "eval" and not all(map(_is_close, found, outputs_of(TracedStudent(network, traced), mode))):
                return False
    return True


def _filled(x: Tensor, like: Tensor) -> Tensor:
    """Values for an input that is described: by chance where they may be fractions, else zeros."""
    if not x.is_floating_point():
        return torch.zeros_like(x, device=like.device)
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(like.device, x.dtype)


def _is_close(y: Any, expected: Any) -> bool:
    if not isinstance(y, Tensor) or not y.is_floating_point() or not bool(expected.isfinite().all()):
        return True
    return bool((y - expected).norm() <= torch.finfo(y.dtype).eps ** 0.5 * expected.norm())

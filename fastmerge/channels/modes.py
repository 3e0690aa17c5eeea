"""Whether a network does the same in training and in eval mode, but for what its normalisations and dropouts are told.

Most networks do. Then one export gives the graphs of both modes, which saves half of what takes longest. Likewise whether it
does the same with one sample as with two, of which an export says nothing.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from fastmerge.channels.aten import op_name
from fastmerge.channels.examples import with_samples
from fastmerge.channels.traced_network import samples_in
from fastmerge.copies import copied
from fastmerge.isolation import undisturbed

# Functions of PyTorch with an argument ``training``, and what they are in a graph, which has it at this place.
_TOLD: dict[Callable[..., Any], str] = {
    F.batch_norm: "batch_norm",
    F.dropout: "dropout",
    F.dropout1d: "feature_dropout",
    F.dropout2d: "feature_dropout",
    F.dropout3d: "feature_dropout",
}
_PLACES = {"batch_norm": 5, "dropout": 2, "feature_dropout": 2}
_SIZES = {"shape", "size", "len", "numel"}
_COUNTER = "num_batches_tracked"
_PLAIN = (type(None), bool, float, str, slice, type(Ellipsis), torch.dtype, torch.device, torch.memory_format)

Told = list[tuple[str, bool]]
Calls = list[Any]


def told_in_both(root: nn.Module, inputs: tuple[Sequence[Any], Mapping[str, Any]]) -> tuple[Told, Told, Calls] | None:
    """Runs a network in both modes and compares every call of PyTorch, its operands and its options.

    Args:
        root: the network; it is copied.
        inputs: what its forward takes.

    Returns:
        Of training and of eval mode, in the order of the calls, what normalisations and dropouts are told: the name of the
        operation and whether it is of training; and all calls of eval mode. None where more than that differs, or it can't be
        told.
    """
    network = copied(root)
    try:
        training, evaluation = (_watched(network.train(mode), inputs) for mode in (True, False))
    except Exception:  # of what can't be told; what the network itself raises, an export says better
        return None
    if any(map(_asks_for_mode_and_size, training.code | evaluation.code)):
        return None  # what it does with another batch size the runs don't show
    return (training.told, evaluation.told, evaluation.calls) if training.calls == evaluation.calls else None


def takes_one(root: nn.Module, inputs: tuple[Sequence[Any], Mapping[str, Any]], calls: Calls | None = None) -> bool:
    """Whether a network, in its mode, calls the same of PyTorch for one sample as for several, as far as that can be told.

    An export takes it for granted that there are more than one, whatever the code asks.

    Args:
        root: the network; it is copied.
        inputs: what its forward takes, of two samples or more.
        calls: what it calls for them, where that is known.
    """
    count = samples_in(pytree.tree_leaves(inputs))
    try:
        several = _watched(copied(root), inputs).calls if calls is None else calls
        return _alike(several, _watched(copied(root), with_samples(inputs, 1)).calls, count)
    except Exception:  # a BatchNorm takes no single value, and what can't be told is most likely the same
        return True


def _alike(several: Any, one: Any, count: int) -> bool:
    """Whether something of a run on ``count`` samples is what it should be for one, where lengths may count samples."""
    if isinstance(several, (list, tuple)) and type(several) is type(one):
        return len(several) == len(one) and all(_alike(a, b, count) for a, b in zip(several, one, strict=True))
    return bool(several == one or (type(several) is type(one) is int and several == count * one))


def _watched(network: nn.Module, inputs: tuple[Sequence[Any], Mapping[str, Any]]) -> _Calls:
    """Runs a network and notes every call of PyTorch, and what comes out."""
    with undisturbed(pytree.tree_leaves(inputs), grad=True):
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, inputs)
        run = _Calls(network, [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)])
        with torch.autograd.graph.saved_tensors_hooks(_forgotten, _forgotten), run:
            output = network(*args, **kwargs)
        run.calls.append(run.described(output))
    return run


def _forgotten(saved: Any) -> Any:
    """In place of what autograd would hold: gradients can be taken, as in an export, but none is."""
    return None


def _asks_for_mode_and_size(code: types.CodeType) -> bool:
    return not is_torchs(code.co_filename) and "training" in code.co_names and not _SIZES.isdisjoint(code.co_names)


def is_torchs(file: str) -> bool:
    """Whether a file of code is PyTorch's own."""
    return file.startswith((os.path.join(torch.__path__[0], ""), "torch/"))


class _Calls(TorchFunctionMode):
    """What a network calls of PyTorch: operations, assignments, and questions about shapes; and the code that led there.

    Args:
        network: whose parameters and buffers are known by their order.
        inputs: likewise.
    """

    def __init__(self, network: nn.Module, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.numbers = WeakIdKeyDictionary()
        self.count = 0
        self.know([*inputs, *network.parameters(), *network.buffers()])
        self.counters = {id(b) for name, b in network.named_buffers() if name.endswith(_COUNTER)}
        self.calls: list[Any] = []
        self.told: Told = []
        self.code: set[types.CodeType] = set()

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not _watched.__code__:
            self.code.add(frame.f_code)
            frame = frame.f_back
        given = dict(kwargs or {})
        name = _TOLD.get(func)
        told = given.pop("training", None) if name is not None else None
        out = func(*args, **(kwargs or {}))
        if args and id(args[0]) in self.counters:
            return out
        made = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        self.calls.append((func, self.described((args, given))))
        if name is not None:
            self.told.append((name, bool(told)))
        # dropout that drops nothing gives its input back: another tensor nevertheless
        self.know(made if name is not None else [x for x in made if x not in self.numbers])
        return out

    def know(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            self.numbers[tensor] = self.count
            self.count += 1

    def described(self, value: Any) -> Any:
        """A structure of operands in which tensors are the numbers of their order."""
        leaves, spec = pytree.tree_flatten(value)
        return [self._leaf(leaf) for leaf in leaves], spec

    def _leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf in self.numbers:
            return f"tensor {self.numbers[leaf]}", tuple(leaf.shape)
        if isinstance(leaf, (int, torch.Size)) and not isinstance(leaf, bool):
            return type(leaf).__name__, tuple(leaf) if isinstance(leaf, torch.Size) else leaf
        if isinstance(leaf, _PLAIN):
            return type(leaf), repr(leaf)
        raise TypeError(f"whether two operands are the same can't be told of {type(leaf).__name__}")


def in_eval_mode(graph: fx.Graph, told: tuple[Told, Told, Calls]) -> fx.Graph | None:
    """A training graph as one of eval mode; None if its calls are not those that were told something.

    Args:
        graph: as ``torch.export`` makes it.
        told: of :func:`told_in_both`.
    """
    nodes = [node for node in graph.nodes if op_name(node) in _PLACES]
    training = [(name := op_name(node), node.args[_PLACES[name]]) for node in nodes]
    if training != told[0]:
        return None
    copied, twins = fx.Graph(), dict[fx.Node, fx.Node]()
    copied.output(copied.graph_copy(graph, twins))
    for node, (name, is_training) in zip(nodes, told[1], strict=True):
        twins[node].update_arg(_PLACES[name], is_training)
    counters: list[fx.Node] = []
    for node in copied.nodes:
        of = node.args[0] if op_name(node) == "add" else node
        if of in counters or (of is node and str(node.target).endswith(_COUNTER)):
            counters.append(node)
    for node in reversed(counters):  # eval mode counts no batches
        if not node.users:
            copied.erase_node(node)
    return copied

"""Whether code does the same: one network's in training and eval mode, or with one sample and with more; two networks'.

Most networks do the same in both modes, but for what their normalisations and dropouts are told. Then one export gives the
graphs of both, which saves half of what takes longest. Of one sample an export says nothing. Networks of equal `code_key` share
their graphs, which depend on all of the code but for the values of its weights.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import os
import sys
import types
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from fastmerge.channels.aten import op_name
from fastmerge.channels.examples import with_samples
from fastmerge.channels.traced_network import samples_in
from fastmerge.isolation import copied, undisturbed

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
_OPTIONS = (type(None), bool, float, str, slice, type(Ellipsis), torch.dtype, torch.device, torch.memory_format)

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
        if isinstance(leaf, _OPTIONS):
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


_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format, enum.Enum)
_CALLABLES = (type, types.FunctionType, types.BuiltinFunctionType)
_MAX_DEPTH = 8

Key = tuple[Hashable, tuple[tuple[Any, ...], ...], str]  # of the network, the leaves of its inputs and their structure


def code_key(model: nn.Module, inputs: Any) -> Key | None:
    """A key that networks share which give the same graphs on inputs of the same shapes; None where that can't be told.

    It holds the classes of all modules, their attributes, and the shapes, dtypes, devices and ties of their tensors; of tensors
    of integers, and of those that are neither parameters nor buffers, the values too.

    Args:
        model: the network.
        inputs: what its forward takes, a pytree.
    """
    leaves, spec = pytree.tree_flatten(inputs)
    try:
        return _Key(model).of_model(), tuple(_of_input(leaf) for leaf in leaves), str(spec)
    except _Unknown:
        return None


def without_batch(key: Key) -> Key | None:
    """The same key for all batch sizes of two or more; None of a smaller one."""
    model, leaves, spec = key
    shapes = [leaf[0] for leaf in leaves if isinstance(leaf[0], tuple) and leaf[0]]
    batch = shapes[0][0] if shapes else 0
    if batch < 2:
        return None
    others = tuple(
        ((), *leaf[0][1:], *leaf[1:]) if leaf[0] in shapes and leaf[0][0] == batch else leaf for leaf in leaves
    )
    return model, others, spec


class _Unknown(Exception):  # noqa: N818
    """An attribute of which it can't be told whether another one is equal."""


class _Key:
    def __init__(self, model: nn.Module) -> None:
        self.modules = {id(module): number for number, module in enumerate(model.modules())}
        self.tensors: dict[int, int] = {}
        self.model = model

    def of_model(self) -> Hashable:
        return tuple(self._of_module(module) for module in self.model.modules())

    def _of_module(self, module: nn.Module) -> Hashable:
        own = {key: value for key, value in vars(module).items() if key != "training"}
        parameters, buffers = own.pop("_parameters"), own.pop("_buffers")
        tensors = tuple((key, self._of_tensor(t)) for key, t in [*parameters.items(), *buffers.items()])
        code = tuple(function.__code__ for kind in type(module).__mro__ for function in _own_functions(kind))
        return parametrize.type_before_parametrizations(module), code, tensors, self._of(own, 0)

    def _of_tensor(self, tensor: Tensor | None) -> Hashable:
        if tensor is None:
            return None
        number = self.tensors.setdefault(id(tensor), len(self.tensors))
        values = None if tensor.is_floating_point() or tensor.dim() == 0 else _values(tensor)
        return number, tuple(tensor.shape), tensor.dtype, tensor.device, values

    def _of(self, value: Any, depth: int) -> Hashable:
        if depth > _MAX_DEPTH:
            raise _Unknown
        if isinstance(value, _PLAIN):
            return type(value), value
        if isinstance(value, nn.Module):
            if id(value) not in self.modules:
                raise _Unknown
            return "module", self.modules[id(value)]
        if isinstance(value, Tensor):
            return self._of_tensor(value) if id(value) in self.tensors else ("tensor", _values(value))
        if isinstance(value, _CALLABLES):
            return value
        if isinstance(value, types.MethodType):
            return self._of(value.__func__, depth + 1), self._of(value.__self__, depth + 1)
        if isinstance(value, functools.partial):
            return "partial", self._of((value.func, value.args, value.keywords), depth + 1)
        if isinstance(value, weakref.ref):  # recurrent layers hold their weights by such ones, too
            return "reference", self._of(value(), depth + 1)
        if isinstance(value, Mapping):
            items = tuple((self._of(k, depth + 1), self._of(v, depth + 1)) for k, v in value.items())
            return type(value), items
        if isinstance(value, (tuple, list)):
            return type(value), tuple(self._of(v, depth + 1) for v in value)
        if isinstance(value, (set, frozenset)):
            return type(value), frozenset(self._of(v, depth + 1) for v in value)
        if hasattr(value, "__dict__") and not hasattr(type(value), "__slots__"):
            return type(value), self._of(vars(value), depth + 1)
        raise _Unknown


def _own_functions(kind: type) -> list[types.FunctionType]:
    """The functions of a class that is not PyTorch's, which may be replaced while its name stays."""
    if kind.__module__.startswith(("torch.", "builtins")):
        return []
    return [value for value in vars(kind).values() if isinstance(value, types.FunctionType)]


def _values(tensor: Tensor) -> Hashable:
    if tensor.device.type == "meta" or tensor.numel() > 1 << 22 or tensor.layout != torch.strided:
        raise _Unknown
    values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return tuple(tensor.shape), tensor.dtype, hashlib.sha256(values).digest()


def _of_input(leaf: Any) -> tuple[Any, ...]:
    if not isinstance(leaf, Tensor):
        return type(leaf), repr(leaf)
    values = None if leaf.is_floating_point() else _values(leaf)
    return tuple(leaf.shape), leaf.dtype, leaf.device, values

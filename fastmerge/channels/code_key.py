"""Whether two networks run the same code: all that a trace of one may depend on, but for the values of its weights."""

from __future__ import annotations

import enum
import functools
import hashlib
import types
import weakref
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

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

"""Whether teachers can be merged, checked before anything is built."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from fastmerge.channels.tracing import TracedNetwork

_HOOK_REMEDIES = {
    "WeightNorm": "torch.nn.utils.remove_weight_norm",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm",
    "BasePruningMethod": "torch.nn.utils.prune.remove",
}


def check_teachers(teachers: Sequence[nn.Module]) -> None:
    """Checks everything about teachers that needs no tracing.

    Raises:
        TypeError: if a teacher is no network, or they are of different classes.
        ValueError: if they differ in structure, shapes, dtype or device, share weights, or have weights that are not finite;
            the message names the layer. Likewise if hooks or replaced forwards change what a network computes.
    """
    _check_no_global_hooks()
    for number, teacher in enumerate(teachers):
        _check_module(number, teacher)
    if len(teachers) < 2:
        raise ValueError(f"BigStudent needs at least two teachers; got {len(teachers)}")
    first = teachers[0]
    for number, teacher in enumerate(teachers[1:], start=1):
        if type(teacher) is not type(first):
            raise TypeError(
                "BigStudent needs teachers of one class; "
                f"teacher 0 is a {type(first).__qualname__}, teacher {number} a {type(teacher).__qualname__}"
            )
        _check_same_structure(first, teacher, number)
    _check_devices(teachers)
    _check_not_shared(teachers)
    for number, teacher in enumerate(teachers):
        _check_finite(number, teacher)


def check_same_code(first: TracedNetwork, other: TracedNetwork, number: int) -> None:
    """Checks that two teachers compute the same way: constants in their code, options that no parameter shows.

    Args:
        first: teacher 0.
        other: another teacher.
        number: which one.

    Raises:
        ValueError: naming the first place where they differ.
    """
    for mode, graph in first.graphs.items():
        if len(graph.nodes) != len(other.graphs[mode].nodes):
            raise ValueError(f"teachers 0 and {number} run different code in {mode} mode; they need one architecture")
        for a, b in zip(graph.nodes, other.graphs[mode].nodes, strict=True):
            if a.format_node() != b.format_node() or not _same_constant(first, other, a):
                raise ValueError(
                    f"teachers 0 and {number} compute '{a.name}' differently in {mode} mode "
                    f"({_brief(a)} and {_brief(b)}); they need one architecture"
                )


def _brief(node: fx.Node) -> str:
    return str(node.format_node()).partition("=")[2].strip()


def _same_constant(first: TracedNetwork, other: TracedNetwork, node: fx.Node) -> bool:
    """Tensors in the code that are neither parameters nor buffers must be equal."""
    if node.op != "get_attr":
        return True
    target = str(node.target)
    known = {name for name, _ in [*first.root.named_parameters(remove_duplicate=False), *first.root.named_buffers()]}
    if target in known and not target.rpartition(".")[2].startswith("_tensor_constant"):
        return True
    owner, _, attribute = target.rpartition(".")
    a, b = (getattr(t.root.get_submodule(owner), attribute) for t in (first, other))
    return not isinstance(a, Tensor) or (a.shape == b.shape and bool(torch.equal(a, b.to(a.device))))


def _check_module(number: int, teacher: nn.Module) -> None:
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"BigStudent needs networks (torch.nn.Module); teacher {number} is a {type(teacher).__name__}")
    wrapper = type(teacher).__name__
    if isinstance(teacher, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(f"teacher {number} is wrapped in {wrapper}; pass the network inside, teacher.module")
    if wrapper == "OptimizedModule":
        raise TypeError(f"teacher {number} is compiled; pass the network itself and compile the big student")
    for name, tensor in teacher.named_parameters():
        if isinstance(tensor, nn.parameter.UninitializedParameter):
            raise ValueError(f"parameter '{name}' of teacher {number} is not initialised; run the network once")
    for name, module in teacher.named_modules():
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"layer '{name}' of teacher {number} is parametrized; "
                "call torch.nn.utils.parametrize.remove_parametrizations on it first"
            )
        where = f"layer '{name}' of teacher {number}" if name else f"teacher {number}"
        _check_hooks(module, where, is_network=module is teacher)
        _check_forward(module, where, is_network=module is teacher)


def _check_hooks(module: nn.Module, where: str, is_network: bool) -> None:
    """Hooks of containers are part of what is traced; those of the network and of its layers are not."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    has_tensors = any(True for _ in module.parameters(recurse=False))
    if not hooks or not (is_network or has_tensors):
        return
    kinds = {kind.__name__ for hook in hooks for kind in type(hook).__mro__}
    remedies = [f"call {call} on it" for kind, call in _HOOK_REMEDIES.items() if kind in kinds]
    remedy = " and ".join(remedies) or "remove them (handle.remove()) and write what they do into a forward"
    raise ValueError(f"{where} has forward hooks, which a merge would lose; {remedy}")


def _check_forward(module: nn.Module, where: str, is_network: bool) -> None:
    """A forward set on an instance is what runs, but tracing takes the class's; a container's own method is followed."""
    forward = vars(module).get("forward")
    is_followed = getattr(forward, "__self__", None) is module and not type(module).__module__.startswith("torch.nn")
    if forward is not None and (is_network or not is_followed):
        raise ValueError(
            f"{where} has a forward that was replaced on the instance, which a merge would lose; undo that "
            "(del module.forward) or write it into a class's forward"
        )


def _check_no_global_hooks() -> None:
    if torch_module._global_forward_pre_hooks or torch_module._global_forward_hooks:
        raise ValueError(
            "there are forward hooks for all modules (torch.nn.modules.module.register_module_forward_hook or "
            "_pre_hook), which a merge would lose; remove them (handle.remove()) until the student is made"
        )


def _check_same_structure(first: nn.Module, other: nn.Module, number: int) -> None:
    modules, others = dict(first.named_modules()), dict(other.named_modules())
    for name in [*modules, *others]:
        if name not in modules or name not in others:
            missing, has = (0, number) if name not in modules else (number, 0)
            raise ValueError(
                f"BigStudent needs teachers of one architecture; teacher {has} has a layer '{name}', teacher {missing} not"
            )
    for name in modules:
        _check_same_tensors(modules[name], others[name], name, number)
    for name, module in modules.items():
        theirs = others[name]
        if type(module) is not type(theirs):
            raise ValueError(
                f"BigStudent needs teachers of one architecture; layer '{name}' is a {type(module).__name__} in teacher 0 "
                f"and a {type(theirs).__name__} in teacher {number}"
            )
        if type(module).__module__.startswith("torch.nn") and module.extra_repr() != theirs.extra_repr():
            raise ValueError(
                f"BigStudent needs teachers of one architecture; layer '{name}' is ({module.extra_repr()}) in teacher 0 "
                f"and ({theirs.extra_repr()}) in teacher {number}"
            )


def _check_same_tensors(module: nn.Module, other: nn.Module, name: str, number: int) -> None:
    for kind in ("_parameters", "_buffers"):
        ours = {k: v for k, v in getattr(module, kind).items() if v is not None}
        theirs = {k: v for k, v in getattr(other, kind).items() if v is not None}
        for key in [*ours, *theirs]:
            full = f"{name}.{key}" if name else key
            if key not in ours or key not in theirs:
                has, lacks = (0, number) if key in ours else (number, 0)
                raise ValueError(
                    f"BigStudent needs teachers of one architecture; teacher {has} has '{full}', teacher {lacks} not"
                )
            a, b = ours[key], theirs[key]
            if a.shape != b.shape:
                raise ValueError(
                    f"BigStudent needs teachers of one architecture; {full} is {tuple(a.shape)} in teacher 0 "
                    f"and {tuple(b.shape)} in teacher {number}"
                )
            if a.dtype != b.dtype:
                raise ValueError(f"BigStudent needs teachers of one dtype; {full} is {a.dtype} and {b.dtype}")
            if not a.is_floating_point() and key != "num_batches_tracked" and not torch.equal(a.cpu(), b.cpu()):
                raise ValueError(
                    f"buffer '{full}' differs between teachers 0 and {number}; only floating tensors are merged"
                )


def _check_finite(number: int, teacher: nn.Module) -> None:
    for name, tensor in [*teacher.named_parameters(), *teacher.named_buffers()]:
        if not tensor.is_floating_point() or math.isfinite(tensor.detach().sum(dtype=torch.float64)):
            continue  # one pass; a sum that overflows is looked at closely
        if not bool(torch.isfinite(tensor).all()):
            bad = "NaN" if bool(torch.isnan(tensor).any()) else "Inf"
            raise ValueError(f"'{name}' of teacher {number} holds {bad}; BigStudent needs finite weights")


def _check_devices(teachers: Sequence[nn.Module]) -> None:
    devices = [sorted({str(t.device) for t in [*teacher.parameters(), *teacher.buffers()]}) for teacher in teachers]
    for number, found in enumerate(devices):
        if len(found) > 1:
            raise ValueError(f"teacher {number} lies on several devices ({', '.join(found)}); move it to one")
        if found != devices[0]:
            raise ValueError(
                f"BigStudent needs teachers on one device; teacher 0 is on {', '.join(devices[0])}, "
                f"teacher {number} on {', '.join(found)}"
            )


def _check_not_shared(teachers: Sequence[nn.Module]) -> None:
    owner: dict[int, tuple[int, str]] = {}
    seen: dict[int, int] = {}
    for number, teacher in enumerate(teachers):
        if id(teacher) in seen:
            warnings.warn(
                f"teachers {seen[id(teacher)]} and {number} are the same network; merging it with itself can't improve it",
                UserWarning,
                stacklevel=4,
            )
            continue
        seen[id(teacher)] = number
        for name, tensor in [*teacher.named_parameters(), *teacher.named_buffers()]:
            if tensor.numel() == 0:
                continue
            other, its_name = owner.setdefault(tensor.data_ptr(), (number, name))
            if other != number:
                raise ValueError(
                    f"teachers {other} and {number} share the memory of '{its_name}' and '{name}'; "
                    "pass separate networks, for example copy.deepcopy(teacher)"
                )

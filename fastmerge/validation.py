"""Whether teachers can be merged, checked before anything is built."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from fastmerge.channels.traced_network import CONSTANT, TracedNetwork, module_path, tensor_at
from fastmerge.problems import Problem, UnmergeableError, WrongTeacherError

_ONE_ARCHITECTURE = "Pass networks that were made in the same way"
_OR_HEADS = '; if only the last layers differ in their number of classes, pass heads="concatenate"'

# Hooks that note outputs where the network itself asks for them, and change nothing.
_NOTING = {"transformers.utils.output_capturing"}
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
    error = next(teacher_errors(teachers), None)
    if error is not None:
        raise error
    same = same_teachers(teachers)
    if same:
        warnings.warn(same, UserWarning, stacklevel=3)


def teacher_errors(teachers: Sequence[Any]) -> Iterator[UnmergeableError]:
    """All that :func:`check_teachers` finds wrong, one error each."""
    yield from _global_hooks()
    networks: dict[int, nn.Module] = {}
    for number, teacher in enumerate(teachers):
        yield from errors_of_teacher(number, teacher)
        if isinstance(teacher, nn.Module):
            networks[number] = teacher
    if len(teachers) < 2:
        yield _error(f"BigStudent needs at least two teachers; got {len(teachers)}", "Pass two or more, one by one")
    for number, teacher in list(networks.items())[1:] if 0 in networks else ():
        if kind_of(teacher) is kind_of(networks[0]):
            yield from differences(networks[0], teacher, number)
        else:
            yield WrongTeacherError(
                Problem(
                    "BigStudent needs teachers of one class; "
                    f"teacher 0 is a {type(networks[0]).__qualname__}, teacher {number} a {type(teacher).__qualname__}",
                    _ONE_ARCHITECTURE,
                )
            )
    yield from _devices(networks)
    yield from _shared(networks)
    for number, teacher in networks.items():
        yield from _not_finite(number, teacher)


def kind_of(module: nn.Module) -> type:
    """A module's class; where each instance has its own (a GraphModule, a parametrized one), the one that it had before."""
    if isinstance(module, fx.GraphModule):  # their code is compared as every network's is
        return fx.GraphModule
    return parametrize.type_before_parametrizations(module)


def same_teachers(teachers: Sequence[Any]) -> str:
    """What to warn of where a teacher was passed twice; else empty."""
    seen: dict[int, int] = {}
    for number, teacher in enumerate(teachers):
        first = seen.setdefault(id(teacher), number)
        if first != number:
            return f"teachers {first} and {number} are the same network; merging it with itself can't improve it"
    return ""


def same_graphs(first: TracedNetwork, other: TracedNetwork) -> bool:
    """Whether two traces of a network are the same graphs, node by node."""
    return code_difference(first, other, number=1) is None


def code_difference(first: TracedNetwork, other: TracedNetwork, number: int) -> UnmergeableError | None:
    """The first place where two teachers compute in another way: constants in their code, options that no parameter shows.

    Args:
        first: teacher 0.
        other: another teacher; its modes are compared.
        number: which one.
    """
    for mode in other.graphs:
        graph = first.graphs[mode]
        if len(graph.nodes) != len(other.graphs[mode].nodes):
            what = f"teachers 0 and {number} run different code in {mode} mode; they need one architecture"
            return _error(what, _ONE_ARCHITECTURE)
        for a, b in zip(graph.nodes, other.graphs[mode].nodes, strict=True):
            if a.format_node() != b.format_node() or not _same_constant(first, other, a):
                what = (
                    f"teachers 0 and {number} compute '{a.name}' differently in {mode} mode "
                    f"({_brief(a)} and {_brief(b)}); they need one architecture"
                )
                return _error(what, _ONE_ARCHITECTURE, module_path(a), a.meta["code"])
    return None


def _brief(node: fx.Node) -> str:
    return str(node.format_node()).partition("] = ")[2].strip()


def _same_constant(first: TracedNetwork, other: TracedNetwork, node: fx.Node) -> bool:
    """Tensors that the code makes must be equal."""
    target = str(node.target)
    if node.op != "get_attr" or not target.startswith(f"{CONSTANT}."):
        return True
    a, b = (tensor_at(t.root, target) for t in (first, other))
    return a.shape == b.shape and bool(torch.equal(a, b.to(a.device)))


def _error(what: str, remedy: str = "", where: str = "", code: str = "") -> UnmergeableError:
    return UnmergeableError(Problem(what, remedy, where, code))


def errors_of_teacher(number: int, teacher: Any) -> Iterator[UnmergeableError]:
    """What is wrong with a teacher by itself, one error each."""
    what = f"BigStudent needs networks (torch.nn.Module); teacher {number} is a {type(teacher).__name__}"
    if not isinstance(teacher, nn.Module):
        listed = isinstance(teacher, (list, tuple)) and any(isinstance(each, nn.Module) for each in teacher)
        remedy = (
            "Pass the networks one by one: BigStudent(*networks)" if listed else "Load it into a network of its class"
        )
        yield WrongTeacherError(Problem(what, remedy))
        return
    wrapper = type(teacher).__name__
    if isinstance(teacher, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        what = f"teacher {number} is wrapped in {wrapper}"
        yield WrongTeacherError(Problem(what, "pass the network inside, teacher.module"))
    if wrapper == "OptimizedModule":
        what = f"teacher {number} is compiled"
        yield WrongTeacherError(Problem(what, "pass the network itself and compile the big student"))
    if wrapper == "BigStudent":
        what = f"teacher {number} is a BigStudent, whose gates can't be merged"
        yield WrongTeacherError(Problem(what, "pass the network that its compress() returns"))
        return
    for name, tensor in teacher.named_parameters():
        if isinstance(tensor, nn.parameter.UninitializedParameter):
            what = f"parameter '{name}' of teacher {number} is not initialised"
            yield _error(what, "run the network once", name)
        elif tensor.is_complex():
            what = (
                f"parameter '{name}' of teacher {number} is {tensor.dtype}; only real floating point tensors are merged"
            )
            yield _error(what, "Store it as a real parameter, and call torch.view_as_complex in forward", name)
    for name, module in teacher.named_modules():
        if re.match(r"torch\..*\bquantized\b", type(module).__module__):
            what = f"layer '{name}' of teacher {number} is quantised ({type(module).__name__})"
            yield _error(what, "Merge the networks before they are quantised, and quantise the student", name)
        what = f"layer '{name}' of teacher {number}" if name else f"teacher {number}"
        if isinstance(module, torch.jit.ScriptModule):
            yield _error(f"{what} is compiled by torch.jit", "Pass the network that it was made from", name)
            return
        yield from _hooks(module, what, name)
        yield from _replaced_forward(module, what, name)


def _hooks(module: nn.Module, what: str, path: str) -> Iterator[UnmergeableError]:
    """Forward hooks of containers are part of what is traced; those of the network and of its layers are not, nor others."""
    if module._backward_pre_hooks or module._backward_hooks:
        what_is = f"{what} has backward hooks, which a merge would lose"
        yield _error(what_is, "remove them (handle.remove()) until the student is made", path)
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    hooks = [hook for hook in hooks if getattr(hook, "__module__", "") not in _NOTING]
    has_tensors = any(True for _ in module.parameters(recurse=False))
    if not hooks or (path and not has_tensors):
        return
    kinds = {kind.__name__ for hook in hooks for kind in type(hook).__mro__}
    remedies = [f"call {call} on it" for kind, call in _HOOK_REMEDIES.items() if kind in kinds]
    remedy = " and ".join(remedies) or "remove them (handle.remove()) and write what they do into a forward"
    yield _error(f"{what} has forward hooks, which a merge would lose", remedy, path)


def _replaced_forward(module: nn.Module, what: str, path: str) -> Iterator[UnmergeableError]:
    """A forward set on an instance is what runs, but tracing takes the class's; a container's own method is followed."""
    forward = vars(module).get("forward")
    is_followed = getattr(forward, "__self__", None) is module and not type(module).__module__.startswith("torch.nn")
    if forward is not None and not (path and is_followed):
        what = f"{what} has a forward that was replaced on the instance, which a merge would lose"
        yield _error(what, "undo that (del module.forward) or write it into a class's forward", path)


def _global_hooks() -> Iterator[UnmergeableError]:
    if torch_module._global_forward_pre_hooks or torch_module._global_forward_hooks:
        yield _error(
            "there are forward hooks for all modules (torch.nn.modules.module.register_module_forward_hook or "
            "_pre_hook), which a merge would lose",
            "remove them (handle.remove()) until the student is made",
        )


def differences(first: nn.Module, other: nn.Module, number: int) -> Iterator[UnmergeableError]:
    """Where the modules of two networks differ."""

    def differ(what: str, path: str) -> UnmergeableError:
        return _error(f"BigStudent needs teachers of one architecture; {what}", _ONE_ARCHITECTURE, path)

    modules, others = dict(first.named_modules()), dict(other.named_modules())
    alone = modules.keys() ^ others.keys()
    for name in dict.fromkeys([*modules, *others]):
        if name in alone and name.rpartition(".")[0] not in alone:
            missing, has = (0, number) if name not in modules else (number, 0)
            yield differ(f"teacher {has} has a layer '{name}', teacher {missing} does not", name)
    both = [name for name in modules if name in others]
    said = set()
    for name in both:
        for error in _tensor_differences(modules[name], others[name], name, number):
            said.add(name)
            yield error
    for name in both:
        module, theirs = modules[name], others[name]
        if name in said:
            continue
        if kind_of(module) is not kind_of(theirs):
            kinds = f"a {type(module).__name__} in teacher 0 and a {type(theirs).__name__} in teacher {number}"
            yield differ(f"layer '{name}' is {kinds}", name)
        elif type(module).__module__.startswith("torch.nn") and module.extra_repr() != theirs.extra_repr():
            options = f"({module.extra_repr()}) in teacher 0 and ({theirs.extra_repr()}) in teacher {number}"
            yield differ(f"layer '{name}' is {options}", name)


def _tensor_differences(module: nn.Module, other: nn.Module, name: str, number: int) -> Iterator[UnmergeableError]:
    for kind in ("_parameters", "_buffers"):
        ours = {k: v for k, v in getattr(module, kind).items() if v is not None}
        theirs = {k: v for k, v in getattr(other, kind).items() if v is not None}
        for key in dict.fromkeys([*ours, *theirs]):
            full = f"{name}.{key}" if name else key
            if key not in ours or key not in theirs:
                has, lacks = (0, number) if key in ours else (number, 0)
                what = f"teacher {has} has '{full}', teacher {lacks} does not"
                yield _error(f"BigStudent needs teachers of one architecture; {what}", _ONE_ARCHITECTURE, full)
                continue
            a, b = ours[key], theirs[key]
            if isinstance(a, nn.parameter.UninitializedParameter) or isinstance(b, nn.parameter.UninitializedParameter):
                continue  # said already
            if a.shape != b.shape:
                what = f"{full} is {tuple(a.shape)} in teacher 0 and {tuple(b.shape)} in teacher {number}"
                longer = a.dim() == b.dim() and sum(m != n for m, n in zip(a.shape, b.shape, strict=True)) == 1
                remedy = _ONE_ARCHITECTURE + (_OR_HEADS if longer else "")
                yield _error(f"BigStudent needs teachers of one architecture; {what}", remedy, full)
            elif a.dtype != b.dtype:
                what = f"BigStudent needs teachers of one dtype; {full} is {a.dtype} and {b.dtype}"
                yield _error(what, f"call to({a.dtype}) on teacher {number}", full)
            elif a.is_meta or b.is_meta or (a.is_complex() and kind == "_parameters"):
                continue  # said already
            elif not a.is_floating_point() and key != "num_batches_tracked" and not torch.equal(a.cpu(), b.cpu()):
                what = f"buffer '{full}' differs between teachers 0 and {number}; only floating tensors are merged"
                yield _error(what, "Give both the same values", full)


def _not_finite(number: int, teacher: nn.Module) -> Iterator[UnmergeableError]:
    for name, tensor in [*teacher.named_parameters(), *teacher.named_buffers()]:
        if isinstance(tensor, nn.parameter.UninitializedParameter) or tensor.is_meta or not tensor.is_floating_point():
            continue
        values = tensor.detach().float() if tensor.element_size() == 1 else tensor.detach()  # float8 has no sum
        if math.isfinite(values.sum()):
            continue  # one pass; a sum that overflows is looked at closely
        if not bool(torch.isfinite(values).all()):
            bad = "NaN" if bool(torch.isnan(values).any()) else "Inf"
            what = f"'{name}' of teacher {number} holds {bad}; BigStudent needs finite weights"
            yield _error(what, "Take its weights from before the training diverged", name)


def _devices(networks: Mapping[int, nn.Module]) -> Iterator[UnmergeableError]:
    first: list[str] | None = None
    for number, network in networks.items():
        found = sorted({str(t.device) for t in [*network.parameters(), *network.buffers()]})
        first = found if first is None else first
        if first == found == ["meta"]:
            what = f"the weights of teacher {number} are on the meta device, without values"
            yield _error(what, "Load them into a network on another device")
        elif len(found) > 1:
            yield _error(f"teacher {number} lies on several devices ({', '.join(found)})", "move it to one")
        elif found != first:
            what = f"BigStudent needs teachers on one device; teacher {min(networks)} is on {', '.join(first)}, "
            yield _error(f"{what}teacher {number} on {', '.join(found)}", "Move them to one")


def _shared(networks: Mapping[int, nn.Module]) -> Iterator[UnmergeableError]:
    owner: dict[int, tuple[int, str]] = {}
    seen: set[int] = set()
    for number, network in networks.items():
        if id(network) in seen:
            continue
        seen.add(id(network))
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            if isinstance(tensor, nn.parameter.UninitializedParameter) or tensor.numel() == 0 or tensor.is_meta:
                continue
            other, its_name = owner.setdefault(tensor.data_ptr(), (number, name))
            if other != number:
                what = f"teachers {other} and {number} share the memory of '{its_name}' and '{name}'"
                yield _error(what, "pass separate networks, for example copy.deepcopy(teacher)", name)

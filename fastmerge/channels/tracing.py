"""From a network's code to graphs of ATen operations: one of its training forward, one of its eval forward.

A network may do different things in the two modes (auxiliary heads, dropout), so each is exported with ``torch.export``, with
the batch size left open. What comes out is one flat graph whatever the code looks like: parameters and buffers are read by
name, every other node is an ATen operation or arithmetic on sizes.
"""

from __future__ import annotations

import functools
import inspect
import os
import random
import re
import sys
import threading
import traceback
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from fastmerge import isolation
from fastmerge.channels.aten import bind, has_effects, op_name
from fastmerge.channels.same_code import in_eval_mode, is_torchs, takes_one, told_in_both
from fastmerge.channels.traced_network import CONSTANT, MODES, TracedNetwork, add_constant
from fastmerge.channels.written_layers import complete_sliced_weights, part_computed_biases, recognise_norms
from fastmerge.isolation import copied, exporting, undisturbed
from fastmerge.problems import Problem, UnmergeableError

_AS_INPUT = "Let the forward take it as an input and return it"


def trace(
    model: nn.Module, inputs: tuple[tuple[Any, ...], Mapping[str, Any]], modes: Sequence[str] = MODES
) -> TracedNetwork:
    """Traces a network's training and eval forward.

    Args:
        model: the network; it is not changed.
        inputs: positional and keyword arguments of its forward, pytrees of tensors and constants.
        modes: both, or one of them where the network takes such inputs in that mode alone.

    Raises:
        ValueError: if the code can't be traced, naming the module, the line of code and the reason.
    """
    root = copied(model)
    momenta = [(module, module.momentum) for module in root.modules() if isinstance(module, _NormBase)]
    leaves, in_spec = pytree.tree_flatten((tuple(inputs[0]), dict(inputs[1])))
    parameters = inspect.signature(model.forward).parameters.values()
    signature = inspect.Signature([parameter.replace(annotation=parameter.empty) for parameter in parameters])
    described = [torch.empty_like(leaf, device="meta") if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    traced = TracedNetwork(root, {}, in_spec, {}, type(model).__name__, signature, described)
    calls: dict[str, str] = {}
    questions: dict[str, None] = {}
    seen = _Seen()
    for module, momentum in momenta:
        module.momentum = 0.1 if momentum is None else momentum  # a cumulative average reads its counter
    told, derived = told_in_both(root, inputs) if len(modes) > 1 else None, None
    for mode in modes:
        root.train(mode == "train")
        with undisturbed(leaves, grad=True):
            if derived is None:
                program = _exported(model, root, mode, inputs, calls, questions, seen)
                if seen.drawing:
                    path = _drawing_module(root.train(mode == "train"), inputs)
                    raise UnmergeableError(_drawing(root, mode, path, seen.drawing, calls))
                if seen.changes and (counting := _counting(root.train(mode == "train"), inputs)):
                    what = (
                        f"{type(model).__name__} keeps '{counting}' from one forward for the next, outside its buffers"
                    )
                    raise UnmergeableError(Problem(what, _AS_INPUT, counting.rpartition(".")[0], ""))
                if seen.gradients and _has_other_gradients(root.train(mode == "train"), program, inputs):
                    raise UnmergeableError(_own_gradients(type(model).__name__, mode, seen))
            source = derived or _unlifted(program)
            if told is not None and mode == "train":
                derived = in_eval_mode(source, told)
            traced.graphs[mode] = _cleaned(source, program.constants, traced, calls)
        traced.out_specs[mode] = program.call_spec.out_spec
        placeholders = (node for node in traced.graphs[mode].nodes if node.op == "placeholder")
        traced.is_open[mode] = any(node.meta.get("sample_dims") for node in placeholders) and not _depends_on_batch(
            program
        )
        if derived is None or mode == "eval":
            known = None if derived is None or told is None else told[2]
            traced.takes_one[mode] = traced.is_open[mode] and takes_one(root, inputs, known)
    if derived is not None:  # it is asked in eval mode, since a BatchNorm in training takes no single value
        traced.takes_one["train"] = traced.takes_one["eval"]
    traced.is_one_graph, traced.questions = derived is not None, list(questions)
    for module, momentum in momenta:
        module.momentum = momentum
    return traced


def _depends_on_batch(program: Any) -> bool:
    """Whether the code took a turn on its way that it would not take with another batch size."""
    ranges = program.range_constraints.values()
    twins = r"L\[.*\]\.size\(\)\[0\] == L\[.*\]\.size\(\)\[0\]"
    # inputs of one batch size are none, nor is what is asked of strides
    turns = (guard for guard in program._guards_code if "size()" in guard and not re.fullmatch(twins, guard))
    return any(turns) or any(r.lower > 2 or r.upper < 1 << 30 for r in ranges)


def _exported(
    model: nn.Module,
    root: nn.Module,
    mode: str,
    inputs: tuple[tuple[Any, ...], Mapping[str, Any]],
    calls: dict[str, str],
    questions: dict[str, None],
    seen: _Seen,
) -> Any:
    args, kwargs = tuple(inputs[0]), dict(inputs[1])
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()]
    entered: list[str] = []
    error: Exception | None = None
    with _exporting(root, entered, calls, questions, seen), _keywords_by_name(root, kwargs):
        # an open batch; where the code fixes a length that export took for it, whatever it leaves open; then none
        for dim in (torch.export.Dim.DYNAMIC, torch.export.Dim.AUTO):
            entered.clear()
            shapes = torch.export.ShapesCollection()
            for x in tensors:
                if x.shape[0] == tensors[0].shape[0]:
                    shapes[x] = {0: dim}
            try:
                dynamic = shapes.dynamic_shapes(root, args, kwargs)
                return torch.export.export(root, args, kwargs, dynamic_shapes=dynamic, strict=False)
            except Exception as raised:
                error = raised
                if "onstraint" not in str(raised) and "specializ" not in str(raised):
                    break
    assert error is not None
    raise UnmergeableError(_untraceable(root, mode, entered[-1] if entered else "", error)) from error


def _untraceable(root: nn.Module, mode: str, path: str, error: Exception) -> Problem:
    """What to say of a network that torch.export can't follow.

    Args:
        root: the network.
        mode: in which it was run.
        path: of the module it was in.
        error: what was raised.
    """
    name, code = type(root).__name__, _line_of(error)
    unknown = re.search(r"Found <class '([^']*)'> in output, which is not a known type", str(error))
    if unknown:
        what = f"{name} can't be traced: it returns a {unknown[1]} ({mode} mode), in which PyTorch can't find tensors"
        remedy = "Let it return tensors, tuples or dicts (a Hugging Face cache: model.config.use_cache = False in each teacher)"
        return Problem(what, remedy, "", "")
    where = f"module '{path}' ({mode} mode)" if path else f"its forward ({mode} mode)"
    reason = f"({type(error).__name__}: {_first_line(error)})"
    if re.search(r"data-dependent|DataDependent|unbacked|\.numpy\(\)", type(error).__name__ + str(error)):
        what = f"{name} can't be traced: {where} uses values of a tensor, or what torch.export can't follow {reason}"
        remedy = "Make the control flow independent of the data"
        if mode == "train" and (drops := _layer_drops(root)):
            remedy = f"LayerDrop can't be traced: let {', '.join(drops)} be 0 in each teacher"
        return Problem(what, remedy, path, code)
    what = f"{name} can't be traced: {where} fails while torch.export follows it {reason}"
    return Problem(what, "Write that in another way", path, code)


def _layer_drops(root: nn.Module) -> list[str]:
    """Attributes that say how often whole layers are left out in training, such as ``encoder.layerdrop``."""
    holders = [("config", getattr(root, "config", None)), *root.named_modules()]
    return [
        f"{path}.{name}".lstrip(".")
        for path, holder in holders
        for name, value in getattr(holder, "__dict__", {}).items()
        if re.fullmatch(r"(\w+_)?layer_?drop", name) and isinstance(value, float) and value > 0
    ]


@contextmanager
def _keywords_by_name(root: nn.Module, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Within it the signature of a forward that takes ``**kwargs`` has their names, without which an export fails."""
    signature, forward = inspect.signature(root.forward), root.forward
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    if len(parameters) == len(signature.parameters) or "forward" in vars(root):
        yield
        return

    def named(*args: Any, **given: Any) -> Any:
        return forward(*args, **given)

    known = {p.name for p in parameters}
    parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in kwargs if name not in known]
    named.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    root.forward = named
    try:
        yield
    finally:
        del root.forward


@dataclass
class _Seen:
    """What a network did in an export that a graph of its operations has nothing of.

    Attributes:
        drawing: whose random numbers were drawn, Python's or NumPy's, if any.
        gradients: what computes gradients of its own: autograd functions, and hooks of tensors, with file:line.
        changes: whether a number among the attributes of a module became another one.
    """

    drawing: str = ""
    gradients: dict[str, None] = field(default_factory=dict)
    changes: bool = False


def _numbers(root: nn.Module) -> dict[str, int | float]:
    """The numbers among the attributes of all modules."""
    attributes = ((path, *item) for path, module in root.named_modules() for item in vars(module).items())
    return {f"{path}.{name}".lstrip("."): value for path, name, value in attributes if type(value) in (int, float)}


def _counting(root: nn.Module, inputs: tuple[tuple[Any, ...], Mapping[str, Any]]) -> str:
    """The attribute, if any, that every forward changes; what the first one finds out of its inputs stays the same."""
    network, found = copied(root), []
    for _ in range(2):
        _run(network, inputs)
        found.append(_numbers(network))
    return next((name for name, value in found[1].items() if name in found[0] and value != found[0][name]), "")


def _drawing_module(root: nn.Module, inputs: tuple[tuple[Any, ...], Mapping[str, Any]]) -> str:
    """The path of the innermost module that draws random numbers of Python or NumPy."""
    network, states, found = copied(root), list[tuple[Any, Any]](), list[str]()

    def enter(module: nn.Module, args: Any) -> None:
        states.append(_generators())

    def leave(path: str, module: nn.Module, args: Any, output: Any) -> None:
        if states.pop() != _generators():
            found.append(path)

    for path, module in network.named_modules():
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(functools.partial(leave, path))
    _run(network, inputs)
    return next(iter(found), "")


def _run(network: nn.Module, inputs: tuple[tuple[Any, ...], Mapping[str, Any]]) -> None:
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (tuple(inputs[0]), dict(inputs[1])))
    with torch.no_grad():
        network(*args, **kwargs)


def _drawing(root: nn.Module, mode: str, path: str, whose: str, calls: Mapping[str, str]) -> Problem:
    where, name = f"module '{path}'" if path else "its forward", type(root).__name__
    what = f"{name} can't be traced: {where} ({mode} mode) draws random numbers of {whose}, which a trace would fix"
    remedy = "Draw them by torch.rand and use them as tensors: x * (torch.rand(()) < p)"
    if hasattr(getattr(root, "config", None), "mask_time_prob"):  # Hugging Face's networks for speech
        remedy = "Switch SpecAugment off in each teacher: config.apply_spec_augment = False"
    return Problem(what, remedy, path, calls.get(path, ""))


def _own_gradients(name: str, mode: str, seen: _Seen) -> Problem:
    what = (
        f"{name} has gradients of its own in {mode} mode, by {' and '.join(seen.gradients)}; a big student would have those of "
        "what its forward computes"
    )
    remedy = (
        "Compute what has these gradients, such as x + (f(x) - x).detach() for a straight-through estimator, or make it a "
        "torch.library.custom_op with register_autograd"
    )
    return Problem(what, remedy)


def _has_other_gradients(root: nn.Module, program: Any, inputs: tuple[tuple[Any, ...], Mapping[str, Any]]) -> bool:
    """Whether the parameters of a network have other gradients than those of its exported program."""
    values = {name: p.detach().clone().requires_grad_() for name, p in root.named_parameters() if p.is_floating_point()}
    found = []
    for network in (copied(root), program.module(check_guards=False)):
        torch.manual_seed(0)
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (tuple(inputs[0]), dict(inputs[1])))
        output = torch.func.functional_call(network, values, args, kwargs)
        leaves = [y for y in pytree.tree_leaves(output) if isinstance(y, Tensor) and y.requires_grad]
        weights = [torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype, device=y.device).view_as(y) for y in leaves]
        try:
            found.append(torch.autograd.grad(leaves, [*values.values()], weights, allow_unused=True))
        except RuntimeError:  # a function may change in place what the gradients of its operations would need
            return True
    own, traced = (
        [0.0 * p.double() if g is None else g.double() for g, p in zip(each, values.values(), strict=True)]
        for each in found
    )
    whole = sum(float(a.norm()) for a in own)
    # rounding is far less, another gradient far more; some parameters' gradients are rounding alone
    return any(float((a - b).norm()) > 0.1 * float(a.norm()) + 1e-3 * whole for a, b in zip(own, traced, strict=True))


@contextmanager
def _exporting(
    root: nn.Module, entered: list[str], calls: dict[str, str], questions: dict[str, None], seen: _Seen
) -> Iterator[None]:
    """A record of modules for the time of an export.

    Args:
        root: the network.
        entered: gets the paths of the modules that the forward is in when it fails.
        calls: gets by path the line of code outside torch that calls a module.
        questions: gets the lines of code outside torch that ask whether they are being compiled or exported.
        seen: gets what the graph will have nothing of.
    """
    paths = {id(module): name for name, module in root.named_modules()}
    thread, register_hook = threading.get_ident(), Tensor.register_hook
    before: list[tuple[Any, ...]] = []

    def enter(module: nn.Module, args: Any) -> None:
        path = paths.get(id(module), "")
        entered.append(path)
        if module is root:
            before.append((*_generators(), _numbers(root)))
        if path not in calls:
            calls[path] = _caller(sys._getframe(1))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        entered.pop()  # after a failure nobody does, and the path says where it was
        if module is root:
            *states, numbers = before.pop()
            drawn = [name for name, a, b in zip(("Python", "NumPy"), states, _generators(), strict=True) if a != b]
            seen.drawing = next(iter(drawn), seen.drawing)
            seen.changes |= numbers != _numbers(root)
            seen.gradients |= dict.fromkeys(_autograd_functions(output))

    def hook(tensor: Tensor, *args: Any) -> Any:
        if threading.get_ident() == thread and (line := _caller(sys._getframe(1))):
            seen.gradients[f"a hook of a tensor ({line})"] = None
        return register_hook(tensor, *args)

    def ask(frame: FrameType) -> None:
        if _is_own(frame.f_code.co_filename):
            questions[f"{frame.f_code.co_filename}:{frame.f_lineno}"] = None

    handles, traceback_of = [], fx.proxy.CapturedTraceback
    for module in root.modules():
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    fx.proxy.CapturedTraceback = _OwnLine  # type: ignore[assignment, misc]
    Tensor.register_hook = hook  # type: ignore[method-assign]
    frozen = [p for p in root.parameters() if p.is_floating_point() and not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)  # so that what computes gradients is seen; a big student trains all
        with exporting(ask):
            yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
        Tensor.register_hook = register_hook  # type: ignore[method-assign]
        fx.proxy.CapturedTraceback = traceback_of  # type: ignore[misc]
        for handle in handles:
            handle.remove()


def _generators() -> tuple[Any, Any]:
    """The states of the random numbers of Python and NumPy."""
    _, keys, position, *_ = np.random.get_state(legacy=True)
    return random.getstate(), (np.asarray(keys).tobytes(), position)


def _autograd_functions(output: Any) -> Iterator[str]:
    """The autograd functions outside torch that some tensors come from, with file:line."""
    nodes = [x.grad_fn for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]
    known = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in known:
            continue
        known.add(node)
        nodes += [before for before, _ in node.next_functions]
        function = getattr(node, "_forward_cls", None)
        if function is not None and not function.__module__.startswith("torch."):
            code = function.backward.__code__
            yield f"the autograd function {function.__qualname__} ({code.co_filename}:{code.co_firstlineno})"


class _OwnLine:
    """Of the stack that makes a node, the innermost line outside torch alone; to read the others takes long."""

    @classmethod
    def extract(cls) -> _OwnLine:
        return cls()

    def summary(self) -> traceback.StackSummary:
        file, _, line = _caller(sys._getframe(1)).rpartition(":")
        frames = [traceback.FrameSummary(file, int(line), "forward", lookup_line=False, line="")] if file else []
        return traceback.StackSummary.from_list(frames)


def _line_of(error: BaseException) -> str:
    """The innermost line of code outside torch that an error passed."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_own(f.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _caller(frame: Any) -> str:
    """``file:line`` of the innermost frame outside torch, up to where the network was called from here; else empty."""
    for found, line in traceback.walk_stack(frame):
        file = found.f_code.co_filename
        if file == __file__ or _is_own(file):
            return "" if file == __file__ else f"{file}:{line}"
    return ""


@functools.cache
def _is_own(file: str) -> bool:
    """Whether a file of code is neither torch's, nor Python's, nor part of tracing."""
    is_others = is_torchs(file) or file.startswith((__file__, isolation.__file__, "<"))
    return not is_others and os.path.dirname(file) != os.path.dirname(os.__file__)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


def _inline_regions(module: fx.GraphModule) -> None:
    """Makes blocks of ``torch.no_grad`` and ``torch.autocast`` part of the graph; what the former give is detached."""
    graph, higher = module.graph, torch.ops.higher_order
    kinds = (higher.wrap_with_set_grad_enabled, higher.wrap_with_autocast)
    while regions := [node for node in graph.nodes if node.target in kinds]:
        for node in regions:
            at = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
            body = getattr(module, str(node.args[at].target)).graph
            inputs = [inner for inner in body.nodes if inner.op == "placeholder"]
            with graph.inserting_before(node):
                returned: Any = graph.graph_copy(body, dict(zip(inputs, node.args[at + 1 :], strict=True)))
                outputs = list(returned)
                if node.target is kinds[0] and node.args[0] is False:
                    for k, output in enumerate(outputs):
                        outputs[k] = graph.call_function(torch.ops.aten.detach.default, (output,))
                        outputs[k].meta = dict(output.meta)
            for user in list(node.users):  # each takes one of the results
                user.replace_all_uses_with(outputs[user.args[1]])
                graph.erase_node(user)
            graph.erase_node(node)


def _unlifted(program: Any) -> fx.Graph:
    """The graph of an exported program, which reads by name the tensors that the code holds."""
    _inline_regions(program.graph_module)
    source: fx.Graph = program.graph_module.graph
    given = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs}
    for node in source.nodes:
        if node.op == "placeholder" and given[node.name] is not None:
            node.op, node.target, node.args = "get_attr", given[node.name], ()
    return source


def _cleaned(
    source: fx.Graph, constants: Mapping[str, Any], traced: TracedNetwork, calls: Mapping[str, str]
) -> fx.Graph:
    """A graph without assertions and identities, with plain metadata; the constants that it reads are put below the root."""
    for node in source.nodes:
        _check_target(node, calls)
    root = traced.root
    tensors = [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]
    first = {id(tensor): name for name, tensor in reversed(tensors)}
    known = {name: first[id(tensor)] for name, tensor in tensors}  # one name of tensors that are tied
    for node in reversed(list(source.nodes)):  # eliminate_dead_code would keep what changes a tensor in place
        name = op_name(node)
        counter = name == "add" and str(getattr(node.args[0], "target", "")).endswith("num_batches_tracked")
        assertion = name.startswith(("_assert", "sym_constrain")) or node.op == "call_module"
        unused = node.op == "get_attr" or (node.op == "call_function" and not (name and has_effects(node)))
        if (counter or assertion or unused) and not node.users:
            source.erase_node(node)
        elif _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            source.erase_node(node)
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in source.nodes:
        new = graph.node_copy(node, copied.__getitem__)
        if node.op == "get_attr" and node.target not in known:
            tensor = constants[str(node.target)].detach().clone()
            if isinstance(tensor, FakeTensor):
                path, code = _place(node, calls)
                what = f"{type(root).__name__} keeps '{node.target}' from one forward for the next, outside its buffers"
                raise UnmergeableError(Problem(what, _AS_INPUT, path, code))
            name = f"{str(node.target).replace('.', '_')}_{_digest(tensor)}"
            traced.constants[name] = tensor
            add_constant(root, name, traced.constants[name].clone())
            new.target = f"{CONSTANT}.{name}"
        elif node.op == "get_attr":
            new.target = known[str(node.target)]
        if node.op == "placeholder":
            new.args = ()
        new.meta = _metadata(node, calls)
        copied[node] = new
    recognise_norms(graph)
    complete_sliced_weights(graph)
    part_computed_biases(graph)
    return graph


def _check_target(node: fx.Node, calls: Mapping[str, str]) -> None:
    """Refuses what is no operation on tensors: control flow, such as torch.cond, and transforms, such as torch.vmap."""
    transforms = getattr(node.target, "__module__", "") == "torch._functorch.predispatch"
    if transforms or isinstance(node.target, torch._ops.HigherOrderOperator):
        path, code = _place(node, calls)
        uses = "torch.vmap or another transform of torch.func" if transforms else str(node.target)
        what = f"'{path or 'forward'}' uses {uses}, which fastmerge can't follow"
        raise UnmergeableError(Problem(what, "Write it with plain operations on tensors", path, code))


def _is_identity(node: fx.Node) -> bool:
    """Dropout that drops nothing; whoever reads its output reads its input, so that both are one value to be gated."""
    name = op_name(node)
    if name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"):
        arguments = bind(node)
        return not arguments["train"] or arguments["p"] == 0
    return name in ("alias", "lift_fresh")


def _digest(tensor: Tensor) -> str:
    """Tells tensors apart by what they hold, so that graphs of several shapes can share a network."""
    values = tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return f"{zlib.crc32(str((tensor.shape, tensor.dtype)).encode() + values):08x}"


def _metadata(node: fx.Node, calls: Mapping[str, str]) -> dict[str, Any]:
    meta: dict[str, Any] = {}
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        _check_shape(node, value, calls)
        meta["shape"] = tuple(_hint(size) for size in value.shape)
        meta["sample_dims"] = [d for d, size in enumerate(value.shape) if _is_open(size)]
    meta["path"], meta["code"] = _place(node, calls)
    return meta


def _place(node: fx.Node, calls: Mapping[str, str]) -> tuple[str, str]:
    """The path of the module that a node of an export comes from, and the line of code."""
    stack = node.meta.get("nn_module_stack")
    paths = [str(path) for path, _ in stack.values()] if stack else []
    path = paths[-1].partition("@")[0] if paths else ""
    return path, _code(str(node.meta.get("stack_trace") or "")) or calls.get(path, "")


def _check_shape(node: fx.Node, value: Tensor, calls: Mapping[str, str]) -> None:
    """Refuses a tensor whose shape depends on the values of others, such as those that a mask selects."""
    if all(_hint(size) is not None for size in value.shape):
        return
    path, code = _place(node, calls)
    what = f"'{path or 'forward'}' makes a tensor whose shape depends on the values of another ({op_name(node)})"
    remedy = "Keep all elements, with zeros or a weight of 0 in the place of those left out"
    raise UnmergeableError(Problem(what, remedy, path, code))


def _is_open(size: Any) -> bool:
    """Whether a length was left open, and no operation has fixed it."""
    node = getattr(size, "node", None)
    return node is not None and node.maybe_as_int() is None


def _code(stack_trace: str) -> str:
    """``file:line`` of the innermost line of a stack outside torch."""
    lines = re.findall(r'File "(.*)", line (\d+), in ', stack_trace)
    own = [f"{file}:{line}" for file, line in lines if _is_own(file)]
    return own[-1] if own else ""


def _hint(size: Any) -> int | None:
    """The length of a dimension for the example inputs; None of one that depends on the values of tensors."""
    node = getattr(size, "node", None)  # of a size that is left open
    hint = size if node is None else node.hint
    return None if hint is None else int(hint)

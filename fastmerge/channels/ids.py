"""Run a network on channel ids instead of numbers.

Every convolution and linear layer issues fresh ids for its output channels, and every other parameter for its elements.
From there ids go where numbers go: a view, a concatenation, a shuffle moves them, an elementwise function keeps them, and
where two ids meet in one number they are *united*: they are the same channel. What is left is a record of who writes and who
reads each channel, with no line about any architecture.

Ids live in int64 tensors of the activation's shape, expanded (stride 0) where they repeat, so that they cost little.
-1 marks an element without a channel, such as zero padding.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastmerge.channels.aten import (
    EMBEDDINGS,
    LAYER_NORMS,
    MOVEMENTS,
    NORMS,
    PRODUCTS,
    RESHAPES,
    SAME,
    is_pointwise,
    may_alias,
    op_name,
    writes_in_place,
)
from fastmerge.channels.layer_calls import LayerCall, layer_calls, weight_nodes
from fastmerge.channels.record import NO_ID, IdRecord, IdRun, LayerRecord, compact
from fastmerge.channels.rules import apply_rule, has_own_rule
from fastmerge.channels.traced_network import CONSTANT, TracedNetwork, module_path, predictions, samples_in, tensor_at
from fastmerge.isolation import undisturbed
from fastmerge.problems import Problem, UnmergeableError

_MOST_ELEMENTS = 1 << 22  # of a tensor whose every element has an id of its own


class _IdDispatch(TorchDispatchMode):
    """Carries ids through every ATen operation beside its numbers."""

    def __init__(self, run: IdRun) -> None:
        super().__init__()
        self.run = run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Asked first, for in place it changes the strides that it is about.
        rule = torch.ops.aten.alias.default if _restrides_nothing(func, args) else func
        out = func(*args, **(kwargs or {}))
        apply_rule(self.run, rule, args, kwargs or {}, out)
        return out


def _restrides_nothing(func: Any, args: Any) -> bool:
    """Whether an operation gives a tensor's dimensions of size 1 other strides and leaves all else where it is.

    So does a pooling to one pixel that stays channels-last.
    """
    if func not in (torch.ops.aten.as_strided.default, torch.ops.aten.as_strided_.default):
        return False
    x, size, strides, *offset = args
    return (
        tuple(size) == tuple(x.shape)
        and all(n == 1 or old == new for n, old, new in zip(size, x.stride(), strides, strict=True))
        and (not offset or offset[0] in (None, x.storage_offset()))
    )


class _IdInterpreter(fx.Interpreter):
    """Runs one mode's graph node by node, layers by their own rule, everything else operation by operation."""

    def __init__(self, traced: TracedNetwork, mode: str, ids: IdRun, calls: Mapping[fx.Node, LayerCall]) -> None:
        super().__init__(traced.root, garbage_collect_values=True, graph=traced.graphs[mode])
        self.root, self.graph_mode, self.ids = traced.root, mode, ids
        self.calls, self.weights = calls, weight_nodes(calls.values())
        self.dispatch = _IdDispatch(ids)

    def run_node(self, n: fx.Node) -> Any:
        self.ids.node, self.ids.mode = n, self.graph_mode
        call = self.calls.get(n)
        if n in self.weights:
            return super().run_node(n)
        if call is None and not has_own_rule(n):
            with self.dispatch:  # operation by operation of those that it consists of
                return super().run_node(n)
        out = super().run_node(n)
        if call is None:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            apply_rule(self.ids, n.target, args, kwargs, out)
            return out
        record_layer(self.ids, call, self.env[call.input], out, n)
        if call.rows is not None:
            written = torch.from_numpy(self.ids.record.layers[call.weight].outputs)
            for target in call.rows.rows.values():  # such as a gain
                self.ids.record.unite(self.ids.ids[tensor_at(self.root, target)].flatten(), written)
        if call.is_tied:
            self._tie(call)
        return out

    def _tie(self, call: LayerCall) -> None:
        """A layer reads the channels that the embedding writes whose weight it has."""
        record, layer = self.ids.record, self.ids.record.layers[call.weight]
        record.unite(torch.from_numpy(layer.inputs), self.ids.ids[tensor_at(self.root, call.weight)][0])
        if call.bias is not None:
            record.unite(torch.from_numpy(layer.outputs), self.ids.ids[tensor_at(self.root, call.bias)])


def record_layer(run: IdRun, call: LayerCall, x: Tensor, out: Tensor, node: fx.Node) -> None:
    """A layer reads the ids of its input's channels and writes fresh ones (or, called again, the same)."""
    record = run.record
    dim = call.geometry.channel_dim
    ids = run.find(x)
    if ids is None:  # made by the code or the input of a network: the same for all teachers
        ids = record.constant(f"{node.name} of {run.mode}", x.shape[dim]).view(
            -1, *[1] * (-1 - dim if dim < 0 else x.dim() - 1 - dim)
        )
        ids = ids.expand(x.shape)
    read = channel_ids(run, ids, dim, call.name).clone()
    padding = read == NO_ID  # channels of zeros: each an id of its own, that nothing else can take the place of
    read[padding] = record.new_ids(int(padding.sum()))
    record.positions += [("padding", i) for i in read[padding].tolist()]
    previous = record.layers.get(call.weight)
    if previous is None:
        written = record.new_ids(out.shape[dim])
        record.layers[call.weight] = LayerRecord(call, read.numpy(), written.numpy())
    else:
        if (previous.call.bias, previous.call.geometry, previous.call.groups) != (
            call.bias,
            call.geometry,
            call.groups,
        ):
            what = f"layers '{previous.call.name}' and '{call.name}' share a weight but differ in bias or stride"
            remedy = "Give each a weight of its own"
            raise UnmergeableError(Problem(what, remedy, call.name, node.meta["code"]))
        record.unite(torch.from_numpy(previous.inputs), read)
        written = torch.from_numpy(previous.outputs)
    record.reads[(run.mode, node.name)] = read.numpy()
    if call.groups > 1:
        blocks_in, blocks_out = read.view(call.groups, -1), written.view(call.groups, -1)
        for block in (blocks_in, blocks_out):
            record.tie(block[:, :1], block)
        record.tie(blocks_in[:, :1], blocks_out[:, :1])
    shape = [1] * out.dim()
    shape[dim] = len(written)
    values = written if previous is None else record.issue(f"{node.name} of {run.mode}", written)
    run.ids[out] = values.view(shape).expand(out.shape)


def channel_ids(run: IdRun, ids: Tensor, dim: int, where: str) -> Tensor:
    """The ids along the channel dimension; a channel that holds several keeps them together, named by the first."""
    columns = compact(ids.movedim(dim, 0), keep_first=True)
    columns = columns.reshape(columns.shape[0], -1)
    first = columns.max(dim=1).values if (columns == NO_ID).any() else columns[:, 0]
    mixed = (columns != first[:, None]) & (columns != NO_ID)
    for c in mixed.any(dim=1).nonzero().flatten().tolist():
        values, pattern = columns[c].unique(return_inverse=True)
        run.record.tie(values[:1].expand(len(values)), values)
        first[c] = values[values != NO_ID][0]
        digest = hash(pattern.numpy().tobytes())
        run.record.patterns.append((f"{where} pattern {digest}", values[values != NO_ID].numpy()))
    return first


def run_on_ids(
    traced: TracedNetwork,
    example_inputs: Sequence[Any],
    predicted: Mapping[str, Collection[int]] | None = None,
    constants: Collection[str] = (),
    tie_streams: bool = False,
) -> IdRecord:
    """Runs both graphs of a network on ids.

    Args:
        traced: the network; its buffers change (BatchNorm statistics), as it runs in training mode too.
        example_inputs: what its graphs take, flat; float tensors of shape (N, C, ...).
        predicted: per mode the positions of the flat outputs that are predictions; None: see :func:`predictions`.
        constants: names of buffers that are the same for all teachers.
        tie_streams: whether channels that a LayerNorm or RMSNorm takes together can only be kept together.

    Raises:
        ValueError: naming the layer, if it can't be merged.
    """
    record = IdRecord()
    run = IdRun(record, tie_streams)
    predicted = predictions(traced) if predicted is None else predicted
    calls = {mode: layer_calls(graph, traced.root) for mode, graph in traced.graphs.items()}
    called = _called_weights(traced, calls)
    tensors = [x for x in example_inputs if isinstance(x, Tensor) and x.is_floating_point()]
    inputs = [_input_ids(record, x) for x in tensors]
    parameters = _element_ids(record, traced, {*called, *constants})
    with undisturbed(example_inputs):
        for mode in ("train",) if traced.is_one_graph else traced.graphs:
            given = pytree.tree_map_only(Tensor, torch.clone, [*example_inputs])  # the code may change them in place
            floating = (x for x in given if isinstance(x, Tensor) and x.is_floating_point())
            for x, ids in zip(floating, inputs, strict=True):
                run.ids[x] = ids
            for name, ids in parameters.items():
                run.ids[tensor_at(traced.root, name)] = ids
            try:
                out = _IdInterpreter(traced, mode, run, calls[mode]).run(*given)
            except UnmergeableError as error:
                raise UnmergeableError(*error.problems) from None
            except ValueError as error:  # a rule's own message, without what the interpreter adds to it
                raise ValueError(str(error.args[0]).partition("\n\nWhile executing")[0]) from None
            record.outputs += [
                np.unique(compact(run.ids[y]))
                for k, y in enumerate(out)
                if k in predicted[mode] and isinstance(y, Tensor) and y in run.ids
            ]
    if traced.is_one_graph:
        record.holds_in_eval_mode()
    used = {node.target for graph in traced.graphs.values() for node in graph.nodes if node.op == "get_attr"}
    record.tensors = {name: ids for name, ids in parameters.items() if name in used}
    _find_samples(traced, record)
    return record


def _find_samples(traced: TracedNetwork, record: IdRecord) -> None:
    """Where the samples lie in what layers and layer normalisations read.

    Where a network takes no other batch size, such as one that holds the graph that it works on, it is the one dimension,
    besides the channels', of the batch's size.
    """
    samples = samples_in(traced.inputs)
    in_order = torch.arange(samples, device="cpu")
    for mode, graph in traced.graphs.items():
        is_open = traced.is_open[mode]
        for node in graph.nodes:
            key = (mode, node.name)
            if not any(key in found for found in (record.reads, record.normalised, record.normalised_apart)):
                continue
            source = node.args[1 if op_name(node) == "addmm" else 0]
            shape, dims = source.meta["shape"], source.meta["sample_dims"]
            channels = (-1 if op_name(node) in {"linear", *PRODUCTS, *LAYER_NORMS} else 1) % len(shape)
            if not is_open:
                dims = [d for d, size in enumerate(shape) if size == samples and d != channels]
            if len(dims) == 1:
                size = shape[dims[0]]
                order, k = in_order if size == samples else _samples_along(source, dims[0], samples), size // samples
                if order is None or torch.equal(order, in_order.repeat_interleave(k)):
                    record.sample_dims[key] = dims[0]
                elif torch.equal(order, in_order.repeat(k)):
                    record.sample_dims[key] = dims[0]
                    record.fast_samples.add(key)


def _samples_along(node: fx.Node, dim: int, samples: int) -> Tensor | None:
    """Which sample each entry of a dimension that holds several of each belongs to; None if that can't be followed."""
    moved: list[fx.Node] = []
    while True:
        shape, dims = node.meta.get("shape"), node.meta.get("sample_dims")
        if shape is not None and dims is not None and len(dims) == 1 and shape[dims[0]] == samples:
            break
        name = op_name(node)
        if not (name in MOVEMENTS or name in RESHAPES or name in SAME or is_pointwise(name)):
            return None
        moved.append(node)
        if not isinstance(node.args[0], fx.Node):
            return None
        node = node.args[0]
    numbers = torch.arange(samples, device="cpu")
    numbers = numbers.view([-1 if d == dims[0] else 1 for d in range(len(shape))]).expand(shape)
    for step in reversed(moved):
        if op_name(step) in RESHAPES:
            numbers = numbers.reshape(step.meta["shape"])
        elif op_name(step) in MOVEMENTS:
            if any(isinstance(a, fx.Node) for a in pytree.tree_leaves(step.args[1:])):
                return None
            numbers = step.target(numbers, *step.args[1:], **step.kwargs)  # type: ignore[operator]
    rows = numbers.movedim(dim, 0).reshape(numbers.shape[dim], -1)
    return rows[:, 0] if bool((rows == rows[:, :1]).all()) else None


def _input_ids(record: IdRecord, x: Tensor) -> Tensor:
    ids = record.constant("input", x.shape[1] if x.dim() > 1 else 1)
    return (ids.view(1, -1, *[1] * (x.dim() - 2)) if x.dim() > 1 else ids[0]).expand(x.shape)


def _called_weights(traced: TracedNetwork, calls: Mapping[str, Mapping[fx.Node, LayerCall]]) -> set[str]:
    """Parameters that belong to layers, which have a rule of their own."""
    called = {name for of_mode in calls.values() for call in of_mode.values() for name in call.tensors}
    problems = []
    for mode, graph in traced.graphs.items():
        layers = calls[mode].keys() | weight_nodes(calls[mode].values())
        for node in graph.nodes:
            if node.op != "get_attr":
                continue
            outside = [user for user in node.users if user not in layers]
            owner, is_parametrized, of = str(node.target).partition(".parametrizations.")
            if is_parametrized and outside:
                problems.append(_parametrized(traced.root, owner, of.partition(".")[0]))
            elif node.target in called and outside:
                _refuse_tied(traced.root, str(node.target), outside[0])
    if problems:
        raise UnmergeableError(*dict.fromkeys(problems))
    return called


def _parametrized(root: nn.Module, path: str, tensor: str) -> Problem:
    kinds = [type(kind).__name__ for kind in root.get_submodule(f"{path}.parametrizations.{tensor}").children()]
    what = (
        f"layer '{path}' computes its {tensor} by {', '.join(kinds).lstrip('_')}, which can't be merged (of PyTorch's "
        "parametrizations only weight_norm can)"
    )
    remedy = (
        f"Call torch.nn.utils.parametrize.remove_parametrizations(teacher.{path}, '{tensor}') on every teacher in eval mode, "
        f"which keeps the {tensor} that it predicts with. Don't register it on the student again: it computes another {tensor}"
    )
    return Problem(what, remedy, path)


def _refuse_tied(root: nn.Module, name: str, outside: fx.Node) -> None:
    """A layer's weight is cut as the layer is, the last one's divided by T too: it can't serve another operation as it is."""
    parameter = tensor_at(root, name)
    tied = [other for other, its in root.named_parameters(remove_duplicate=False) if its is parameter]
    if len(tied) == 1:
        what = f"parameter '{name}' is the weight or bias of a layer and also used outside it (in '{module_path(outside)}')"
        remedy = "use a parameter of its own there"
        raise UnmergeableError(Problem(what, remedy, module_path(outside), outside.meta["code"]))
    path, own = module_path(outside), tied[0].rpartition(".")[2]
    what = (
        f"'{path}' ({type(root.get_submodule(path)).__name__}) and a layer use one parameter ({', '.join(tied)}), which would "
        "need two values after a merge"
    )
    remedy = (
        "Give each its own in every teacher, for example by "
        f"teacher.{path}.{own} = torch.nn.Parameter(teacher.{path}.{own}.detach().clone())"
    )
    raise UnmergeableError(Problem(what, remedy, path, outside.meta["code"]))


def _element_ids(record: IdRecord, traced: TracedNetwork, called: set[str]) -> dict[str, Tensor]:
    """Fresh ids for the elements of every floating tensor that no layer owns; of an embedding for its columns."""
    root = traced.root
    nodes = [node for graph in traced.graphs.values() for node in graph.nodes if op_name(node) in EMBEDDINGS]
    embeddings = {str(node.args[0].target) for node in nodes if isinstance(node.args[0], fx.Node)}
    changed = changed_tensors(traced)
    ids = {}
    for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
        if name in called or not tensor.is_floating_point() or not tensor.numel() or name.startswith(f"{CONSTANT}."):
            continue
        if tensor.numel() == 1 and name not in changed:
            ids[name] = record.scalar().view(tensor.shape)
        elif name in embeddings:
            ids[name] = record.new_ids(tensor.shape[-1]).expand(tensor.shape)
        elif tensor.numel() <= _MOST_ELEMENTS:
            ids[name] = record.new_ids(tensor.numel()).view(tensor.shape)
        else:
            ids[name] = record.new_ids(1).expand(tensor.shape)
    return ids


def changed_tensors(traced: TracedNetwork) -> set[str]:
    """Names of the parameters and buffers that a forward changes, itself or through a view."""
    found = set()
    for graph in traced.graphs.values():
        for tensor in graph.nodes:
            waiting = [tensor] if tensor.op == "get_attr" else []
            while waiting:
                value = waiting.pop()
                for user in value.users:
                    if op_name(user) in NORMS or (writes_in_place(user) and user.args[0] is value):
                        found.add(str(tensor.target))
                    elif may_alias(user):
                        waiting.append(user)
    return found

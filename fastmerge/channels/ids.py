"""Run a network on channel ids instead of numbers.

Every convolution and linear layer issues fresh ids for its output channels, and every other parameter for its elements.
From there ids go where numbers go: a view, a concatenation, a shuffle moves them, an elementwise function keeps them, and
where two ids meet in one number they are *united*: they are the same channel. What is left is a record of who writes and who
reads each channel, with no line about any architecture.

Ids live in int64 tensors of the activation's shape, expanded (stride 0) where they repeat, so that they cost little.
-1 marks an element without a channel, such as zero padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastmerge.channels.layer_calls import LayerCall, layer_call, parameter_names
from fastmerge.channels.record import NO_ID, IdRecord, IdRun, LayerRecord, compact
from fastmerge.channels.rules import apply_rule
from fastmerge.channels.samples import find_sample_dims
from fastmerge.channels.shapes import find_shapes
from fastmerge.channels.tracing import TracedNetwork, module_path, tensor_at, undisturbed


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

    def __init__(self, traced: TracedNetwork, mode: str, ids: IdRun, names: dict[int, str]) -> None:
        self.graph_mode = mode
        super().__init__(**traced.in_mode(mode), garbage_collect_values=True)
        self.root = traced.root
        self.ids = ids
        self.names = names
        self.dispatch = _IdDispatch(ids)

    def run_node(self, n: fx.Node) -> Any:
        self.ids.node, self.ids.mode = n, self.graph_mode
        call = layer_call(n, self.root, self.names)
        if call is None:
            with self.dispatch:
                return super().run_node(n)
        out = super().run_node(n)
        record_layer(self.ids, call, self.env[call.input], out, n)
        return out


def record_layer(run: IdRun, call: LayerCall, x: Tensor, out: Tensor, node: fx.Node) -> None:
    """A layer reads the ids of its input's channels and writes fresh ones (or, called again, the same)."""
    record = run.record
    dim = call.geometry.channel_dim
    if x not in run.ids:
        raise ValueError(
            f"layer '{call.name}' reads a tensor whose channels can't be followed back to the network's input or to a "
            "parameter (made inside the forward, for example by torch.zeros and assignment). Build it by torch.cat instead"
        )
    read = channel_ids(run, run.ids[x], dim, call.name).clone()
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
            raise ValueError(
                f"layers '{previous.call.name}' and '{call.name}' share a weight but differ in bias or stride"
            )
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


def run_on_ids(traced: TracedNetwork, example_inputs: tuple[Any, ...]) -> IdRecord:
    """Runs both graphs of a network on ids.

    Args:
        traced: the network; its buffers change (BatchNorm statistics), as it runs in training mode too.
        example_inputs: what its forward takes; float tensors of shape (N, C, ...).

    Raises:
        ValueError: naming the layer, if it can't be merged.
    """
    record = IdRecord()
    run = IdRun(record)
    names = parameter_names(traced.root)
    called = _called_weights(traced, names)
    inputs = [_input_ids(record, x) for x in example_inputs if isinstance(x, Tensor)]
    parameters = _element_ids(record, traced.root, called)
    with undisturbed(example_inputs):
        for mode in ("train", "eval"):
            for x, ids in zip([x for x in example_inputs if isinstance(x, Tensor)], inputs, strict=True):
                run.ids[x] = ids
            for name, ids in parameters.items():
                run.ids[tensor_at(traced.root, name)] = ids
            try:
                out = _IdInterpreter(traced, mode, run, names).run(*example_inputs)
            except ValueError as error:  # a rule's own message, without what the interpreter adds to it
                raise ValueError(str(error.args[0]).partition("\n\nWhile executing")[0]) from None
            record.outputs += [
                np.unique(compact(run.ids[y]))
                for y in torch.utils._pytree.tree_leaves(out)
                if isinstance(y, Tensor) and y in run.ids
            ]
    record.tensors = _used(traced, parameters)
    record.shapes = find_shapes(traced, example_inputs)
    record.sample_dims = find_sample_dims(traced, example_inputs, record.shapes)
    return record


def _input_ids(record: IdRecord, x: Tensor) -> Tensor:
    ids = record.new_ids(x.shape[1] if x.dim() > 1 else 1)
    record.inputs.append(ids.numpy())
    record.positions += [("input", i) for i in ids.tolist()]
    return ids.view(1, -1, *[1] * (x.dim() - 2)).expand(x.shape) if x.dim() > 1 else ids.expand(x.shape)


def _called_weights(traced: TracedNetwork, names: dict[int, str]) -> set[str]:
    """Parameters that belong to layers, which have a rule of their own."""
    called = set()
    for graph in traced.graphs.values():
        calls = {n: c for n in graph.nodes if (c := layer_call(n, traced.root, names)) is not None}
        called |= {name for call in calls.values() for name in (call.weight, call.bias) if name is not None}
    for graph in traced.graphs.values():
        for node in graph.nodes:
            name = names.get(id(tensor_at(traced.root, str(node.target)))) if node.op == "get_attr" else None
            if name in called and any(layer_call(user, traced.root, names) is None for user in node.users):
                raise ValueError(
                    f"parameter '{name}' is the weight or bias of a layer and also used outside it (in '{module_path(node)}'); "
                    "use a parameter of its own there"
                )
            if node.op == "call_module" and layer_call(node, traced.root, names) is None:
                _refuse_tied(traced.root, str(node.target), called, names)
    return called


def _refuse_tied(root: nn.Module, path: str, called: set[str], names: dict[int, str]) -> None:
    """A layer's weight is cut as the layer is, the last one's divided by T too: it can't serve another module as it is."""
    module = root.get_submodule(path)
    for own, parameter in module.named_parameters():
        if names[id(parameter)] in called:
            tied = [name for name, other in root.named_parameters(remove_duplicate=False) if other is parameter]
            raise ValueError(
                f"'{path}' ({type(module).__name__}) and a layer use one parameter ({', '.join(tied)}), of which a merge would "
                "need two values. Give each its own in every teacher, for example by "
                f"teacher.{path}.{own} = torch.nn.Parameter(teacher.{path}.{own}.detach().clone())"
            )


def _element_ids(record: IdRecord, root: nn.Module, called: set[str]) -> dict[str, Tensor]:
    """Fresh ids for the elements of every floating tensor that no layer owns; one id for all where it has two dimensions."""
    ids = {}
    for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
        if name in called or not tensor.is_floating_point():
            continue
        vector = sum(k > 1 for k in tensor.shape) <= 1
        ids[name] = (
            record.new_ids(tensor.numel()).view(tensor.shape) if vector else record.new_ids(1).expand(tensor.shape)
        )
    return ids


def _used(traced: TracedNetwork, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those tensors that a graph refers to, directly or through the module that owns them."""
    targets = {str(n.target) for g in traced.graphs.values() for n in g.nodes if n.op in ("get_attr", "call_module")}

    def owners(name: str) -> Iterator[str]:
        """The tensor itself and every module around it: attention has a linear layer of its own inside."""
        parts = name.split(".")
        return (".".join(parts[:k]) for k in range(len(parts), 0, -1))

    return {name: ids for name, ids in parameters.items() if not targets.isdisjoint(owners(name))}

"""The big student's modules under the teachers' own paths: built, where each tensor lies, and the student's template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from fastmerge.channels.groups import AxisUnits, ChannelGroups
from fastmerge.channels.layer_calls import LayerCall
from fastmerge.channels.traced_network import CONSTANT, tensor_at
from fastmerge.isolation import copied
from fastmerge.wide.analysis import BATCH_NORM_TENSORS, Analysis
from fastmerge.wide.layers import GroupedLayer, WideLayer
from fastmerge.wide.norms import WideBatchNorm
from fastmerge.wide.population import Population
from fastmerge.wide.streams import AveragedTensor, GateStreams, StreamTensors


@dataclass
class Layout:
    """Where the teachers' tensors lie in the wide network.

    Attributes:
        layers: per weight name of a dense layer, its path.
        biases: likewise the name of its bias, where it has one.
        magnitudes: per name of the magnitude of a normalised weight, the weight's name and the dimension of its norms.
        side_by_side: per name of a tensor of a normalisation or grouped convolution, the qualified name of the one that holds
            the teachers' along its first dimension.
        averaged: per name of a tensor that acts on the network's output, the qualified name of the mean.
        per_teacher: per name of any other tensor, its T qualified names.
    """

    layers: dict[str, str] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    magnitudes: dict[str, tuple[str, int]] = field(default_factory=dict)
    side_by_side: dict[str, str] = field(default_factory=dict)
    averaged: dict[str, str] = field(default_factory=dict)
    per_teacher: dict[str, list[str]] = field(default_factory=dict)

    @property
    def merged(self) -> set[str]:
        """Names of the teachers' tensors that are not the same for all."""
        return {
            *self.layers,
            *self.biases.values(),
            *self.magnitudes,
            *self.side_by_side,
            *self.averaged,
            *self.per_teacher,
        }


class Along(NamedTuple):
    """A dimension of a tensor of the big student along which candidates lie.

    Attributes:
        dim: the dimension.
        units: along one teacher's.
        teacher: whose it is; None: all teachers' are there, one after another.
        in_blocks: whether it is that of a block of the teachers', one under the other, each with its own.
    """

    dim: int
    units: AxisUnits
    teacher: int | None = None
    in_blocks: bool = False

    def left(self, population: Population) -> Tensor:
        """Which entries that a population has: bool (T, entries), of one teacher's tensor (1, entries)."""
        left = population.is_left(self.units)
        return left if self.teacher is None else left[self.teacher, None]


def candidates_along(network: nn.Module, layout: Layout, groups: ChannelGroups) -> Iterator[tuple[str, list[Along]]]:
    """The names of a big student's parameters and buffers, each with the dimensions along which candidates lie in it."""
    for weight, path in layout.layers.items():
        wide = network.get_submodule(path)
        assert isinstance(wide, WideLayer)
        geometry, wiring = wide.geometry, wide.wiring
        blocks = wiring.has_off_diagonal and not wide.linked
        outputs = Along(geometry.out_dim, groups.outputs[weight], in_blocks=blocks and geometry.out_dim == 1)
        inputs = Along(geometry.in_dim, groups.inputs[weight], in_blocks=blocks and geometry.in_dim == 1)
        written, read = [outputs] if wiring.writes_streams else [], [inputs] if wiring.reads_streams else []
        yield f"{path}.weight", [*written, *read]
        if wide.bias is not None:
            yield f"{path}.bias", [Along(0, along.units) for along in written]
    for name, place in layout.side_by_side.items():
        dim, units = groups.tensors.get(name, (None, None))
        yield place, [] if dim is None or units is None else [Along(0, units)]
    for place in layout.averaged.values():
        yield place, []
    for name, places in layout.per_teacher.items():
        dim, units = groups.tensors.get(name, (None, None))
        for teacher, place in enumerate(places):
            yield place, [] if dim is None or units is None else [Along(dim, units, teacher)]


def build_network(analysis: Analysis, teachers: Sequence[nn.Module]) -> tuple[nn.Module, Layout]:
    """Builds the big student's modules from the teachers'.

    Args:
        analysis: of the first teacher.
        teachers: T networks of one architecture.

    Returns:
        A tree of modules with the teachers' paths, and where everything is.
    """
    network, layout = nn.Module(), Layout()
    for weight, (call, wiring) in analysis.wirings.items():
        biases = None if call.bias is None else [tensor_at(t, call.bias).detach() for t in teachers]
        wide = WideLayer(
            call.geometry,
            wiring,
            [_weight(call, t) for t in teachers],
            biases,
            keep_each_bias=analysis.each and not wiring.writes_streams,
        )
        attach(network, call.name, wide)
        layout.layers[weight] = call.name
        _add_magnitude(layout, call)
        if call.bias is not None:
            layout.biases[weight] = call.bias
    for mode, graph in analysis.traced.graphs.items():
        for node in graph.nodes:
            if analysis.is_wide(mode, node):
                _attach_wide(network, layout, analysis, teachers, mode, node)
            elif node.op == "get_attr":
                _attach_tensor(network, layout, analysis, teachers, str(node.target))
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    return network, layout


def _weight(call: LayerCall, teacher: nn.Module) -> Tensor:
    """What is trained of a teacher's weight: of one that is normalised, the weight itself."""
    parameter = tensor_at(teacher, call.weight).detach()
    if call.norm is None:
        return parameter
    return torch._weight_norm(parameter, tensor_at(teacher, call.norm.magnitude).detach(), call.norm.dim)


def _add_magnitude(layout: Layout, call: LayerCall) -> None:
    if call.norm is not None:
        layout.magnitudes[call.norm.magnitude] = (call.weight, call.norm.dim)


def _attach_wide(
    network: nn.Module, layout: Layout, analysis: Analysis, teachers: Sequence[nn.Module], mode: str, node: fx.Node
) -> None:
    """Attaches the teachers' BatchNorms or grouped convolutions as one module, unless it is there."""
    call, norm = analysis.calls[mode].get(node), analysis.norms[mode].get(node)
    if norm is not None:
        path, tensors = norm.path, norm.tensors
    else:
        assert call is not None
        path, tensors = call.name, {"weight": call.weight, **({} if call.bias is None else {"bias": call.bias})}
    if has(network, path):
        return
    own = {key: [tensor_at(t, name).detach() for t in teachers] for key, name in tensors.items()}
    if norm is not None:
        options = {"eps": norm.eps, "momentum": norm.momentum, **dict.fromkeys(BATCH_NORM_TENSORS)}
        norms = [SimpleNamespace(**{**options, **{key: own[key][t] for key in own}}) for t in range(len(teachers))]
        wide: nn.Module = WideBatchNorm(norms)
    else:
        assert call is not None
        weights = [_weight(call, t) for t in teachers]
        wide = GroupedLayer(call.geometry, call.groups, weights, own.get("bias"))
        _add_magnitude(layout, call)
    attach(network, path, wide)
    layout.side_by_side.update({name: f"{path}.{key}" for key, name in tensors.items()})


def _attach_tensor(
    network: nn.Module, layout: Layout, analysis: Analysis, teachers: Sequence[nn.Module], name: str
) -> None:
    """Attaches a tensor that the graph reads, of each teacher or common to all, unless a wide module holds it."""
    if name in analysis.held or has(network, name):
        return
    if name in analysis.averaged:
        attach(network, name, AveragedTensor([tensor_at(t, name) for t in teachers], analysis.each))
        layout.averaged[name] = f"{name}.mean"
    elif name in analysis.groups.tensors:
        tensors = StreamTensors([tensor_at(t, name) for t in teachers])
        attach(network, name, tensors)
        layout.per_teacher[name] = [f"{name}.{tensors.attribute(t)}" for t in range(len(teachers))]
    else:
        owner = analysis.traced.root if name.startswith(f"{CONSTANT}.") else teachers[0]
        attach(network, name, tensor_at(owner, name).detach().clone())


def attach_missing(network: nn.Module, analysis: Analysis) -> None:
    """Attaches the tensors that graphs for inputs of another shape read, and that are the same for all teachers."""
    for graph in analysis.traced.graphs.values():
        for node in graph.nodes:
            target = str(node.target)
            if node.op == "get_attr" and target not in analysis.held and not has(network, target):
                attach(network, target, tensor_at(analysis.traced.root, target).detach().clone())


def attach(network: nn.Module, path: str, value: nn.Module | Tensor) -> None:
    """Puts a module or constant tensor at a dotted path, making containers on the way."""
    *containers, last = path.split(".")
    for name in containers:
        if name not in network._modules:
            network.add_module(name, nn.Module())
        network = network.get_submodule(name)
    if isinstance(value, nn.Module):
        container = network._modules.get(last)
        network.add_module(last, value)
        if container is not None:  # what was put below a container that turns out to be a module
            for name, child in container.named_children():
                value.add_module(name, child)
    else:
        network.register_buffer(last, value, persistent=False)


def attach_gate(
    network: nn.Module,
    layer: str,
    columns: Sequence[Tensor],
    channel_dim: int,
    sample_dim: int | None,
    samples_are_fast: bool,
) -> str:
    """Puts the module that gates what a layer reads below ``gates_before``; a layer used twice may read different channels.

    Args:
        network: the wide modules.
        layer: the layer's path.
        columns: per teacher, of the gate matrix; see :class:`~fastmerge.wide.streams.GateStreams`.
        channel_dim: likewise.
        sample_dim: likewise.
        samples_are_fast: likewise.

    Returns:
        The module's path, of one that was there before if it gates the same channels.
    """
    path = f"gates_before.{layer.replace('.', '_')}"
    while has(network, path):
        gate = network.get_submodule(path)
        assert isinstance(gate, GateStreams)
        kind = gate.sample_dim, gate.samples_are_fast
        if kind == (sample_dim, samples_are_fast) and torch.equal(gate.index.cpu(), torch.cat(list(columns))):
            return path
        path += "_"
    device = next(network.parameters()).device  # lowered anew, it need not be the CPU
    attach(
        network, path, GateStreams([column.to(device) for column in columns], channel_dim, sample_dim, samples_are_fast)
    )
    return path


def has(network: nn.Module, path: str) -> bool:
    """Whether something other than a bare container lies at a dotted path."""
    value: Any = network
    for name in path.split("."):
        if not hasattr(value, name):
            return False
        value = getattr(value, name)
    return type(value) is not nn.Module


class StudentTemplate:
    """The class, options and constants of a teacher, its merged tensors on the meta device so that they take no memory.

    Args:
        teacher: a network; it is copied.
        layout: names the tensors that a merge replaces.

    Attributes:
        skeleton: the copy.
        merged: names of the tensors that a merge replaces.
    """

    def __init__(self, teacher: nn.Module, layout: Layout) -> None:
        self.skeleton = copied(teacher)
        self.merged = layout.merged
        self.strip(self.skeleton)

    def strip(self, network: nn.Module) -> None:
        """Puts a network's merged tensors on the meta device."""
        names = _names(network)
        _replace(network, {t: torch.empty_like(t, device="meta") for t, name in names.items() if name in self.merged})

    def blank(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """A network without the teachers' weights, zeros in their place, to be traced."""
        network = copied(self.skeleton)
        tensors = {}
        for tensor in _names(network):
            new = torch.zeros_like(tensor, device=device) if tensor.is_meta else tensor.detach().to(device)
            tensors[tensor] = new.to(dtype) if new.is_floating_point() else new
        _replace(network, tensors)
        return network

    def __deepcopy__(self, memo: dict[int, Any]) -> StudentTemplate:
        return self  # nobody changes it

    def build(self, tensors: Mapping[str, Tensor], like: Tensor) -> nn.Module:
        """A network with the given parameters and buffers.

        Args:
            tensors: by name; tied parameters under their first name.
            like: device and dtype for what is not among them.
        """
        student = copied(self.skeleton)
        names = _names(student)
        resized = any(t.shape != tensors[name].shape for t, name in names.items() if name in tensors)
        _replace(student, {t: tensors[name] if name in tensors else _like(t, like) for t, name in names.items()})
        if resized:
            for module in student.modules():
                _fit(module)
        return student


def _fit(module: nn.Module) -> None:
    """Has a layer say of itself what its tensors are."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, _ConvNd) and module.groups == 1:
        first, second = weight.shape[:2]
        module.in_channels, module.out_channels = (first, second) if module.transposed else (second, first)
    elif isinstance(module, _ConvNd) and not module.transposed:  # blocks of one size, of which there are more or fewer
        module.groups = module.groups * len(weight) // module.out_channels
        module.in_channels, module.out_channels = module.groups * weight.shape[1], len(weight)
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.GroupNorm):
        module.num_groups, module.num_channels = module.num_groups * len(weight) // module.num_channels, len(weight)
    elif isinstance(module, _NormBase):
        module.num_features = len(weight)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = weight.shape[1]


def _names(module: nn.Module) -> dict[Tensor, str]:
    return {tensor: name for name, tensor in [*module.named_parameters(), *module.named_buffers()]}


def _like(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.detach().to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)


def _replace(module: nn.Module, replacements: Mapping[Tensor, Tensor]) -> None:
    """Puts other tensors in the place of a module's parameters and buffers, ties kept."""
    made = {
        old: nn.Parameter(new, new.is_floating_point()) if isinstance(old, nn.Parameter) else new
        for old, new in replacements.items()
    }
    for part in module.modules():
        owned: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for tensors in owned:
            for key, old in tensors.items():
                if old is not None and old in made:
                    tensors[key] = made[old]

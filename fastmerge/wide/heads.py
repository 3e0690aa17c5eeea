"""Teachers of different label sets: last layers side by side, so that all teachers have the outputs of all.

Teacher t of K_t classes gets a last layer of K = K_1 + … + K_T outputs: its own rows, T times as large, among zeros. Such
networks are of one architecture, and the mean of their outputs is every teacher's own logits side by side. So whatever merges
networks of one architecture by the mean of their outputs merges these.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastmerge.channels.aten import is_pointwise, op_name
from fastmerge.channels.groups import OUTPUT
from fastmerge.channels.layer_calls import LayerCall
from fastmerge.channels.traced_network import TracedNetwork, module_path
from fastmerge.problems import Problem, UnmergeableError
from fastmerge.wide.analysis import Analysis

HEADS = ("average", "concatenate", "separate")
_COUNTS = ("num_classes", "num_labels")  # attributes of networks that say how many outputs there are


@dataclass(frozen=True)
class Head:
    """A last layer.

    Attributes:
        weight: name of its weight.
        bias: name of its bias, or None.
        out_dim: the weight's dimension of outputs.
        sizes: outputs of each teacher's.
    """

    weight: str
    bias: str | None
    out_dim: int
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """Where the teachers' parts lie in an output: along which dimension, and how many of it are each teacher's."""

    dim: int
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Parts:
    """The outputs in which the teachers' parts lie side by side.

    Attributes:
        outputs: per mode ("train" or "eval") and position among the flat outputs.
    """

    outputs: Mapping[str, Mapping[int, Part]]

    def split(self, output: Any, mode: str) -> Any:
        """The same output with a tuple of the teachers' parts in the place of each tensor that has parts."""
        leaves, spec = pytree.tree_flatten(output)
        for position, part in self.outputs[mode].items():
            leaves[position] = leaves[position].split(part.sizes, part.dim)
        return leaves[0] if spec.is_leaf() else pytree.tree_unflatten(leaves, spec)

    def positions(self, wanted: frozenset[int], count: int, mode: str) -> list[int]:
        """Where some of so many flat outputs lie among those of :meth:`split`."""
        found: list[int] = []
        at = 0
        for position in range(count):
            part = self.outputs[mode].get(position)
            length = 1 if part is None else len(part.sizes)
            found += range(at, at + length) if position in wanted else ()
            at += length
        return found


class SeparateHeads(nn.Module):
    """A network whose outputs are the teachers' side by side, as a network that gives a tuple of them.

    Args:
        network: of the teachers' class, with the classes of all.
        parts: of its outputs.
    """

    def __init__(self, network: nn.Module, parts: Parts) -> None:
        super().__init__()
        self.network, self.parts = network, parts
        self.training = network.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network gives, each teacher's logits apart: a tuple of (N, K_t)."""
        return self.parts.split(self.network(*args, **kwargs), "train" if self.training else "eval")


def find_heads(analysis: Analysis, nonlinear: set[tuple[str, str]], teachers: Sequence[nn.Module]) -> list[Head]:
    """The last layers of a network, in all teachers.

    Args:
        analysis: of the first teacher.
        nonlinear: (mode, node name) of its operations that do not commute with a mean.
        teachers: of one architecture but for the last layers' outputs.

    Raises:
        ValueError: the outputs of several networks can't lie side by side in one of this kind, saying why.
    """
    last: dict[str, LayerCall] = {}
    for mode, calls in analysis.calls.items():
        for call in calls.values():
            if call.weight in analysis.groups.outputs and analysis.averages(call):
                last.setdefault(call.weight, call)
        _check_tail(analysis, mode, nonlinear)
    own = {name for call in last.values() for name in call.tensors}
    if further := sorted(analysis.averaged - own):
        raise _unfit(f"'{further[0]}' acts on the output after the last layer", further[0].rpartition(".")[0])
    if not last:
        raise _unfit("the network has no last layer of its own", "")
    heads = []
    for call in last.values():
        rows = analysis.groups.outputs[call.weight].group
        if not call.is_plain or call.groups > 1:
            kind = "shares its weight" if call.is_tied else "has groups" if call.groups > 1 else "computes its weight"
            raise _unfit(f"the last layer '{call.name}' {kind}", call.name)
        if not bool((rows == OUTPUT).all()):
            raise _unfit(f"other layers read a part of the output of the last layer '{call.name}'", call.name)
        dim = call.geometry.out_dim
        shapes = [dict(teacher.named_parameters()).get(call.weight) for teacher in teachers]
        sizes = tuple(w.shape[dim] if w is not None and w.dim() > dim else 0 for w in shapes)
        heads.append(Head(call.weight, call.bias, dim, sizes))
    return heads


def _check_tail(analysis: Analysis, mode: str, nonlinear: set[tuple[str, str]]) -> None:
    """Raises where what follows the last layer mixes classes."""
    tail = set()
    for node in analysis.traced.graphs[mode].nodes:
        call = analysis.calls[mode].get(node)
        if call is not None and call.weight in analysis.groups.outputs and analysis.averages(call):
            tail.add(node)
        elif any(source in tail for source in node.all_input_nodes):
            tail.add(node)
            if (mode, node.name) in nonlinear and not is_pointwise(op_name(node)):
                where = f"'{op_name(node)}' in '{module_path(node)}'" if module_path(node) else f"'{op_name(node)}'"
                raise UnmergeableError(
                    Problem(
                        f"heads= needs networks whose outputs are logits; {where} follows the last layer and depends on all "
                        "classes together",
                        "Leave it out of the networks, and put it into the loss",
                        module_path(node),
                        node.meta["code"],
                    )
                )


def _unfit(why: str, where: str) -> UnmergeableError:
    return UnmergeableError(
        Problem(f"heads= needs last layers that can grow by the other teachers' classes; {why}", "", where)
    )


def joined(teacher: nn.Module, heads: Sequence[Head], number: int) -> nn.Module:
    """A teacher with the outputs of all, of which it gives T times its own and zeros; all other tensors are the teacher's."""
    tensors = [*teacher.parameters(), *teacher.buffers()]
    network = copy.deepcopy(teacher, {id(tensor): tensor for tensor in tensors})
    modules, parameters = dict(network.named_modules()), dict(network.named_parameters())
    for head in heads:
        for name, dim in ((head.weight, head.out_dim), (head.bias or "", 0)):
            old = parameters.get(name)
            if old is not None and old.dim() > dim:  # networks that differ in more than that are refused as such
                path, _, attribute = name.rpartition(".")
                padded = _padded(old, dim, head.sizes, number)
                setattr(modules[path], attribute, nn.Parameter(padded, old.requires_grad))
        for module in network.modules():
            for attribute in _COUNTS:
                if vars(module).get(attribute) == head.sizes[number]:
                    setattr(module, attribute, sum(head.sizes))
        layer = modules.get(head.weight.rpartition(".")[0])
        for attribute in ("out_features", "out_channels"):
            if layer is not None and attribute in vars(layer):
                setattr(layer, attribute, sum(head.sizes))
    return network


@torch.no_grad()
def _padded(tensor: Tensor, dim: int, sizes: Sequence[int], number: int) -> Tensor:
    """A teacher's rows, T times as large, among zeros for the other teachers'."""
    shape = list(tensor.shape)
    if shape[dim] != sizes[number]:
        return tensor.clone()
    shape[dim] = sum(sizes)
    whole = tensor.new_zeros(shape)
    whole.narrow(dim, sum(sizes[:number]), sizes[number]).copy_(tensor).mul_(len(sizes))
    return whole


def find_parts(first: TracedNetwork, whole: TracedNetwork, heads: Sequence[Head], mode: str) -> dict[int, Part]:
    """Where the teachers' parts lie in the outputs of a mode, by position among the flat ones.

    Args:
        first: the first teacher's graphs.
        whole: those of a network with the outputs of all.
        heads: the last layers.
        mode: "train" or "eval".

    Raises:
        ValueError: an output is of another length than that of one last layer.
    """
    found = {}
    for position, (own, all_of) in enumerate(zip(first.output_shapes(mode), whole.output_shapes(mode), strict=True)):
        if own is None or all_of is None:
            continue
        samples = whole.outputs(mode)[position].meta["sample_dims"]  # the two may be traced with other numbers of them
        dims = [d for d, (a, b) in enumerate(zip(own, all_of, strict=True)) if a != b and d not in samples]
        if not dims:
            continue
        fitting = {
            h.sizes for h in heads if len(dims) == 1 and (h.sizes[0], sum(h.sizes)) == (own[dims[0]], all_of[dims[0]])
        }
        if len(fitting) != 1:
            raise _unfit(
                f"an output of shape {own} becomes one of {all_of}, in which no dimension holds the classes alone", ""
            )
        found[position] = Part(dims[0], fitting.pop())
    return found

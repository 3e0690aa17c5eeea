"""R networks of one architecture as one module, which trains them all as if each were alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.optim import SGD, Optimizer

from fastmerge.batch_statistics import recalibrate
from fastmerge.big_student import BigStudent
from fastmerge.replay import replayed


class Stack(nn.Module):
    """R networks of one architecture: parameters (R, ...), forward (R, N, ...) → (R, N, ...).

    Its parameters are those of one network, under the same names within ``skeleton``, with a first dimension of R. An
    optimizer that works element by element, such as SGD, is R optimizers in one. The networks given are copied;
    :meth:`network` takes one out again.

    Args:
        networks: of one class and one set of shapes, on one device.

    Attributes:
        skeleton: one network with the tensors of all, for its code and its names.
        shared: names of integer buffers that all networks hold alike (tables of indices, counters); these have no first
            dimension of R.

    Raises:
        ValueError: there is no network, or their tensors have different names or shapes.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        if not networks:
            raise ValueError("a Stack needs at least one network; got none")
        self._size = len(networks)
        self._replays: dict[Any, Callable[..., tuple[Tensor]]] = {}
        self.skeleton = copy.deepcopy(networks[0])
        self._fill(networks)
        self.training = networks[0].training

    def __len__(self) -> int:
        return self._size

    def network(self, index: int) -> nn.Module:
        """A copy of one of the networks."""
        network = copy.deepcopy(self.skeleton)
        for name, tensor in tensors_of(network).items():
            value = tensor.detach() if name in self.shared else tensor.detach()[index].clone()
            if isinstance(tensor, nn.Parameter):
                tensor.data = value
            else:
                _assign(network, name, value)
        return network

    def networks(self) -> list[Any]:
        """Copies of all networks."""
        return [self.network(index) for index in range(len(self))]

    @property
    def kinds(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Parameters, buffers and shared buffers by their names in one network; the first two stacked."""
        buffers = dict(self.skeleton.named_buffers())
        own = {name: value for name, value in buffers.items() if name not in self.shared}
        return dict(self.skeleton.named_parameters()), own, {name: buffers[name] for name in self.shared}

    def unflatten(self, tensors: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Names tensors that come in the order of :attr:`kinds`."""
        remaining = iter(tensors)
        return [{name: next(remaining) for name in kind} for kind in self.kinds]

    def forward(self, *inputs: Tensor) -> Any:
        """Runs each network on its own inputs.

        Without gradients in eval mode the operations are traced once for each shape and replayed.

        Args:
            inputs: each (R, N, ...).
        """
        tensors = [tensor for kind in self.kinds for tensor in kind.values()]
        if self.training or torch.is_grad_enabled():
            return self._run(len(inputs), *tensors, *inputs)[0]
        key = (*(value.shape for value in inputs), self.mode)
        if key not in self._replays:
            count = len(inputs)
            self._replays[key] = replayed(lambda *t: self._run(count, *t), *tensors, *inputs, replicates=len(self))
        (outputs,) = self._replays[key](*tensors, *inputs)
        return outputs

    def recalibrate(self, batches: Iterable[Any]) -> None:
        """Estimates BatchNorm's statistics of each network anew, on its own part of stacked batches."""
        networks, kept = self.networks(), list(batches)
        for index, network in enumerate(networks):
            recalibrate(network, [tuple(value[index] for value in inputs) for inputs, _ in kept])
        self._fill(networks)

    def _run(self, count: int, *tensors: Tensor) -> list[Any]:
        def one(parameters: Any, buffers: Any, shared: Any, *inputs: Tensor) -> Any:
            return functional_call(self.skeleton, parameters | buffers | shared, inputs)

        dims = (0, 0, None, *[0] * count)
        of_all: Any = vmap(one, dims, randomness="different")
        return [of_all(*self.unflatten(tensors[:-count]), *tensors[-count:])]

    @property
    def mode(self) -> Any:
        """What else than shapes a traced forward depends on."""
        return None

    @property
    def form(self) -> tuple[Any, list[torch.Size]]:
        """What a traced training step depends on: the mode, and the shapes of the parameters."""
        return self.mode, [parameter.shape for parameter in self.parameters()]

    def _fill(self, networks: Sequence[nn.Module]) -> None:
        """Takes the values of the networks, into the skeleton's own parameters."""
        parameters = _stacked([dict(network.named_parameters()) for network in networks])
        buffers = _stacked([dict(network.named_buffers()) for network in networks])
        self.shared = tuple(name for name, value in buffers.items() if _is_common(value))
        for name, parameter in self.skeleton.named_parameters():
            parameter.data = parameters[name]
        for name, value in buffers.items():
            _assign(self.skeleton, name, value[0] if name in self.shared else value)
        self._replays.clear()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return state | {"_replays": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> Stack:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__getstate__().items()})
        return clone


class BigStack(Stack):
    """R big students of one shape: what a merge stage asks of one, this answers for all."""

    skeleton: BigStudent

    @property
    def num_teachers(self) -> int:
        return self.skeleton.num_teachers

    @property
    def groups(self) -> Any:
        return self.skeleton.groups

    @property
    def gates(self) -> Any:
        return self.skeleton.gates

    @property
    def group_means(self) -> Any:
        return self.skeleton.group_means

    @property
    def linked(self) -> bool:
        return self.skeleton.linked

    @property
    def target(self) -> float | dict[str, float]:
        return self.skeleton.target

    def shares(self, like: Tensor) -> Tensor | float:
        return self.skeleton.shares(like)

    def gate_parameters(self) -> Iterator[nn.Parameter]:
        return self.skeleton.gate_parameters()

    def weight_parameters(self) -> Iterator[nn.Parameter]:
        return self.skeleton.weight_parameters()

    @contextmanager
    def open_gates(self) -> Iterator[BigStack]:
        with self.skeleton.open_gates():
            yield self

    def open_candidates(self) -> Tensor:
        """As :meth:`BigStudent.open_candidates`, (R, candidates)."""
        return self.skeleton.open_candidates(torch.cat([self.gates[group.name].loc for group in self.groups], 1))

    def open_means(self) -> Tensor:
        """P of every group of each big student, (R, G)."""
        means: Tensor = self.group_means(self.open_candidates())
        return means

    def open_probabilities(self) -> dict[str, Tensor]:
        """As :meth:`BigStudent.open_probabilities`, (R,) for each group."""
        return {group.name: mean for group, mean in zip(self.groups, self.open_means().unbind(1), strict=True)}

    def link(self, optimizer: Optimizer | None = None) -> None:
        """Links all, and carries the optimizer's state along, as :meth:`BigStudent.link` does."""
        self._each(BigStudent.link, [] if optimizer is None else [optimizer])

    def compact(self, *optimizers: Optimizer, settled: bool = False) -> Any:
        """Drops closed channels, as :meth:`BigStudent.compact` does; for a stack of one, since sizes may differ."""
        (done,) = self._each(lambda big, *parts: big.compact(*parts, settled=settled), optimizers)
        return done

    def keep_only(self, candidates: Mapping[str, Tensor]) -> None:
        """As :meth:`BigStudent.keep_only`."""
        self._each(lambda big: big.keep_only(candidates), [])

    def candidates_in(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As :meth:`BigStudent.candidates_in`, of a stack's state."""
        return self.skeleton.candidates_in(state, "skeleton.")

    def compress(self, *, in_place: bool = False) -> Stack:
        """The students of all."""
        return Stack([big.compress(in_place=True) for big in self.networks()])

    @property
    def mode(self) -> tuple[bool, bool]:
        return self.skeleton._gates_open, self.linked

    def _each(self, act: Callable[..., Any], optimizers: Sequence[Optimizer]) -> list[Any]:
        """Does something that changes shapes to each big student, with its part of each optimizer's state."""
        networks = self.networks()
        parts = [[_part(o, self.skeleton, big, r) for o in optimizers] for r, big in enumerate(networks)]
        results = [act(big, *its) for big, its in zip(networks, parts, strict=True)]
        before = dict(self.skeleton.named_parameters())
        self.skeleton = copy.deepcopy(networks[0])
        names = {id(parameter): name for name, parameter in self.skeleton.named_parameters()}
        for alias, parameter in list(self.skeleton.named_parameters(remove_duplicate=False)):
            _assign(self.skeleton, alias, before[names[id(parameter)]])  # optimizers hold these
        self._fill(networks)
        for optimizer, each in zip(optimizers, zip(*parts, strict=True), strict=True):
            for name, parameter in before.items():
                its = [part.state[dict(big.named_parameters())[name]] for part, big in zip(each, networks, strict=True)]
                for key in its[0]:
                    if isinstance(its[0][key], Tensor):
                        optimizer.state[parameter][key] = torch.stack([one[key] for one in its])
        return results


def _part(optimizer: Optimizer, skeleton: nn.Module, network: nn.Module, index: int) -> SGD:
    """An optimizer of one network with its part of the state."""
    names = {id(parameter): name for name, parameter in skeleton.named_parameters()}
    own = dict(network.named_parameters())
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    part = SGD([own[names[id(parameter)]] for parameter in held])
    for parameter in held:
        for key, value in optimizer.state[parameter].items() if parameter in optimizer.state else ():
            part.state[own[names[id(parameter)]]][key] = value[index].clone() if isinstance(value, Tensor) else value
    return part


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, those that a state dict leaves out too."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


@torch.no_grad()
def load_tensors(network: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Fills all that :func:`tensors_of` gives."""
    for name, tensor in tensors_of(network).items():
        tensor.copy_(values[name])


def _assign(network: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts a parameter or buffer in the place of another, of whatever shape."""
    path, _, leaf = name.rpartition(".")
    module = network.get_submodule(path)
    kind: Any = module._parameters if isinstance(tensor, nn.Parameter) else module._buffers
    kind[leaf] = tensor


def _stacked(each: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    for index, tensors in enumerate(each):
        for name in [*each[0], *tensors]:
            shapes = [tuple(t[name].shape) if name in t else "missing" for t in (each[0], tensors)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"a Stack needs networks of one architecture; {name} is {shapes[0]} in number 0 and "
                    f"{shapes[1]} in number {index}"
                )
    return {name: torch.stack([tensors[name].detach() for tensors in each]).contiguous() for name in each[0]}


def _is_common(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex()) and bool((value == value[:1]).all())

"""Networks of one architecture as one batched network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fastmerge.training.replay import replayed


class Stack:
    """R networks of one architecture, their tensors stacked along a new first dimension.

    The networks given are copied, not changed; :meth:`network` takes one out again.

    Args:
        networks: of one class and one set of shapes, on one device.

    Attributes:
        parameters: name → (R, ...), contiguous, without gradients.
        buffers: name → (R, ...).
        shared: integer buffers that all networks hold alike (tables of indices, counters), not stacked.
        skeleton: a copy of the first network, for its code.

    Raises:
        ValueError: there is no network, or their tensors have different names or shapes.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        if not networks:
            raise ValueError("a Stack needs at least one network; got none")
        self.skeleton = copy.deepcopy(networks[0])
        self.parameters = _stacked([dict(network.named_parameters()) for network in networks])
        buffers = _stacked([dict(network.named_buffers()) for network in networks])
        self.shared = {name: value[0] for name, value in buffers.items() if _is_common(value)}
        self.buffers = {name: value for name, value in buffers.items() if name not in self.shared}
        self._size = len(networks)
        self._replays: dict[torch.Size, Callable[..., tuple[Tensor]]] = {}

    def __len__(self) -> int:
        return self._size

    @property
    def parts(self) -> list[Stack]:
        """Itself: all networks are of one size."""
        return [self]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(iter(self.parameters.values())).device

    def network(self, index: int) -> nn.Module:
        """A copy of one of the networks, with parameters that can be trained."""
        network = copy.deepcopy(self.skeleton)
        values = {name: value[index] for name, value in (self.parameters | self.buffers).items()} | self.shared
        with torch.no_grad():
            for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
                tensor.copy_(values[name])
        return network

    def networks(self) -> list[nn.Module]:
        """Copies of all networks."""
        return [self.network(index) for index in range(len(self))]

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        """Runs all networks, in eval mode, on the same inputs.

        Args:
            inputs: (N, ...).

        Returns:
            Outputs of networks that give one tensor, with a first dimension of R: (R, N, ...).
        """
        tensors = [tensor for kind in self.kinds for tensor in kind.values()]
        if inputs.shape not in self._replays:
            self.skeleton.eval()
            self._replays[inputs.shape] = replayed(self._run, *tensors, inputs, replicates=len(self))
        (outputs,) = self._replays[inputs.shape](*tensors, inputs)
        return outputs

    @property
    def kinds(self) -> tuple[dict[str, Tensor], ...]:
        """Parameters, buffers and shared buffers; the first two stacked."""
        return self.parameters, self.buffers, self.shared

    def unflatten(self, tensors: Iterable[Tensor]) -> list[dict[str, Tensor]]:
        """Names tensors that come in the order of :attr:`kinds`."""
        remaining = iter(tensors)
        return [{name: next(remaining) for name in kind} for kind in self.kinds]

    def _run(self, *tensors: Tensor) -> list[Tensor]:
        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], shared: dict[str, Tensor]) -> Tensor:
            return functional_call(self.skeleton, parameters | buffers | shared, (tensors[-1],))

        return [vmap(one, in_dims=(0, 0, None))(*self.unflatten(tensors))]


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

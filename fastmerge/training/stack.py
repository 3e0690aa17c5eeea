"""Networks of one architecture as one batched network."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap


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

    def __len__(self) -> int:
        return self._size

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
    def __call__(self, inputs: Tensor) -> Any:
        """Runs all networks, in eval mode, on the same inputs.

        Args:
            inputs: (N, ...).

        Returns:
            Outputs with a first dimension of R: (R, N, ...).
        """

        def run(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Any:
            return functional_call(network, parameters | buffers | self.shared, (inputs,))

        network = self.skeleton.eval()
        return vmap(run)(self.parameters, self.buffers)


def _stacked(each: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    for index, tensors in enumerate(each):
        for name in each[0].keys() | tensors.keys():
            shapes = [tuple(t[name].shape) if name in t else "missing" for t in (each[0], tensors)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"a Stack needs networks of one architecture; {name} is {shapes[0]} in number 0 and "
                    f"{shapes[1]} in number {index}"
                )
    return {name: torch.stack([tensors[name].detach() for tensors in each]).contiguous() for name in each[0]}


def _is_common(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex()) and bool((value == value[:1]).all())

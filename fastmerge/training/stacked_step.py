"""One training step of R stacked networks: gradients of each network's own loss, and SGD on all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.optim.sgd import sgd

from fastmerge.gate_budget import GateBudget, penalty
from fastmerge.merging.graphed_step import CudaGraphs
from fastmerge.schedules import QuadraticLambda
from fastmerge.training.replay import Graphed, replayed
from fastmerge.training.stack import Stack
from fastmerge.training.stage import Stage


class StackedStep:
    """One training step of all networks, traced once per size of batch; on a CUDA device replayed as a graph.

    Args:
        stack: The networks.
        stage: How they are trained.
        gates: Names of the gates' parameters.
        lam: The weight of the gates, or None.
        graphs: How to capture; None: as the device says. Tests give their own.
    """

    def __init__(
        self,
        stack: Stack,
        stage: Stage,
        gates: Collection[str],
        lam: QuadraticLambda | GateBudget | None,
        graphs: Any = None,
    ) -> None:
        self.stack, self.stage, self.lam = stack, stage, lam
        self.names = [*stack.parameters]
        self.tensors = [tensor for kind in stack.kinds for tensor in kind.values()]
        of_weights = [index for index, name in enumerate(self.names) if name not in gates]
        of_gates = [index for index, name in enumerate(self.names) if name in gates]
        parameters = [*stack.parameters.values()]
        self.weights = _StackedSGD(parameters, of_weights, stage.momentum, stage.weight_decay)
        self.gates = _StackedSGD(parameters, of_gates, stage.momentum, 0.0)
        if isinstance(lam, GateBudget):
            big: Any = stack.skeleton
            lam.begin(big, open_means(stack))
        self.replays: dict[int, Callable[..., tuple[Tensor, ...]]] = {}
        if graphs is None and stack.device.type == "cuda":
            graphs = CudaGraphs(stack.device)
        self._graphed = None if graphs is None else Graphed(self._update, graphs)
        self._momentum = self.weights.buffers, self.gates.buffers

    def start_epoch(self, lr: float) -> None:
        """Sets the learning rates, and looks whether a checkpoint has replaced what a graph would find in its old place."""
        self.rates: tuple[Any, ...] = lr, self.stage.gate_lr
        if self._graphed is None:
            return
        self.rates = tuple(torch.full((), rate, device=self.stack.device) for rate in self.rates)
        if self._momentum[0] is not self.weights.buffers or self._momentum[1] is not self.gates.buffers:
            self._momentum = self.weights.buffers, self.gates.buffers
            self._graphed.forget()

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Updates all networks; returns their losses, and gate losses where there are gates, each (R,)."""
        run = self._update if self._graphed is None else self._graphed
        losses = run(inputs, targets, *self.rates, *self._weights())
        if isinstance(self.lam, GateBudget):
            self.lam.step(losses[-1])
            return losses[:-1]
        return losses

    def _update(
        self, inputs: Tensor, targets: Tensor, lr: Tensor | float, gate_lr: Tensor | float, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        """All that happens on the device; returns losses, gate losses and, for a budget, P."""
        size = inputs.shape[1]
        arguments = (*self.tensors, inputs, targets, *weights)
        if size not in self.replays:
            self.replays[size] = replayed(self._gradients(), *arguments, replicates=len(self.stack))
        results = self.replays[size](*arguments)
        count = len(self.names)
        self.weights.step(results[:count], lr)
        self.gates.step(results[:count], gate_lr)
        return results[count:]

    def _weights(self) -> tuple[Tensor, ...]:
        """What weighs the gates of each network: λ, (R,), or a budget's multipliers, targets and curvature, (R, G)."""
        if self.lam is None:
            return ()
        if isinstance(self.lam, GateBudget):
            return self.lam.terms()
        return (torch.full((len(self.stack),), float(self.lam), device=self.stack.device),)

    def _gradients(self) -> Callable[..., list[Tensor]]:
        """A function of all tensors, inputs, targets and weights of the gates that returns gradients, losses and, for a
        budget, P."""
        skeleton, criterion, lam = self.stack.skeleton, self.stage.criterion, self.lam
        network = _WithoutGates(skeleton) if lam is None else _WithGates(skeleton)

        def loss_of_one(parameters: Any, buffers: Any, shared: Any, x: Tensor, target: Tensor, *weights: Tensor) -> Any:
            tensors = {f"network.{name}": value for name, value in (parameters | buffers | shared).items()}
            output, *means = functional_call(network, tensors, (x,))
            loss = criterion(output, target)
            if lam is None:
                return loss, [loss.detach()]
            open_now, slopes = means
            gate_loss = skeleton.gate_loss(open_now)  # type: ignore[operator]
            if isinstance(lam, GateBudget):
                return loss + penalty(open_now, slopes, *weights), [
                    loss.detach(),
                    gate_loss.detach(),
                    open_now.detach(),
                ]
            return loss + weights[0] * gate_loss, [loss.detach(), gate_loss.detach()]

        count = len(self.tensors)
        per_network = (0,) * (2 + len(self._weights()))
        of_all: Any = vmap(grad(loss_of_one, has_aux=True), in_dims=(0, 0, None, *per_network), randomness="different")

        def gradients(*tensors: Tensor) -> list[Tensor]:
            found, losses = of_all(*self.stack.unflatten(tensors[:count]), *tensors[count:])
            return [*(found[name].contiguous() for name in self.names), *losses]

        return gradients


class _StackedSGD:
    """torch.optim.SGD's own arithmetic on some of the stacked parameters, without the optimizer object around it."""

    def __init__(self, parameters: list[Tensor], indices: list[int], momentum: float, weight_decay: float) -> None:
        self.indices = indices
        self.parameters = [parameters[index] for index in indices]
        self.buffers: list[Tensor | None] = [None] * len(indices)
        self.momentum, self.weight_decay = momentum, weight_decay

    def step(self, gradients: Sequence[Tensor], lr: Tensor | float) -> None:
        if self.indices:
            sgd(
                self.parameters,
                [gradients[index] for index in self.indices],
                self.buffers,
                fused=True,
                weight_decay=self.weight_decay,
                momentum=self.momentum,
                lr=cast(float, lr),  # fused, it may be a tensor
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )


class _WithoutGates(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        return (self.network(x),)


class _WithGates(_WithoutGates):
    """A big student whose forward gives P of its groups as well, so that ``functional_call`` reaches both."""

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        return self.network(x), *self.network.open_state()  # type: ignore[operator]


def open_means(stack: Stack) -> Tensor:
    """P of every group of each big student, (R, G)."""
    big: Any = stack.skeleton
    locs = [stack.parameters[f"gates.{group.name}.loc"] for group in big.groups]
    means: Tensor = big.group_means(big.open_candidates(torch.cat(locs, 1)))
    return means

"""Training of R stacked networks at once: one step updates all, as if each were trained alone.

Every network has its own parameters, order of the data and random numbers; the loss of one does not reach another. SGD
works element by element, so SGD on stacked parameters is R optimizers in one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.optim.sgd import sgd

from fastmerge.data.dataset import Dataset
from fastmerge.schedules import QuadraticLambda
from fastmerge.training.order import Augment, StackedBatches
from fastmerge.training.replay import replayed
from fastmerge.training.stack import Stack

Criterion = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Stage:
    """How one stage trains.

    Attributes:
        name: what progress and warnings call it.
        epochs: passes over the training data, at least 0.
        lr: learning rate of the weights.
        milestones: epochs after which the learning rate is multiplied by ``lr_decay``, as in torch's MultiStepLR.
        criterion: ``criterion(output, target)`` of one network and batch, a mean over the batch.
        gate_lr: learning rate of the gates, which have the same momentum and no weight decay.
    """

    name: str
    epochs: int
    lr: float
    batch_size: int
    criterion: Criterion
    milestones: tuple[int, ...] = ()
    lr_decay: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    gate_lr: float = 0.0
    augment: Augment | None = None

    def lr_at(self, epoch: int) -> float:
        """The learning rate of the weights in an epoch, counted from 0."""
        return self.lr * self.lr_decay ** sum(epoch >= milestone for milestone in self.milestones)


@dataclass(frozen=True)
class EpochLosses:
    """Means over one epoch, in training mode, as it went.

    Attributes:
        epoch: counts from 1.
        loss: the criterion, (R,), on the CPU.
        gate_loss: the gate loss without λ, (R,), or None where there are no gates.
        lam: λ in this epoch, or None.
    """

    epoch: int
    loss: Tensor
    gate_loss: Tensor | None
    lam: float | None


def train(
    stack: Stack,
    data: Dataset,
    stage: Stage,
    orders: Sequence[torch.Generator],
    noise: torch.Generator,
    lam: QuadraticLambda | None = None,
    gates: Collection[str] = (),
) -> Iterator[EpochLosses]:
    """Trains the networks of a stack, in place, and yields after each epoch.

    The gates' and dropout's random numbers come from the device's default generator.

    Args:
        stack: the networks; big students where λ is given.
        data: on the stack's device.
        stage: how.
        orders: one generator per network, for the order of its samples.
        noise: on the stack's device, for augmentation.
        lam: weight of the gate loss, stepped after every epoch.
        gates: names of the gates' parameters.
    """
    batches = StackedBatches(data, stage.batch_size, orders, stage.augment, noise)
    step = _Step(stack, stage, gates, gated=lam is not None)
    sums = torch.zeros(2 if lam is not None else 1, len(stack), device=stack.device)
    for epoch in range(stage.epochs):
        step.start_epoch(stage.lr_at(epoch), 0.0 if lam is None else float(lam))
        sums.zero_()
        stack.skeleton.train()
        with torch.no_grad():
            for inputs, targets in batches.epoch():
                for total, losses in zip(sums, step(inputs, targets), strict=True):
                    total.add_(losses, alpha=inputs.shape[1])
        means = (sums / batches.samples).cpu()
        yield EpochLosses(epoch + 1, means[0], None if lam is None else means[1], None if lam is None else float(lam))
        if lam is not None:
            lam.step()


class _Step:
    """One training step of all networks, traced once per size of batch."""

    def __init__(self, stack: Stack, stage: Stage, gates: Collection[str], gated: bool) -> None:
        self.stack, self.stage, self.gated = stack, stage, gated
        self.names = [*stack.parameters]
        self.tensors = [tensor for kind in stack.kinds for tensor in kind.values()]
        of_weights = [index for index, name in enumerate(self.names) if name not in gates]
        of_gates = [index for index, name in enumerate(self.names) if name in gates]
        parameters = [*stack.parameters.values()]
        self.weights = _StackedSGD(parameters, of_weights, stage.momentum, stage.weight_decay)
        self.gates = _StackedSGD(parameters, of_gates, stage.momentum, 0.0)
        self.lam = torch.zeros((), device=stack.device)
        self.replays: dict[int, Callable[..., tuple[Tensor, ...]]] = {}

    def start_epoch(self, lr: float, lam: float) -> None:
        self.weights.lr, self.gates.lr = lr, self.stage.gate_lr
        self.lam.fill_(lam)

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Updates all networks; returns their losses, and gate losses where there are gates, each (R,)."""
        size = inputs.shape[1]
        if size not in self.replays:
            examples = (*self.tensors, inputs, targets, self.lam)
            self.replays[size] = replayed(self._gradients(), *examples, replicates=len(self.stack))
        results = self.replays[size](*self.tensors, inputs, targets, self.lam)
        count = len(self.names)
        self.weights.step(results[:count])
        self.gates.step(results[:count])
        return results[count:]

    def _gradients(self) -> Callable[..., list[Tensor]]:
        """A function of all tensors, inputs, targets and λ that returns gradients and losses."""
        network = _WithGateLoss(self.stack.skeleton) if self.gated else _WithoutGateLoss(self.stack.skeleton)
        criterion = self.stage.criterion

        def loss_of_one(parameters: Any, buffers: Any, shared: Any, x: Tensor, target: Tensor, lam: Tensor) -> Any:
            tensors = {f"network.{name}": value for name, value in (parameters | buffers | shared).items()}
            output, *gate_loss = functional_call(network, tensors, (x,))
            loss = criterion(output, target)
            total = sum((lam * extra for extra in gate_loss), loss)
            return total, [value.detach() for value in (loss, *gate_loss)]

        of_all: Any = vmap(grad(loss_of_one, has_aux=True), in_dims=(0, 0, None, 0, 0, None), randomness="different")

        def gradients(*tensors: Tensor) -> list[Tensor]:
            found, losses = of_all(*self.stack.unflatten(tensors[:-3]), *tensors[-3:])
            return [*(found[name].contiguous() for name in self.names), *losses]

        return gradients


class _StackedSGD:
    """torch.optim.SGD's own arithmetic on some of the stacked parameters, without the optimizer object around it."""

    def __init__(self, parameters: list[Tensor], indices: list[int], momentum: float, weight_decay: float) -> None:
        self.indices = indices
        self.parameters = [parameters[index] for index in indices]
        self.buffers: list[Tensor | None] = [None] * len(indices)
        self.lr, self.momentum, self.weight_decay = 0.0, momentum, weight_decay

    def step(self, gradients: Sequence[Tensor]) -> None:
        if self.indices:
            sgd(
                self.parameters,
                [gradients[index] for index in self.indices],
                self.buffers,
                fused=True,
                weight_decay=self.weight_decay,
                momentum=self.momentum,
                lr=self.lr,
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )


class _WithoutGateLoss(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        return (self.network(x),)


class _WithGateLoss(_WithoutGateLoss):
    """A big student whose forward gives its gate loss as well, so that ``functional_call`` reaches both."""

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        return self.network(x), self.network.gate_loss()  # type: ignore[operator]

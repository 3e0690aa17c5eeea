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
from fastmerge.gate_budget import GateBudget, gate_loss_of, open_state, penalty
from fastmerge.kernels.gate import open_probability
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
        lam: λ in this epoch, or None where there are no gates or a budget steers them.
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
    lam: QuadraticLambda | GateBudget | None = None,
    gates: Collection[str] = (),
) -> Iterator[EpochLosses]:
    """Trains the networks of a stack, in place, and yields after each epoch; the arguments are StackTraining's."""
    return StackTraining(stack, data, stage, orders, noise, lam, gates).epochs()


class StackTraining:
    """A stage of training of the networks of a stack, in place, that can be left between epochs and gone on with.

    The gates' and dropout's random numbers come from the device's default generator.

    Args:
        stack: the networks; big students where λ is given.
        data: on the stack's device.
        stage: how.
        orders: one generator per network, for the order of its samples.
        noise: on the stack's device, for augmentation.
        lam: weight of the gate loss, stepped after every epoch, or a budget, stepped after every step, with multipliers
            of its own for each network.
        gates: names of the gates' parameters.

    Attributes:
        done: epochs done.
    """

    def __init__(
        self,
        stack: Stack,
        data: Dataset,
        stage: Stage,
        orders: Sequence[torch.Generator],
        noise: torch.Generator,
        lam: QuadraticLambda | GateBudget | None = None,
        gates: Collection[str] = (),
    ) -> None:
        self.stack, self.stage, self.orders, self.noise, self.lam = stack, stage, orders, noise, lam
        self.done = 0
        self._batches = StackedBatches(data, stage.batch_size, orders, stage.augment, noise)
        self._step = _Step(stack, stage, gates, lam)

    def epochs(self) -> Iterator[EpochLosses]:
        """Trains the epochs that are left, and yields after each."""
        sums = torch.zeros(1 if self.lam is None else 2, len(self.stack), device=self.stack.device)
        while self.done < self.stage.epochs:
            weight = float(self.lam) if isinstance(self.lam, QuadraticLambda) else None
            self._step.start_epoch(self.stage.lr_at(self.done))
            sums.zero_()
            self.stack.skeleton.train()
            with torch.no_grad():
                for inputs, targets in self._batches.epoch():
                    for total, losses in zip(sums, self._step(inputs, targets), strict=True):
                        total.add_(losses, alpha=inputs.shape[1])
            means = (sums / self._batches.samples).cpu()
            if isinstance(self.lam, QuadraticLambda):
                self.lam.step()
            self.done += 1
            yield EpochLosses(self.done, means[0], None if self.lam is None else means[1], weight)

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on; the default generator's state is not in it."""
        return {
            "done": self.done,
            "stack": list(self.stack.kinds),
            "momentum": [self._step.weights.buffers, self._step.gates.buffers],
            "lam": None if self.lam is None else self.lam.state_dict(),
            "orders": [order.get_state() for order in self.orders],
            "noise": self.noise.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a :meth:`state_dict`, with a stack of the same networks."""
        self.done = state["done"]
        for kind, saved in zip(self.stack.kinds, state["stack"], strict=True):
            for name, tensor in kind.items():
                tensor.copy_(saved[name])
        for optimizer, buffers in zip((self._step.weights, self._step.gates), state["momentum"], strict=True):
            optimizer.buffers = [None if value is None else value.to(self.stack.device) for value in buffers]
        if self.lam is not None:
            self.lam.load_state_dict(state["lam"])
        if isinstance(self.lam, GateBudget):
            skeleton: Any = self.stack.skeleton
            self.lam.begin(skeleton, open_means(self.stack))  # brings what was loaded to the device
        for order, saved in zip(self.orders, state["orders"], strict=True):
            order.set_state(saved)
        self.noise.set_state(state["noise"])


class _Step:
    """One training step of all networks, traced once per size of batch."""

    def __init__(
        self, stack: Stack, stage: Stage, gates: Collection[str], lam: QuadraticLambda | GateBudget | None
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

    def start_epoch(self, lr: float) -> None:
        self.weights.lr, self.gates.lr = lr, self.stage.gate_lr

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Updates all networks; returns their losses, and gate losses where there are gates, each (R,)."""
        size = inputs.shape[1]
        arguments = (*self.tensors, inputs, targets, *self._weights())
        if size not in self.replays:
            self.replays[size] = replayed(self._gradients(), *arguments, replicates=len(self.stack))
        results = self.replays[size](*arguments)
        count = len(self.names)
        self.weights.step(results[:count])
        self.gates.step(results[:count])
        if isinstance(self.lam, GateBudget):
            *losses, open_now = results[count:]
            self.lam.step(open_now)
            return tuple(losses)
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
            gate_loss = gate_loss_of(open_now, skeleton.num_teachers)  # type: ignore[arg-type]
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


class _WithoutGates(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        return (self.network(x),)


class _WithGates(_WithoutGates):
    """A big student whose forward gives P of its groups as well, so that ``functional_call`` reaches both."""

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        return self.network(x), *open_state(self.network)  # type: ignore[arg-type]


def open_means(stack: Stack) -> Tensor:
    """P of every group of each big student, (R, G)."""
    big: Any = stack.skeleton
    means = []
    for group in big.groups:
        gate, loc = big.gates[group.name], stack.parameters[f"gates.{group.name}.loc"]
        opened = open_probability(loc, gate.beta, gate.gamma, gate.zeta).sum(1)
        means.append(opened / (big.num_teachers * group.size))  # candidates that were dropped count as closed
    return torch.stack(means, 1)

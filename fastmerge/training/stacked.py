"""Training of R stacked networks at once: one step updates all, as if each were trained alone.

Every network has its own parameters, order of the data and random numbers; the loss of one does not reach another. SGD
works element by element, so SGD on stacked parameters is R optimizers in one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from fastmerge.data.dataset import Dataset
from fastmerge.gate_budget import GateBudget
from fastmerge.schedules import QuadraticLambda
from fastmerge.training.order import StackedBatches
from fastmerge.training.stack import Stack
from fastmerge.training.stacked_step import StackedStep, open_means
from fastmerge.training.stage import EpochLosses, Stage


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
        self._step = StackedStep(stack, stage, gates, lam)

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

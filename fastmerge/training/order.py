"""What each replicate reads when: its own shuffled order of one data set, gathered for the whole stack."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fastmerge.data.dataset import Dataset

Augment = Callable[[Tensor, torch.Generator], Tensor]

_CHUNK_BYTES = 32 * 2**20


class StackedBatches:
    """Batches for R networks, each with an order of its own.

    Args:
        data: on the device where the networks are.
        batch_size: samples per network and batch; the last batch of an epoch may be smaller.
        orders: R generators on the CPU, from which each network's order is drawn, epoch by epoch.
        augment: changes a batch of stored images (N, C, H, W) at random, if given.
        noise: the generator that ``augment`` draws from.
    """

    def __init__(
        self,
        data: Dataset,
        batch_size: int,
        orders: Sequence[torch.Generator],
        augment: Augment | None = None,
        noise: torch.Generator | None = None,
    ) -> None:
        self.data, self.orders, self.augment, self.noise = data, orders, augment, noise
        self.samples = len(data.train_inputs)
        self.batch_size = min(batch_size, self.samples)
        per_step = 4 * len(orders) * self.batch_size * math.prod(data.train_inputs.shape[1:])
        self._steps_at_once = max(1, _CHUNK_BYTES // per_step)  # few large gathers, yet no copy of the whole data set

    def epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (inputs (R, N, ...), targets (R, N, ...)); every network sees every sample once."""
        order = torch.stack([torch.randperm(self.samples, generator=generator) for generator in self.orders])
        whole = self.samples // self.batch_size
        for start in range(0, whole, self._steps_at_once):
            steps = min(self._steps_at_once, whole - start)
            first = start * self.batch_size
            yield from self._gather(order[:, first : first + steps * self.batch_size], steps)
        if whole * self.batch_size < self.samples:
            yield from self._gather(order[:, whole * self.batch_size :], 1)

    def _gather(self, order: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        index = order.view(len(order), steps, -1).transpose(0, 1).to(self.data.train_inputs.device)  # (steps, R, N)
        inputs = self.data.train_inputs[index]
        if self.augment is not None:
            assert self.noise is not None
            inputs = self.augment(inputs.flatten(0, 2), self.noise).view(inputs.shape)
        return zip(self.data.normalise(inputs).unbind(), self.data.train_targets[index].unbind(), strict=True)

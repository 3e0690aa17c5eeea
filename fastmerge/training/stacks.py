"""Networks of one architecture whose sizes differ, as compacted big students' do: one beside another, epoch by epoch."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmerge.data.dataset import Dataset
from fastmerge.gate_budget import GateBudget
from fastmerge.schedules import QuadraticLambda
from fastmerge.training.stack import Stack
from fastmerge.training.stacked import StackTraining
from fastmerge.training.stage import EpochLosses, Stage

Weight = QuadraticLambda | GateBudget


class Stacks:
    """R networks, each a :class:`Stack` of one; to those who train and score it, the same as a stack.

    Attributes:
        parts: the stacks.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        self.parts = [Stack([network]) for network in networks]

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.parts[0].device

    def networks(self) -> list[nn.Module]:
        """Copies of all networks."""
        return [part.network(0) for part in self.parts]

    def __call__(self, inputs: Tensor) -> Tensor:
        """Runs all networks, in eval mode, on the same inputs (N, ...); returns (R, N, ...)."""
        return torch.cat([part(inputs) for part in self.parts])


class StacksTraining:
    """A stage of training of :class:`Stacks`; arguments and the rest as :class:`StackTraining`'s.

    The networks take turns by epochs and draw from the same generators, ``orders`` apart.
    """

    def __init__(
        self,
        stack: Stacks,
        data: Dataset,
        stage: Stage,
        orders: Sequence[torch.Generator],
        noise: torch.Generator,
        lam: Weight | None = None,
        gates: Collection[str] = (),
    ) -> None:
        self.stack, self.stage, self.lam = stack, stage, lam
        self.done = 0
        weights = [None] * len(stack) if lam is None else _split(lam, len(stack))
        self._parts = [
            StackTraining(part, data, stage, [order], noise, weight, gates)
            for part, order, weight in zip(stack.parts, orders, weights, strict=True)
        ]

    def epochs(self) -> Iterator[EpochLosses]:
        """Trains the epochs that are left, and yields after each."""
        for each in zip(*(part.epochs() for part in self._parts), strict=True):
            self.done += 1
            self._join()
            gate_losses = [losses.gate_loss for losses in each if losses.gate_loss is not None]
            yield EpochLosses(
                self.done,
                torch.cat([losses.loss for losses in each]),
                torch.cat(gate_losses) if gate_losses else None,
                each[0].lam,
            )

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on; the default generator's state is not in it."""
        return {"done": self.done, "parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a :meth:`state_dict`, with networks of the same sizes."""
        self.done = state["done"]
        for part, saved in zip(self._parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        self._join()

    def _join(self) -> None:
        """Brings the common weight of the gates up to where those of the networks are."""
        if self.lam is None:
            return
        states: list[dict[str, Any]] = [part.lam.state_dict() for part in self._parts if part.lam is not None]
        joined = states[0].copy()
        if isinstance(self.lam, GateBudget):
            joined |= {name: torch.cat([state[name] for state in states]) for name in ("multipliers", "starts")}
        self.lam.load_state_dict(joined)


def _split(lam: Weight, count: int) -> list[Weight]:
    """The weight of the gates for each of R networks by itself; of a budget, each one's own multipliers, (1, G)."""
    parts = [copy.deepcopy(lam) for _ in range(count)]
    for index, part in enumerate(parts):
        if isinstance(part, GateBudget) and part.multipliers is not None and part.starts is not None:
            part.multipliers, part.starts = part.multipliers[index, None], part.starts[index, None]
    return parts

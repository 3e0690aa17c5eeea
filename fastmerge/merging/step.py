"""One training step of a merge, of either stage: what an eager step, a captured one and a test all run."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from fastmerge.evaluation import Setting
from fastmerge.schedules import GateWeight

Outcome = tuple[Any, dict[str, Tensor]]
Result = tuple[Any, dict[str, Tensor], Tensor | None]


class Losses(NamedTuple):
    """What a batch came to.

    Attributes:
        output: of the network.
        each: "loss", and "gate_loss" where there is a weight of the gates.
        whole: what is minimised, a 0-d tensor.
        open_now: P[g > 0] per channel group, where the weight of the gates needs them at the end of the step.
    """

    output: Any
    each: dict[str, Tensor]
    whole: Tensor
    open_now: Tensor | None


class MergeStep:
    """Forward, losses, backward and optimizers' steps: ``criterion + λ · gate_loss``, or as the budget says, is minimised.

    Args:
        network: in training mode; a big student where there is a weight of the gates.
        optimizers: of its parameters.
        setting: criterion, autocast.
        scaler: of the losses; disabled where there is nothing to scale.
        lam: the weight of the gates, or None.
        clip_norm: largest norm of the gradients of the first optimizer's parameters, or None.
        model: what is called: the network, unless something wraps it.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizers: list[Optimizer],
        setting: Setting,
        scaler: torch.amp.GradScaler,
        lam: GateWeight | None,
        clip_norm: float | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self.clip_norm, self.model = clip_norm, network if model is None else model
        self.network, self.optimizers, self.setting, self.scaler, self.lam = network, optimizers, setting, scaler, lam

    def __call__(self, inputs: tuple[Tensor, ...], target: Any) -> Outcome:
        """Trains on a batch.

        Returns:
            The output, and the losses: "loss", and "gate_loss" where there is a weight of the gates.
        """
        self.zero_grad()
        output, each, open_now = self.run(inputs, target)
        self.finish(open_now)
        return output, each

    def zero_grad(self) -> None:
        """What comes before a step's first batch."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def run(self, inputs: tuple[Tensor, ...], target: Any, terms: tuple[Tensor, ...] | None = None) -> Result:
        """All that happens on the device.

        Args:
            inputs: of the network.
            target: of the criterion.
            terms: the weight of the gates as tensors, from :meth:`terms`; None: the weight itself.

        Returns:
            The output, the losses, and P[g > 0] per channel group, which :meth:`finish` takes.
        """
        output, each, _, open_now = self.backward(inputs, target, terms)
        self.update()
        # without their history, which would tie the next step's gradients to this one's stream
        return tree_map(_detached, output), tree_map(_detached, each), open_now

    def losses(self, inputs: tuple[Tensor, ...], target: Any, terms: tuple[Tensor, ...] | None = None) -> Losses:
        """Forward and losses of a batch; arguments as :meth:`run`'s."""
        output, loss = self.setting.apply(self.model, inputs, target)
        each, open_now = {"loss": loss}, None
        if self.lam is not None:
            weighted, each["gate_loss"], open_now = self.lam.weigh(self.network, terms)
            loss = loss + weighted
        return Losses(output, each, loss, open_now)

    def backward(
        self,
        inputs: tuple[Tensor, ...],
        target: Any,
        terms: tuple[Tensor, ...] | None = None,
        share: float | None = None,
    ) -> Losses:
        """:meth:`losses`, and adds their gradients to those there are; of one of several batches a share of them."""
        found = self.losses(inputs, target, terms)
        self.scaler.scale(found.whole if share is None else found.whole * share).backward()
        return found

    def update(self) -> None:
        """The optimizers' steps, with gradients clipped."""
        if self.clip_norm is not None:
            self.scaler.unscale_(self.optimizers[0])
            clip_grad_norm_([p for g in self.optimizers[0].param_groups for p in g["params"]], self.clip_norm)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()

    def finish(self, open_now: Tensor | None) -> None:
        """What follows on the host: the weight of the gates ends its step."""
        if self.lam is not None:
            self.lam.end_step(open_now)

    def terms(self) -> tuple[Tensor, ...]:
        """The weight of the gates in the present step, as tensors on the device; of a budget, after it has begun."""
        return () if self.lam is None else self.lam.terms(self.setting.device)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value

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


def losses(
    network: nn.Module,
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    target: Any,
    setting: Setting,
    lam: GateWeight | None,
    terms: tuple[Tensor, ...] | None = None,
) -> Losses:
    """Forward and losses of a batch: ``criterion + λ · gate_loss``, or as the budget says.

    Args:
        network: a big student where there is a weight of the gates.
        model: what is called: the network, or what wraps it.
        inputs: of the network.
        target: of the criterion.
        setting: criterion, autocast.
        lam: the weight of the gates, or None.
        terms: the weight of the gates as tensors, from :meth:`MergeStep.terms`; None: the weight itself.
    """
    output, loss = setting.apply(model, inputs, target)
    each, open_now = {"loss": loss}, None
    if lam is not None:
        weighted, each["gate_loss"], open_now = lam.weigh(network, terms)
        loss = loss + weighted
    return Losses(output, each, loss, open_now)


class MergeStep:
    """Forward, losses, backward and optimizers' steps.

    Args:
        network: in training mode; a big student where there is a weight of the gates.
        optimizers: of its parameters.
        setting: criterion, autocast.
        scaler: of the losses; disabled where there is nothing to scale.
        lam: the weight of the gates, or None.
        clip_norm: largest norm of the gradients of the first optimizer's parameters, or None.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizers: list[Optimizer],
        setting: Setting,
        scaler: torch.amp.GradScaler,
        lam: GateWeight | None,
        clip_norm: float | None = None,
    ) -> None:
        self.clip_norm = clip_norm
        self.network, self.optimizers, self.setting, self.scaler, self.lam = network, optimizers, setting, scaler, lam

    def __call__(self, inputs: tuple[Tensor, ...], target: Any) -> tuple[Any, dict[str, Tensor]]:
        """Trains on a batch.

        Returns:
            The output, and the losses: "loss", and "gate_loss" where there is a weight of the gates.
        """
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        output, each, open_now = self.run(inputs, target)
        self.finish(open_now)
        return output, each

    def run(self, inputs: tuple[Tensor, ...], target: Any, terms: tuple[Tensor, ...] | None = None) -> Result:
        """All that happens on the device.

        Args:
            inputs: of the network.
            target: of the criterion.
            terms: the weight of the gates as tensors, from :meth:`terms`; None: the weight itself.

        Returns:
            The output, the losses, and P[g > 0] per channel group, which :meth:`finish` takes.
        """
        output, each, whole, open_now = losses(
            self.network, self.network, inputs, target, self.setting, self.lam, terms
        )
        self.scaler.scale(whole).backward()
        clip_gradients(self.scaler, self.optimizers[0], self.clip_norm)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        # without their history, which would tie the next step's gradients to this one's stream
        return tree_map(_detached, output), tree_map(_detached, each), open_now

    def finish(self, open_now: Tensor | None) -> None:
        """What follows on the host: the weight of the gates ends its step."""
        if self.lam is not None:
            self.lam.end_step(open_now)

    def terms(self) -> tuple[Tensor, ...]:
        """The weight of the gates in the present step, as tensors on the device; of a budget, after its first step."""
        return () if self.lam is None else self.lam.terms(self.setting.device)


def clip_gradients(scaler: torch.amp.GradScaler, optimizer: Optimizer, norm: float | None) -> None:
    """Scales the gradients of an optimizer's parameters down to a norm, where theirs is above it."""
    if norm is not None:
        scaler.unscale_(optimizer)
        clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], norm)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value

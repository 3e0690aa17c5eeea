"""The training steps of a stage: eager, compiled, captured as a CUDA graph, of several batches, of several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from fastmerge.batch_statistics import SyncedBatchNorm
from fastmerge.big_student import BigStudent
from fastmerge.evaluation import Setting, Tally
from fastmerge.merging.compiling import Compiler
from fastmerge.merging.graphed_step import GraphedStep
from fastmerge.merging.options import Options
from fastmerge.merging.progress import Progress
from fastmerge.merging.replayed_step import ReplayedStep
from fastmerge.processes import Processes, without_averaging
from fastmerge.schedules import GateWeight
from fastmerge.stack import Stack

Step = Callable[[list[Any], Tally], None]
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


class Steps:
    """Makes the steps of each epoch as the options say.

    Args:
        setting: Device, criterion and the like.
        options: How steps are run.
        processes: That train together.
        bar: Where progress shows.

    Attributes:
        scaler: Of the losses. One for both stages: its scale is worth keeping. float16 alone has too little range for
            gradients.
        compiler: Of the network in training.
    """

    def __init__(self, setting: Setting, options: Options, processes: Processes, bar: Progress) -> None:
        self.setting, self.options, self.processes, self.bar = setting, options, processes, bar
        self.scaler = torch.amp.GradScaler(setting.device.type, enabled=setting.autocast is torch.float16)
        self.compiler = Compiler(options.compile, processes.is_first)
        self._graph: GraphedStep | None = None
        self._replay: ReplayedStep | None = None

    @contextmanager
    def of_epoch(self, network: nn.Module, optimizers: list[Optimizer], lam: GateWeight | None) -> Iterator[Step]:
        """Gives ``step(batches, tally)``, to be called within this context.

        Anew for each epoch, before which linking and compaction may have changed parameters' shapes.
        """
        if isinstance(network, Stack):
            yield partial(self._replayed, self._replay_of(network, optimizers, lam))
            return
        self.compiler.renew(network)
        graphed = self._graphed(network, optimizers, lam)
        if graphed is not None:
            yield partial(self._graphed_step, graphed)
            return
        step = partial(self._eager, self._step_of(network, optimizers, lam, self.processes.wrap(network)))
        if not self.syncs:
            yield step
            return
        with SyncedBatchNorm(self.processes.group), _plain_norms(network):
            yield step

    def recalibration(self) -> AbstractContextManager[Any]:
        """Within this context BatchNorms that are estimated anew take their statistics as in training."""
        if not self.syncs:
            return nullcontext()
        return SyncedBatchNorm(self.processes.group, without_gradients=True)

    @property
    def syncs(self) -> bool:
        """Whether BatchNorm takes its statistics over the batches of several processes."""
        return self.processes.size > 1 and self.options.sync_batch_norm

    def end_stage(self) -> None:
        """Lets go of what was made for a stage's network."""
        self._graph = self._replay = None  # and with it its memory
        self.compiler.stop()

    def _replayed(self, step: ReplayedStep, batches: list[Any], tally: Tally) -> None:
        ((inputs, target),) = batches
        self.bar.step(tally, fresh=tally.add(None, None, inputs[0].shape[1], **step(inputs, target)))

    def _replay_of(self, stack: Stack, optimizers: list[Optimizer], lam: GateWeight | None) -> ReplayedStep:
        """The step of a stack, traced anew where linking or compaction have changed the stack."""
        if self._replay is None or self._replay.form != stack.form:
            self._replay = ReplayedStep(stack, optimizers, self.setting, lam, clip_norm=self.options.clip_norm)
        self._replay.renew()
        return self._replay

    def _graphed_step(self, graphed: GraphedStep, batches: list[Any], tally: Tally) -> None:
        ((inputs, target),) = batches
        output, each = self.compiler.run(lambda: graphed(inputs, target))
        self.bar.step(tally, fresh=tally.add(output, target, len(inputs[0]), **each))

    def _eager(self, step: MergeStep, batches: list[Any], tally: Tally) -> None:
        """A step of several batches, or of several processes."""
        step.zero_grad()
        samples = sum(len(inputs[0]) for inputs, _ in batches)
        for number, (inputs, target) in enumerate(batches, start=1):
            share = None if len(batches) == 1 else len(inputs[0]) / samples if samples else 1.0
            with without_averaging(step.model, number < len(batches)):
                found = self.compiler.run(partial(step.backward, inputs, target, share=share))
            self.bar.step(tally, fresh=tally.add(found.output, target, len(inputs[0]), **found.each))
        step.update()
        step.finish(found.open_now)

    def _step_of(
        self, network: nn.Module, optimizers: list[Optimizer], lam: GateWeight | None, model: nn.Module | None = None
    ) -> MergeStep:
        return MergeStep(network, optimizers, self.setting, self.scaler, lam, self.options.clip_norm, model)

    def _graphed(self, network: nn.Module, optimizers: list[Optimizer], lam: GateWeight | None) -> GraphedStep | None:
        """The step of a merge on one CUDA device, from epoch to epoch the same; None for others."""
        wanted = False if self.options.compile and self.options.cuda_graph is None else self.options.cuda_graph
        single = self.processes.size == 1 and self.options.accumulate == 1
        if wanted is False or not single or self.setting.device.type != "cuda":
            return None
        if self._graph is None:
            self._graph = GraphedStep(self._step_of(network, optimizers, lam), wanted)
        self._graph.renew()
        return self._graph


@contextmanager
def _plain_norms(network: nn.Module) -> Iterator[None]:
    """Within this context a big student's BatchNorms are calls of their own, which can be synced."""
    if not isinstance(network, BigStudent):
        yield
        return
    before, network.fused = network.fused, False
    try:
        yield
    finally:
        network.fused = before


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value

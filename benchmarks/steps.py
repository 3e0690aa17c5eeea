"""One training step: forward, loss with gate loss, backward, SGD with momentum on weights and gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from benchmarks.cases import Case
from fastmerge import BigStudent, QuadraticLambda
from fastmerge.evaluation import Setting

LAM = 0.05


class Step:
    """Trains one or several networks on the same batch, one after another, by one step at each call.

    The call returns when all is queued; :meth:`synchronise` waits for the device.

    Args:
        case: the task.
        networks: what is trained; those with gates have a ``gate_loss``.
        compiled: whether the networks run under ``torch.compile``.
    """

    def __init__(self, case: Case, networks: Sequence[Any], compiled: bool = False) -> None:
        self.case, self.networks = case, networks
        self.forwards: list[Callable[[Tensor], Tensor]] = [torch.compile(n) if compiled else n for n in networks]
        self.x, self.target = case.make_batch()
        self.optimizers = [optimizer for network in networks for optimizer in make_optimizers(network)]
        self.scaler = torch.amp.GradScaler(case.device, enabled=case.precision == "fp16")
        self.loss = torch.tensor(float("nan"))

    def __call__(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        for number in range(len(self.networks)):
            self.backward(self.forward(number))
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()

    def forward(self, number: int = 0) -> Tensor:
        """The loss of one of the networks."""
        network = self.networks[number]
        with torch.autocast(self.case.device, self.case.dtype, enabled=self.case.precision != "fp32"):
            loss = self.case.criterion(self.forwards[number](self.x), self.target)
        return loss + LAM * network.gate_loss() if hasattr(network, "gate_loss") else loss

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()
        self.loss = loss.detach()

    def synchronise(self) -> None:
        """Waits for the device."""
        if self.case.device == "cuda":
            torch.cuda.synchronize()

    def tensors(self) -> list[Tensor]:
        """What stays in memory between steps: parameters, buffers, gradients left by the last step, optimizers' state."""
        found: list[Tensor] = []
        for network in self.networks:
            found += [*network.buffers(), *network.parameters()]
            found += [p.grad for p in network.parameters() if p.grad is not None]
        for optimizer in self.optimizers:
            found += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        return found


class GraphedTraining:
    """The same step, captured by ``fastmerge.merge``'s own means, a graph for each network.

    Args:
        case: the task, on a CUDA device.
        networks: what is trained.
    """

    def __init__(self, case: Case, networks: Sequence[nn.Module]) -> None:
        from fastmerge.merging.graphed_step import GraphedStep
        from fastmerge.merging.steps import MergeStep

        self.x, self.target = case.make_batch()
        autocast = None if case.precision == "fp32" else case.dtype
        setting = Setting(torch.device(case.device), case.criterion, autocast, channels_last=True)
        self.graphs = []
        for network in networks:
            scaler = torch.amp.GradScaler(case.device, enabled=case.precision == "fp16")
            lam = QuadraticLambda(LAM) if isinstance(network, BigStudent) else None
            step = MergeStep(network, make_optimizers(network), setting, scaler, lam)
            self.graphs.append(GraphedStep(step, wanted=True))
        self.loss = torch.tensor(float("nan"))

    def __call__(self) -> None:
        for graph in self.graphs:
            _, losses = graph((self.x,), self.target)
        self.loss = losses["loss"].detach()


def make_optimizers(network: Any) -> list[Optimizer]:
    """SGD for the weights and, where there are gates, one for them, as the paper has it."""
    if not hasattr(network, "gate_parameters"):
        return [SGD(network.parameters(), lr=1e-3, momentum=0.9)]
    return [
        SGD(network.weight_parameters(), lr=1e-3, momentum=0.9),
        SGD(network.gate_parameters(), lr=0.2, momentum=0.9),
    ]

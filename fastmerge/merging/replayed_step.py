"""The training step of a stack: traced once per size of batch, then replayed without Python; on a CUDA device as a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.optim import SGD, Optimizer
from torch.optim.sgd import sgd

from fastmerge.evaluation import Setting
from fastmerge.merging.distillation import TaughtSetting
from fastmerge.merging.graphed_step import CudaGraphs, Graphed, prepare_momentum
from fastmerge.replay import replayed
from fastmerge.schedules import GateWeight
from fastmerge.stack import Stack


class ReplayedStep:
    """One training step of all networks of a stack: gradients of each network's own loss, and the optimizers' steps.

    SGD runs by its own arithmetic without the object around it, which costs as much as a small network's gradients.

    Args:
        stack: big students where there is a weight of the gates.
        optimizers: of its parameters.
        setting: criterion.
        lam: the weight of the gates, or None.
        graphs: how to capture; None: as the device says. Tests give their own.
        clip_norm: largest norm of the gradients of each network's parameters in the first optimizer, or None.

    Attributes:
        form: of the stack, for which it is.
    """

    def __init__(
        self,
        stack: Stack,
        optimizers: list[Optimizer],
        setting: Setting,
        lam: GateWeight | None,
        graphs: Any = None,
        clip_norm: float | None = None,
    ) -> None:
        self.clip_norm = clip_norm
        if setting.autocast is not None:
            raise ValueError(f"stacked networks train without autocast; got {setting.autocast}")
        self.stack, self.optimizers, self.setting, self.lam = stack, optimizers, setting, lam
        self.form = stack.form
        if graphs is None and setting.device.type == "cuda":
            graphs = CudaGraphs(setting.device)
        self._graphed = None if graphs is None else Graphed(self._update, graphs)
        self._lie: list[Any] = []
        self._replays: dict[Any, Callable[..., tuple[Tensor, ...]]] = {}

    def renew(self) -> None:
        """To be called before each epoch: takes learning rates and what a checkpoint may have replaced."""
        kinds = self.stack.kinds
        self._tensors = [tensor for kind in kinds for tensor in kind.values()]
        self._names = list(kinds[0])
        index = {id(parameter): number for number, parameter in enumerate(kinds[0].values())}
        self._count = 0  # of the tensors that weigh the gates
        if self.lam is not None:
            self.lam.begin(self.stack, self.stack.open_means())  # type: ignore[operator]
            self._count = len(self.lam.terms(self.setting.device))
        self._groups: list[tuple[Optimizer, dict[str, Any], list[int], list[Tensor | None]]] = []
        for optimizer in self.optimizers:
            if type(optimizer) is SGD:
                prepare_momentum(optimizer)
            for group in optimizer.param_groups:
                buffers = [optimizer.state.get(p, {}).get("momentum_buffer") for p in group["params"]]
                self._groups.append((optimizer, group, [index[id(p)] for p in group["params"]], buffers))
        rates = [group["lr"] for _, group, _, _ in self._groups]
        if self._graphed is None:
            self._rates: list[Any] = rates
            return
        self._rates = [torch.full((), rate, dtype=torch.float32, device=self.setting.device) for rate in rates]
        lie = [t.data_ptr() for t in [*self._tensors, *(b for *_, each in self._groups for b in each if b is not None)]]
        if lie != self._lie:
            self._lie = lie
            self._graphed.forget()

    @torch.no_grad()
    def __call__(self, inputs: tuple[Tensor, ...], target: Any) -> dict[str, Tensor]:
        """Trains all networks on a batch each; returns their losses, (R,), "loss" and, of big students, "gate_loss"."""
        run = self._update if self._graphed is None else self._graphed
        terms = () if self.lam is None else self.lam.terms(self.setting.device)
        answers: list[Any] = []
        if isinstance(self.setting, TaughtSetting):
            target, *answers = self.setting.heard(inputs, target)
        results = run(*inputs, target, *answers, *self._rates, *terms)
        if self.lam is None:
            return {"loss": results[0]}
        self.lam.end_step(results[2] if len(results) > 2 else None)
        return {"loss": results[0], "gate_loss": results[1]}

    def _update(self, *arguments: Any) -> tuple[Tensor, ...]:
        """All that happens on the device; returns losses, gate losses and, where the weight of the gates asks for it, P."""
        first = len(arguments) - len(self._rates) - self._count
        batch, rates = arguments[:first], arguments[first : first + len(self._rates)]
        terms = arguments[first + len(self._rates) :]
        given = (*self._tensors, *batch, *terms)
        shapes = tuple(value.shape for value in batch)
        if shapes not in self._replays:
            function = self._gradients(len(batch), terms)
            self._replays[shapes] = replayed(function, *given, replicates=len(self.stack))
        results = self._replays[shapes](*given)
        count = len(self._names)
        if self.clip_norm is not None:
            weights = [index for o, _, indices, _ in self._groups if o is self.optimizers[0] for index in indices]
            _clip([results[index] for index in weights], self.clip_norm)
        for (optimizer, group, indices, buffers), rate in zip(self._groups, rates, strict=True):
            _step(optimizer, group, [results[index] for index in indices], buffers, rate)
        return results[count:]

    def _gradients(self, batch: int, terms: tuple[Tensor, ...]) -> Callable[..., list[Tensor]]:
        """A function of all tensors, the batch and the weight of the gates that returns gradients and losses."""
        network, setting = _Weighed(self.stack.skeleton, self.lam), self.setting
        taught = int(isinstance(setting, TaughtSetting))  # what the teachers say comes after the target
        self.stack.skeleton.train(self.stack.training)

        def loss_of_one(parameters: Any, buffers: Any, shared: Any, *given: Tensor) -> Any:
            tensors = {f"network.{name}": value for name, value in (parameters | buffers | shared).items()}
            *inputs, target = given[: batch - taught]
            output, *weighed = functional_call(network, tensors, tuple(inputs), {"terms": given[batch:]})
            loss = setting.criterion(output, target)
            if isinstance(setting, TaughtSetting):
                loss = setting.blended(output, loss, given[batch - 1], target)
            if not weighed:
                return loss, [loss.detach()]
            weighted, *rest = weighed
            return loss + weighted, [loss.detach(), *(value.detach() for value in rest if value is not None)]

        dims = (0, 0, None, *[0] * batch, *(0 if term.dim() else None for term in terms))
        of_all: Any = vmap(grad(loss_of_one, has_aux=True), dims, randomness="different")
        count = len(self._tensors)

        def gradients(*tensors: Tensor) -> list[Tensor]:
            found, losses = of_all(*self.stack.unflatten(tensors[:count]), *tensors[count:])
            return [*(found[name].contiguous() for name in self._names), *losses]

        return gradients


def _clip(gradients: list[Tensor], most: float) -> None:
    """Scales each network's gradients, (R, ...), down to a norm, as ``clip_grad_norm_`` does."""
    norms = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0).sqrt()
    factors = (most / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.dim() - 1)))


def _step(
    optimizer: Optimizer, group: dict[str, Any], gradients: list[Tensor], buffers: list[Tensor | None], rate: Any
) -> None:
    if type(optimizer) is SGD:
        sgd(
            group["params"],
            gradients,
            buffers,
            fused=True,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=cast(float, rate),  # fused, it may be a tensor
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        return
    for parameter, gradient in zip(group["params"], gradients, strict=True):
        parameter.grad = gradient
    if group is optimizer.param_groups[-1]:
        optimizer.step()


class _Weighed(nn.Module):
    """A network whose forward gives the weighted gate loss as well, so that ``functional_call`` reaches both."""

    def __init__(self, network: nn.Module, lam: GateWeight | None) -> None:
        super().__init__()
        self.network, self.lam = network, lam

    def forward(self, *inputs: Tensor, terms: tuple[Tensor, ...]) -> tuple[Any, ...]:
        output = self.network(*inputs)
        return (output,) if self.lam is None else (output, *self.lam.weigh(self.network, terms))

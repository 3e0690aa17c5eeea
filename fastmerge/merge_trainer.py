"""One epoch of a merge, of either stage: the batches, the score, the record."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fastmerge.big_student import BigStudent
from fastmerge.evaluation import Setting, Tally, evaluate
from fastmerge.gate_report import open_probabilities
from fastmerge.history import EpochRecord, History, Stage
from fastmerge.merge_progress import Progress
from fastmerge.schedules import QuadraticLambda


class Trainer:
    """Trains and scores the networks of one merge, and keeps its history.

    Args:
        train_loader: Batches to train on.
        val_loader: Batches to score on, or None.
        setting: Device, criterion and the like.
        history: Where records and scores go.
        bar: Where progress shows.
        callback: Called with each epoch's record.
    """

    def __init__(
        self,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any] | None,
        setting: Setting,
        history: History,
        bar: Progress,
        callback: Callable[[EpochRecord], object] | None,
    ) -> None:
        self.train_loader, self.val_loader, self.setting = train_loader, val_loader, setting
        self.history, self.bar, self.callback = history, bar, callback
        # One for both stages: its scale is worth keeping. float16 alone has too little range for gradients.
        self.scaler = torch.amp.GradScaler(setting.device.type, enabled=setting.autocast is torch.float16)

    def score(self, border: str, network: nn.Module) -> None:
        """Scores a network at a border between stages, where there is validation data."""
        if self.val_loader is not None:
            self.history.borders[border] = evaluate(network, self.val_loader, self.setting)

    def epoch(self, stage: Stage, network: nn.Module, optimizers: list[Optimizer], lam: QuadraticLambda | None) -> None:
        """Trains one epoch; with λ, the network is a big student, whose gate loss counts.

        Raises:
            FloatingPointError: A loss became NaN or Inf; the message says where and what is likely to blame.
        """
        epoch, lr = len(self.history.stage(stage)) + 1, optimizers[0].param_groups[0]["lr"]
        linked = network.linked if isinstance(network, BigStudent) else None
        tally = Tally()
        try:
            self._train(network, optimizers, lam, tally)
        except FloatingPointError as error:
            raise FloatingPointError(self._blame(stage, epoch, lr, *error.args)) from None
        record = EpochRecord(
            stage=stage,
            epoch=epoch,
            train=tally.score(),
            images_per_second=tally.rate(),
            val=None if self.val_loader is None else evaluate(network, self.val_loader, self.setting),
            lr=lr,
            lam=None if lam is None else float(lam),
            gate_loss=None if lam is None else tally.mean("gate_loss"),
            open_probability=open_probabilities(network) if isinstance(network, BigStudent) else None,
            linked=linked,
        )
        self.history.epochs.append(record)
        self.bar.end_epoch(record)
        if self.callback is not None:
            self.callback(record)

    def _train(
        self, network: nn.Module, optimizers: list[Optimizer], lam: QuadraticLambda | None, tally: Tally
    ) -> None:
        network.train()
        for inputs, target in self.setting.batches(self.train_loader):
            output, loss = self.setting.apply(network, inputs, target)
            losses = {"loss": loss}
            if lam is not None and isinstance(network, BigStudent):
                losses["gate_loss"] = network.gate_loss()
                loss = loss + lam * losses["gate_loss"]
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            for optimizer in optimizers:
                self.scaler.step(optimizer)
            self.scaler.update()
            fresh = tally.add(output, target, len(inputs[0]), **losses)
            self.bar.step(tally, fresh=fresh)
        tally.read()

    def _blame(self, stage: Stage, epoch: int, lr: float, step: int, loss: str, value: float) -> str:
        where = f"the {loss.replace('_', ' ')} became {value} in step {step} of epoch {epoch} of the {stage} stage"
        if loss == "gate_loss":
            return f"{where}; the gates were thrown too far: try a lower gate_lr or lam_step"
        if self.setting.autocast is torch.float16:
            return f"{where}; float16 may have overflowed: try autocast=torch.bfloat16, or a learning rate below {lr:g}"
        if step == epoch == 1:
            return f"{where}, its first; look for NaN or Inf in the data, or for training-mode layers that give them"
        return f"{where}; the learning rate {lr:g} is likely too high, or a batch holds NaN or Inf"

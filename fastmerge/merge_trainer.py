"""One epoch of a merge, of either stage: the batches, the score, the record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fastmerge.big_student import BigStudent
from fastmerge.evaluation import Setting, Tally, evaluate
from fastmerge.gate_budget import GateBudget
from fastmerge.gate_report import open_probabilities
from fastmerge.history import EpochRecord, History, Score, Stage
from fastmerge.merge_progress import Progress
from fastmerge.merge_state import MergeState
from fastmerge.random_states import random_states
from fastmerge.schedules import QuadraticLambda
from fastmerge.stop_requests import Interrupted, StopRequests

Weight = QuadraticLambda | GateBudget


class Trainer:
    """Trains and scores the networks of one merge, and keeps its history.

    Args:
        train_loader: Batches to train on.
        val_loader: Batches to score on, or None.
        setting: Device, criterion and the like.
        history: Where records and scores go.
        state: Writes checkpoints, and goes on from one.
        stop: Signals that ask to stop; met between steps, after a checkpoint.
        bar: Where progress shows.
        callback: Called with each epoch's record.
    """

    def __init__(
        self,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any] | None,
        setting: Setting,
        history: History,
        state: MergeState,
        stop: StopRequests,
        bar: Progress,
        callback: Callable[[EpochRecord], object] | None,
    ) -> None:
        self.train_loader, self.val_loader, self.setting = train_loader, val_loader, setting
        self.history, self.state, self.stop, self.bar, self.callback = history, state, stop, bar, callback
        # One for both stages: its scale is worth keeping. float16 alone has too little range for gradients.
        self.scaler = torch.amp.GradScaler(setting.device.type, enabled=setting.autocast is torch.float16)

    def score(self, border: str, network: nn.Module) -> None:
        """Scores a network at a border between stages, where there is validation data."""
        if self.val_loader is not None:
            self.history.borders[border] = self._evaluate(network)

    def epochs(self, stage: Stage, total: int, network: nn.Module, parts: dict[str, Any]) -> Iterator[int]:
        """The epochs of a stage, from 0 on, or those that a checkpoint has left; each is written down when its turn is over.

        Args:
            stage: Which.
            total: All its epochs.
            network: Trained in it.
            parts: What else changes with it: optimizers, λ, a scheduler.
        """
        done = self.state.begin(stage, network, {**parts, "scaler": self.scaler})
        self.bar.start(stage, total, self.train_loader, done)
        for epoch in range(done, total):
            yield epoch
            self.state.end_epoch(epoch + 1, last=epoch + 1 == total)

    def epoch(self, stage: Stage, network: nn.Module, optimizers: list[Optimizer], lam: Weight | None) -> None:
        """Trains one epoch; with a weight of the gates, the network is a big student.

        Raises:
            FloatingPointError: A loss became NaN or Inf; the message says where and what is likely to blame.
        """
        epoch, lr = len(self.history.stage(stage)) + 1, optimizers[0].param_groups[0]["lr"]
        linked = network.linked if isinstance(network, BigStudent) else None
        tally = Tally()
        random = None
        try:
            self._train(network, optimizers, lam, tally)
            random = random_states(self.setting.device)
            val = None if self.val_loader is None else self._evaluate(network)
        except FloatingPointError as error:
            blame = self._blame(stage, epoch, lr, *error.args)
            raise FloatingPointError(f"{blame}{self.state.whereabouts()}") from None
        except Interrupted:
            tally.read()
            self.state.save(random or random_states(self.setting.device), tally)
            raise
        record = EpochRecord(
            stage=stage,
            epoch=epoch,
            train=tally.score(),
            images_per_second=tally.rate(),
            val=val,
            lr=lr,
            lam=float(lam) if isinstance(lam, QuadraticLambda) else None,
            gate_loss=None if lam is None else tally.mean("gate_loss"),
            open_probability=open_probabilities(network) if isinstance(network, BigStudent) else None,
            linked=linked,
        )
        self.history.epochs.append(record)
        self.bar.end_epoch(record)
        if self.callback is not None:
            self.callback(record)

    def _train(self, network: nn.Module, optimizers: list[Optimizer], lam: Weight | None, tally: Tally) -> None:
        network.train()
        for inputs, target in self.setting.batches(self._left(tally)):
            output, loss = self.setting.apply(network, inputs, target)
            losses = {"loss": loss}
            if lam is not None and isinstance(network, BigStudent):
                losses["gate_loss"] = network.gate_loss()
                loss = loss + (lam.loss(network) if isinstance(lam, GateBudget) else lam * losses["gate_loss"])
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            for optimizer in optimizers:
                self.scaler.step(optimizer)
            self.scaler.update()
            if isinstance(lam, GateBudget):
                lam.step()
            fresh = tally.add(output, target, len(inputs[0]), **losses)
            self.bar.step(tally, fresh=fresh)
            self.stop.raise_if_any()
            if self.state.is_due():
                tally.read()  # NaN must not get into a checkpoint
                self.state.save(random_states(self.setting.device), tally)
        tally.read()

    def _left(self, tally: Tally) -> Iterator[Any]:
        """The epoch's batches that are left. A loader whose processes died of the same signal counts as interrupted."""
        batches = self.state.batches(tally)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError:
                self.stop.raise_if_any()
                raise
            yield batch

    def _evaluate(self, network: nn.Module) -> Score:
        assert self.val_loader is not None
        return evaluate(network, self.val_loader, self.setting, self.stop.raise_if_any)

    def _blame(self, stage: Stage, epoch: int, lr: float, step: int, loss: str, value: float) -> str:
        where = f"the {loss.replace('_', ' ')} became {value} in step {step} of epoch {epoch} of the {stage} stage"
        if loss == "gate_loss":
            return f"{where}; the gates were thrown too far: try a lower gate_lr or lam_step"
        if self.setting.autocast is torch.float16:
            return f"{where}; float16 may have overflowed: try autocast=torch.bfloat16, or a learning rate below {lr:g}"
        if step == epoch == 1:
            return f"{where}, its first; look for NaN or Inf in the data, or for training-mode layers that give them"
        return f"{where}; the learning rate {lr:g} is likely too high, or a batch holds NaN or Inf"

"""One epoch of a merge, of either stage: the batches, the score, the record."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from fastmerge.batch_statistics import ENOUGH_SAMPLES, has_statistics, recalibrate
from fastmerge.big_student import BigStudent
from fastmerge.checkpoints import Interrupted, StopRequests, aside, random_states, samplers_of
from fastmerge.evaluation import NotFiniteError, Setting, Tally, evaluate, length_of, samples_in
from fastmerge.history import EpochRecord, History, Score, Stage
from fastmerge.merging.distillation import TaughtSetting
from fastmerge.merging.options import Options
from fastmerge.merging.progress import Progress
from fastmerge.merging.state import MergeState
from fastmerge.merging.steps import Steps
from fastmerge.processes import Processes, ProcessLostError, seed_of_rank
from fastmerge.schedules import GateWeight
from fastmerge.stack import BigStack, Stack

_AGREE_EVERY = 10  # steps


class Trainer:
    """Trains and scores the networks of one merge, and keeps its history.

    Args:
        options: Of the merge.
        setting: Device, criterion and the like.
        train_loader: Batches to train on.
        val_loader: Batches to score on, or None.
        history: Where records and scores go.
        state: Writes checkpoints, and goes on from one.
        stop: Signals that ask to stop; met between steps, after a checkpoint.
        processes: That merge together.
        bar: Where progress shows.
        count: Operations per sample of a network's training, for the history; None leaves them out.
    """

    def __init__(
        self,
        options: Options,
        setting: Setting,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any] | None,
        history: History,
        state: MergeState,
        stop: StopRequests,
        processes: Processes,
        bar: Progress,
        count: Callable[[nn.Module], float] | None = None,
    ) -> None:
        self.options, self.train_loader, self.val_loader, self.setting = options, train_loader, val_loader, setting
        self.history, self.state, self.stop, self.bar, self.count = history, state, stop, bar, count
        self.processes, self._is_last, self._ended = processes, False, False
        self.after_step: Callable[[], object] | None = None
        self.watch: Callable[[Any], object] | None = None  # told of each batch's targets
        self._run = Steps(setting, options, processes, bar)

    def resume(self) -> None:
        """Goes on from the last checkpoint, where that is asked for and there is one."""
        if self.options.resume:
            self.state.load()

    def score(self, border: str, network: nn.Module, known: Score | None = None) -> None:
        """Scores a network at a border between stages, where there is validation data.

        Args:
            border: Its name in the history.
            network: The network.
            known: Its score, where it was scored since it last changed.

        Raises:
            FloatingPointError: The loss became NaN or Inf.
        """
        if self.val_loader is not None:
            self.history.borders[border] = self._evaluate(network, f"of {border}") if known is None else known

    def recalibrate(self, network: nn.Module) -> None:
        """Estimates BatchNorm's statistics anew on some training samples; of several processes that don't sync, the first's."""
        if not has_statistics(network):
            return
        reading = aside(self.train_loader, self.setting.device)
        with reading, self.setting.precision(), self._run.recalibration(), self.processes.watched():
            samples = self._samples(network, ENOUGH_SAMPLES)
            if isinstance(network, Stack):
                network.recalibrate(samples)
            else:
                recalibrate(network, samples)
        self.processes.share_buffers(network)

    def teach(self, teachers: Sequence[nn.Module]) -> None:
        """Lets networks learn from teachers from here on, as the options say.

        A loader whose samples never change asks them once, by ``loader.ask(answers)``, and brings what they say from then on.
        """
        options = self.options
        self.setting = TaughtSetting.of(self.setting, teachers, options.distill, options.temperature)
        ask = getattr(self.train_loader, "ask", None)
        if ask is not None and ask(self.setting.answers):
            self.setting = dataclasses.replace(self.setting, told=True)
        self._run.setting = self.setting

    def own_random_numbers(self) -> None:
        """Gives every process but the first a random state of its own, so that each draws other gates."""
        if not self.processes.is_first:
            torch.manual_seed(seed_of_rank(torch.get_rng_state(), self.processes.rank))

    def epochs(
        self, stage: Stage, total: int, network: nn.Module, parts: dict[str, Any], first: int = 0
    ) -> Iterator[int]:
        """The epochs of a stage, from 0 on, or those that a checkpoint has left; each is written down when its turn is over.

        Args:
            stage: Which.
            total: All its epochs, or those until another network goes on.
            network: Trained in it.
            parts: What else changes with it: optimizers, λ, a scheduler.
            first: The epochs that another network was trained before.
        """
        done = self.state.begin(stage, network, {**parts, "scaler": self._run.scaler}, total, first)
        self.bar.start(stage, total, self.train_loader, done)
        for epoch in range(done, total):
            self._is_last, self._ended = epoch + 1 == total, False
            yield epoch
            with self._whereabouts():
                self.state.end_epoch(epoch + 1, last=epoch + 1 == total, ended=self._ended)
            if self._ended:
                break
        self._run.end_stage()

    def epoch(
        self,
        stage: Stage,
        network: Any,
        optimizers: list[Optimizer],
        lam: GateWeight | None,
        scored_as: nn.Module | None = None,
    ) -> None:
        """Trains one epoch; with a weight of the gates, the network is a big student.

        Args:
            stage: Which.
            network: Is trained.
            optimizers: Of its parameters.
            lam: The weight of the gates, or None.
            scored_as: The network that is scored in its place, such as its moving average.

        Raises:
            FloatingPointError: A loss became NaN or Inf; the message says where and what is likely to blame.
            ProcessLostError: Another process of the merge ended.
        """
        epoch, lr = len(self.history.stage(stage)) + 1, float(optimizers[0].param_groups[0]["lr"])
        linked = None if lam is None else network.linked
        for loader in getattr(self.train_loader, "loaders", [self.train_loader]):
            for sampler in samplers_of(loader):
                if callable(set_epoch := getattr(sampler, "set_epoch", None)):  # some shuffle by its number alone
                    set_epoch(len(self.history.epochs))
        # several processes read their losses together, since all must know where one came upon NaN
        tally = Tally() if self.processes.size == 1 else Tally(every=sys.maxsize)
        random = None
        try:
            with self._whereabouts(), self.processes.watched():
                try:
                    self._train(network, optimizers, lam, tally)
                except NotFiniteError as error:
                    blame = _blame_training(error, stage, epoch, lr, self.setting.autocast)
                    raise FloatingPointError(f"{blame}{self.state.whereabouts()}") from None
                random = random_states(self.setting.device)
                score = tally.score(self.processes)
                scored = epoch % self.options.val_every == 0 or self._is_last
                ended = f"after epoch {epoch} of the {stage} stage"
                val = (
                    self._evaluate(scored_as or network, ended, lr) if scored and self.val_loader is not None else None
                )
                rate = self.processes.sum([tally.rate()])[0]
        except Interrupted:
            tally.read()
            self.state.save(random or random_states(self.setting.device), tally)
            raise
        record = EpochRecord(
            stage=stage,
            epoch=epoch,
            train=score,
            images_per_second=rate,
            val=val,
            lr=lr,
            lam=None if lam is None else lam.lam,
            gate_loss=None if lam is None else tally.mean("gate_loss"),
            open_probability=None if lam is None else open_probabilities(network),
            linked=linked,
            operations=self._operations(network, epoch),
        )
        self.history.epochs.append(record)
        self.bar.end_epoch(record)
        said = self.options.callback(record) if self.options.callback is not None and self.processes.is_first else None
        self._ended = bool(self.processes.most(isinstance(said, (bool, np.bool_)) and bool(said))[0])

    def _operations(self, network: nn.Module, epoch: int) -> float | None:
        """Per sample; of teachers the forward pass alone, a third of both, in the first epoch where they are asked once."""
        if self.count is None:
            return None
        taught = isinstance(self.setting, TaughtSetting) and (epoch == 1 or not self.setting.told)
        teachers = self.setting.teachers if isinstance(self.setting, TaughtSetting) and taught else ()
        return self.count(network) + sum(self.count(teacher) for teacher in teachers) / 3

    @property
    def steps(self) -> int | None:
        """Optimizer steps in an epoch, where the loader has a length."""
        length = length_of(self.train_loader)
        return None if length is None else -(-length // self.options.accumulate)

    def _train(self, network: nn.Module, optimizers: list[Optimizer], lam: GateWeight | None, tally: Tally) -> None:
        network.train()
        with self._run.of_epoch(network, optimizers, lam) as step:
            for batches in self._steps(tally):
                step(batches, tally)
                if self.after_step is not None:
                    self.after_step()
                if self.processes.size == 1 or tally.steps_begun % (_AGREE_EVERY * self.options.accumulate) == 0:
                    self._pause(tally)
        if self.processes.size > 1:
            self._pause(tally)
        tally.read()
        self.processes.share_buffers(network)

    def _steps(self, tally: Tally) -> Iterator[list[Any]]:
        """The epoch's batches that are left, as many at a time as make a step."""
        batches = self.setting.batches(self._stoppable(self.state.batches(tally)))
        for step in self._together(batches, self.options.accumulate):
            if self.watch is not None:
                for _, target in step:
                    self.watch(target)
            yield step

    def _together(self, batches: Iterator[Any], size: int) -> Iterator[list[Any]]:
        """So many batches at a time. Processes whose loaders have no length ask each other, so that all end together."""
        asks = self.processes.size > 1 and length_of(self.train_loader) is None
        while True:
            step = list(islice(batches, size))
            if asks:
                step = step[: -int(self.processes.most(-len(step))[0])]
            if not step:
                return
            yield step

    def _samples(self, network: nn.Module, count: int) -> Iterator[Any]:
        """Batches of so many training samples, or of all there are; processes that sync read so many together."""
        sharing = self.processes.size if self._run.syncs else 1
        batches = self.setting.batches(self._stoppable(iter(self.train_loader)))
        for inputs, target in chain.from_iterable(self._together(batches, 1)) if self._run.syncs else batches:
            yield inputs, target
            count -= sharing * samples_in(network, inputs)
            (left,) = self.processes.most(count) if self._run.syncs else (count,)
            if left <= 0:
                return

    def _pause(self, tally: Tally) -> None:
        """Between two steps: writes a checkpoint where it is time, and stops where a signal came.

        Processes do so together; to ask each other takes time, so that several do it only now and then.
        """
        if self.processes.size > 1:
            with self.processes.together(NotFiniteError):
                tally.read()
            self.bar.refresh(tally, self.processes.size)
        number, due = self.processes.most(self.stop.number or 0, self.state.is_due())
        if number:
            raise Interrupted(int(number))
        if due:
            tally.read()  # NaN must not get into a checkpoint
            self.state.save(random_states(self.setting.device), tally)

    def _stoppable(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches. A loader whose processes died of the same signal counts as interrupted."""
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError:
                self.stop.raise_if_any()
                raise
            yield batch

    def _evaluate(self, network: nn.Module, whose: str, lr: float | None = None) -> Score:
        """Scores a network; ``whose`` score it is, and the learning rate if it was trained before, are for the error."""
        assert self.val_loader is not None
        alone = self.processes.size == 1  # several processes stop together, between steps
        after_step = self.stop.raise_if_any if alone else None
        loader, setting, processes, metrics = self.val_loader, self.setting, self.processes, self.options.metrics
        try:
            return self._run.compiler.run(lambda: evaluate(network, loader, setting, after_step, processes, metrics))
        except NotFiniteError as error:
            blame = _blame_scoring(error, whose, lr, setting.autocast)
            raise FloatingPointError(f"{blame}{self.state.whereabouts()}") from None

    @contextmanager
    def _whereabouts(self) -> Iterator[None]:
        """A process that is lost ends this one with an error that names the last checkpoint."""
        try:
            yield
        except ProcessLostError as error:
            raise ProcessLostError(f"{error}{self.state.whereabouts()}") from error


@torch.no_grad()
def open_probabilities(big: BigStudent | BigStack) -> dict[str, Any]:
    """Mean P[g > 0] of each channel group, a list for a stack; candidates that were dropped count as closed."""
    return {name: mean.tolist() for name, mean in big.open_probabilities().items()}


def _blame_training(error: NotFiniteError, stage: Stage, epoch: int, lr: float, autocast: torch.dtype | None) -> str:
    """Where a loss in training became NaN or Inf, in which epoch counted from 1, and what is likely to blame: a sentence."""
    step, loss, value = error.args
    where = f"the {loss.replace('_', ' ')} became {value} in step {step} of epoch {epoch} of the {stage} stage"
    if loss == "gate_loss":
        return f"{where}; the gates moved too far: try a lower gate_lr or lam_step"
    if autocast is torch.float16:
        return f"{where}; float16 may have overflowed: try autocast=torch.bfloat16, or a learning rate below {lr:g}"
    if step == epoch == 1:
        return f"{where}, its first; look for NaN or Inf in the data, or for training-mode layers that give them"
    return f"{where}; the learning rate {lr:g} is likely too high, or a batch holds NaN or Inf"


def _blame_scoring(error: NotFiniteError, whose: str, lr: float | None, autocast: torch.dtype | None) -> str:
    """Likewise for a loss on validation data: ``whose``, and the learning rate where that network was trained before."""
    batch, _, value, has_finite_inputs = error.args
    where = f"the validation loss {whose} became {value} in batch {batch}"
    if has_finite_inputs is False:
        return f"{where}, whose inputs hold NaN or Inf"
    causes = []
    if lr is None:
        causes.append(f"the weights {whose} are too large")
    if autocast is torch.float16:
        causes.append("float16 may have overflowed: try autocast=torch.bfloat16")
    if lr is not None:
        causes.append(f"the learning rate {lr:g} may be too high")
    again = (
        "; look for NaN or Inf in its inputs, or " if has_finite_inputs is None else ", whose inputs are finite now: "
    )
    return f"{where}{again}{', or '.join(causes)}"

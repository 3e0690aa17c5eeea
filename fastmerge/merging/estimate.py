"""What a merge will take, from a few timed steps of each of its parts."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.optim import SGD

from fastmerge.big_student import BigStudent
from fastmerge.evaluation import Setting, evaluate, length_of
from fastmerge.merging.checks import check_loader, examples_of
from fastmerge.merging.label_sets import with_label_sets
from fastmerge.merging.layerwise import phases, stage_networks
from fastmerge.merging.options import Options
from fastmerge.merging.stages import blank_student

_TIMED = 3


@dataclass(frozen=True)
class Part:
    """A part of a merge that is of one speed.

    Attributes:
        name: What it is.
        epochs: How many.
        steps: Batches per epoch, or None where the loader has no length.
        seconds: Of a batch, the median of three after a first one, reading it included.
        gradients: Bytes that processes exchange in a step; 0 in validation.
    """

    name: str
    epochs: int
    steps: int | None
    seconds: float
    gradients: int = 0

    @property
    def total(self) -> float | None:
        """Seconds in all."""
        return None if self.steps is None else self.epochs * self.steps * self.seconds

    def messages(self, processes: int, bandwidth: float, accumulate: int = 1) -> float:
        """Seconds in all that so many processes take to add up their gradients, where nothing else goes on meanwhile.

        A ring sends ``2 (P - 1) / P`` times the gradients from each process, once per step.

        Args:
            processes: P.
            bandwidth: Bytes per second that one process sends.
            accumulate: Batches per step.
        """
        steps = self.epochs * (self.steps or 0) / accumulate
        return steps * 2 * (processes - 1) / processes * self.gradients / bandwidth


@dataclass
class Estimate:
    """What is to come.

    Attributes:
        parts: One after another.
        reading: Seconds to read a training batch, and do nothing else.
        kept: Bytes of checkpoints on the disk, at the most.
    """

    parts: list[Part] = field(default_factory=list)
    reading: float = 0.0
    kept: int = 0

    def add(self, part: Part) -> None:
        """Adds a part; one of the same name and steps goes on for as many epochs more."""
        for index, other in enumerate(self.parts):
            if (other.name, other.steps) == (part.name, part.steps):
                self.parts[index] = replace(other, epochs=other.epochs + part.epochs)
                return
        self.parts.append(part)


def estimate(
    teachers: Sequence[nn.Module],
    train_loader: Any,
    val_loader: Any,
    setting: Setting,
    plan: Options,
) -> Estimate:
    """Checks what :func:`fastmerge.merge` checks before its first epoch, and times some batches of what follows.

    Nothing is kept: teachers, loaders and files stay as they are, and so do random numbers.

    Raises:
        TypeError, ValueError: As :func:`fastmerge.merge`.
    """
    devices = [setting.device] if setting.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        plan, teachers, train_loader, val_loader, _ = with_label_sets(plan, teachers, train_loader, val_loader)
        setting = replace(setting, criterion=plan.criterion)
        distilled = plan.distill > 0
        inputs = check_loader("train_loader", train_loader, teachers[0], setting, trained=True, distilled=distilled)
        if val_loader is not None:
            check_loader("val_loader", val_loader, teachers[0], setting)
        examples = examples_of(inputs, teachers[0])
        found = Estimate(reading=time_reading(train_loader, setting))
        for which, big, each in stage_networks(teachers, examples, plan):
            setting.place(big)
            for kind, epochs in phases(big, each):
                found.parts.append(time_training(f"merge{which}, {kind}", epochs, big, train_loader, setting))
            scored = scores(each.merge_epochs, plan.val_every)
            found.parts += time_validation(f"validation of the big student{which}", scored, big, val_loader, setting)
            found.kept = max(found.kept, 3 * checkpoint_bytes(big))  # two, and one that is being written
        del big
        student = setting.place(blank_student(teachers, examples, plan)).requires_grad_(True)
        found.parts.append(time_training("fine-tune", plan.finetune_epochs, student, train_loader, setting))
        scored = scores(plan.finetune_epochs, plan.val_every)
        found.parts += time_validation("validation of the student", scored, student, val_loader, setting)
    return found


def scores(epochs: int, val_every: int) -> int:
    """How many of a stage's epochs end with a look at the validation data."""
    return sum(epoch % val_every == 0 or epoch == epochs for epoch in range(1, epochs + 1))


def checkpoint_bytes(network: nn.Module) -> int:
    """What a checkpoint of a network in training takes, SGD's momentum included."""
    parameters = sum(parameter.nbytes for parameter in network.parameters())
    return 2 * parameters + sum(buffer.nbytes for buffer in network.buffers())


def time_training(name: str, epochs: int, network: nn.Module, loader: Iterable[Any], setting: Setting) -> Part:
    """A part that trains, from the time of a few steps; their learning rate is 0."""
    network.train()
    optimizer = SGD(network.parameters(), lr=0.0, momentum=0.9)
    scaler = torch.amp.GradScaler(setting.device.type, enabled=setting.autocast is torch.float16)
    times, started = [], time.perf_counter()
    for inputs, target in setting.batches(islice(loader, 1 + _TIMED)):
        _, loss = setting.apply(network, inputs, target)
        if isinstance(network, BigStudent):
            loss = loss + network.gate_loss()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        times.append(-started + (started := _now(setting)))
    gradients = sum(parameter.nbytes for parameter in network.parameters())
    return Part(name, epochs, length_of(loader), median(times[1:] or times), gradients)


def time_validation(
    name: str, epochs: int, network: nn.Module, loader: Iterable[Any] | None, setting: Setting
) -> list[Part]:
    """The part that scores, where there is something to score on."""
    if loader is None:
        return []
    times, started = [], _now(setting)

    def after_step() -> None:
        nonlocal started
        times.append(-started + (started := _now(setting)))

    evaluate(network, list(islice(loader, 1 + _TIMED)), setting, after_step)
    return [Part(name, epochs, length_of(loader), median(times[1:] or times))]


def time_reading(loader: Iterable[Any], setting: Setting) -> float:
    """Seconds per batch."""
    times, started = [], _now(setting)
    for _ in setting.batches(islice(loader, 1 + _TIMED)):
        times.append(-started + (started := _now(setting)))
    return median(times[1:] or times)


def _now(setting: Setting) -> float:
    if setting.device.type == "cuda":
        torch.cuda.synchronize(setting.device)
    return time.perf_counter()

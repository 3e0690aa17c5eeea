"""What a merge will take, from a few timed steps of each of its parts."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.optim import SGD

from fastmerge.big_student import BigStudent
from fastmerge.evaluation import Setting, evaluate
from fastmerge.merging.checks import check_loader, check_teachers
from fastmerge.merging.plan import MergePlan
from fastmerge.merging.progress import peak_memory

_TIMED = 3


@dataclass(frozen=True)
class Part:
    """A part of a merge that is of one speed.

    Attributes:
        name: What it is.
        epochs: How many.
        steps: Batches per epoch, or None where the loader has no length.
        seconds: Of a batch, the median of three after a first one, reading it included.
    """

    name: str
    epochs: int
    steps: int | None
    seconds: float

    @property
    def total(self) -> float | None:
        """Seconds in all."""
        return None if self.steps is None else self.epochs * self.steps * self.seconds


def estimate(
    teachers: Sequence[nn.Module],
    train_loader: Iterable[Any],
    val_loader: Iterable[Any] | None,
    setting: Setting,
    plan: MergePlan,
) -> list[Part]:
    """Checks what :func:`fastmerge.merge` checks before its first epoch, and times some batches of what follows.

    Nothing is kept: teachers, loaders and files stay as they are, and so do random numbers.

    Raises:
        TypeError, ValueError: As :func:`fastmerge.merge`.
    """
    teachers = check_teachers(teachers)
    devices = [setting.device] if setting.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        inputs = check_loader("train_loader", train_loader, teachers[0], setting)
        if val_loader is not None:
            check_loader("val_loader", val_loader, teachers[0], setting)
        where = next(teachers[0].parameters()).device
        examples = tuple(value[:2].to(where) for value in inputs)
        big = setting.place(BigStudent(*teachers, example_inputs=examples[0] if len(examples) == 1 else examples))
        length = len(train_loader) if isinstance(train_loader, Sized) else None
        linked = sum(epoch >= plan.link_at * plan.merge_epochs for epoch in range(plan.merge_epochs))
        parts = []
        if linked < plan.merge_epochs:
            seconds = _step_seconds(big, train_loader, setting)
            parts.append(Part("merge, block-diagonal", plan.merge_epochs - linked, length, seconds))
        if linked:
            big.link()
            parts.append(Part("merge, linked", linked, length, _step_seconds(big, train_loader, setting)))
        if val_loader is not None:
            parts.append(_validation(big, val_loader, setting, "validation of the big student", plan.merge_epochs))
        del big
        student = setting.place(copy.deepcopy(teachers[0])).requires_grad_(True)
        parts.append(Part("fine-tune", plan.finetune_epochs, length, _step_seconds(student, train_loader, setting)))
        if val_loader is not None:
            parts.append(_validation(student, val_loader, setting, "validation of the student", plan.finetune_epochs))
    return parts


def describe(parts: Sequence[Part]) -> str:
    """The parts as a table, with the time of all and the most memory that timing them took."""
    rows = [("part", "epochs", "batches", "s per batch", "in all")]
    rows += [
        (part.name, str(part.epochs), _or_unknown(part.steps), f"{part.seconds:.3g}", _duration(part.total))
        for part in parts
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    totals = [part.total for part in parts]
    known = [total for total in totals if total is not None]
    whole = _duration(sum(known)) if len(known) == len(totals) else "unknown, since a loader has no length"
    return "\n".join([*lines, f"about {whole}; memory so far {peak_memory() / 2**30:.2f} GiB"])


def _step_seconds(network: nn.Module, loader: Iterable[Any], setting: Setting) -> float:
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
    return median(times[1:] or times)


def _validation(network: nn.Module, loader: Iterable[Any], setting: Setting, name: str, epochs: int) -> Part:
    times, started = [], _now(setting)

    def after_step() -> None:
        nonlocal started
        times.append(-started + (started := _now(setting)))

    evaluate(network, list(islice(loader, 1 + _TIMED)), setting, after_step)
    return Part(name, epochs, len(loader) if isinstance(loader, Sized) else None, median(times[1:] or times))


def _now(setting: Setting) -> float:
    if setting.device.type == "cuda":
        torch.cuda.synchronize(setting.device)
    return time.perf_counter()


def _or_unknown(value: int | None) -> str:
    return "?" if value is None else str(value)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 60:
        return f"{seconds:.2g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"

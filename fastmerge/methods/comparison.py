"""Methods beside each other: how good each one's network is at once and after fine-tuning, and what it took."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastmerge.evaluation import Criterion, Setting, evaluate
from fastmerge.history import Score
from fastmerge.merging.checks import check_device, check_loader, check_teachers
from fastmerge.merging.options import Options
from fastmerge.methods.cost import Meter
from fastmerge.methods.registry import METHODS, apply, checked
from fastmerge.methods.training import train
from fastmerge.resuming.random_states import loader_state, random_states, restore_loader_state, restore_random_states


@dataclass(frozen=True)
class Row:
    """One network of a comparison.

    Attributes:
        name: of the method, or "teacher 0" and so on; "teacher 0, trained on" is what all others have to beat.
        at_once: its score before fine-tuning.
        tuned: after it; None for what is not fine-tuned.
        epochs: of training, fine-tuning included; the teachers' own not.
        cost: counted operations in epochs of training one teacher, fine-tuning included.
        memory: bytes at the method's peak beyond those in use before; None where unknown.
        seconds: of the method and of fine-tuning.
        error: what went wrong, if anything did; then the scores are None.
    """

    name: str
    at_once: Score | None = None
    tuned: Score | None = None
    epochs: float = 0.0
    cost: float = 0.0
    memory: int | None = None
    seconds: float = 0.0
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self)


def compare(
    teachers: Sequence[nn.Module],
    train_loader: Iterable[Any],
    val_loader: Iterable[Any],
    methods: Sequence[str],
    *,
    finetune_epochs: int = 30,
    epochs: int = 30,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    criterion: Criterion = cross_entropy,
    seed: int = 0,
    baseline: bool = True,
    callback: Callable[[Row, nn.Module | None], object] | None = None,
) -> list[Row]:
    """Runs methods on the same teachers, fine-tunes each network in the same way, and scores all.

    Args:
        teachers: two or more trained networks of one architecture, on the device to work on.
        train_loader: (input, target) batches to merge and train with.
        val_loader: to score on.
        methods: names, of :data:`~fastmerge.methods.METHODS`.
        finetune_epochs: that each network is trained for afterwards.
        epochs: of the methods that train.
        lr: learning rate of all training.
        momentum: of all training.
        weight_decay: of all training.
        options: further options, by name of the method.
        criterion: of the output and the target.
        seed: each method and each fine-tuning begins with the same random numbers, and reads the training data in the same
            order.
        baseline: whether teacher 0 is trained on, too.
        callback: called with each row when it is known, and its network: the fine-tuned one, where there is one.

    Returns:
        A row for each teacher, one for the baseline, and one for each method. A method that fails has its error there.

    Raises:
        ValueError, TypeError: there is no such method or option, a method stands twice, there are fewer than two teachers, or
            they or the criterion can't work with the data; before anything is run.
    """
    teachers = check_teachers(teachers)
    if len(set(methods)) < len(methods):
        raise ValueError(f"methods: each one once; got {', '.join(methods)}")
    if unknown := set(options or ()) - set(methods):
        raise ValueError(f"options are for the methods that are compared; got some for {', '.join(sorted(unknown))}")
    Options(finetune_epochs=finetune_epochs, finetune_lr=lr, momentum=momentum, weight_decay=weight_decay)
    given = {name: dict((options or {}).get(name, {})) for name in methods}
    common: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "criterion": criterion}
    for name, own in given.items():
        known = checked(name, own).options
        given[name] = {key: value for key, value in ({"epochs": epochs} | common).items() if key in known} | own
    setting = Setting(check_device(None, teachers[0]), criterion)
    check_loader("train_loader", train_loader, teachers[0], setting)
    check_loader("val_loader", val_loader, teachers[0], setting)
    random, order, rows = random_states(setting.device), loader_state(train_loader), list[Row]()

    @contextlib.contextmanager
    def alike() -> Iterator[None]:
        """The same random numbers and order of the data for all."""
        before = random_states(setting.device)
        restore_random_states(random, setting.device)
        restore_loader_state(train_loader, order)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            restore_random_states(before, setting.device)

    def scored(network: nn.Module) -> Score:
        return evaluate(network, val_loader, setting)

    def add(row: Row, network: nn.Module | None = None, *, finetuned: bool = True) -> None:
        if network is not None and finetuned and finetune_epochs:
            started = time.perf_counter()
            with Meter() as meter, alike():
                network = copy.deepcopy(network)
                train(network, train_loader, epochs=finetune_epochs, **common)
            row = dataclasses.replace(
                row,
                tuned=scored(network),
                epochs=row.epochs + finetune_epochs,
                cost=row.cost + meter.epochs(teachers[0], train_loader),
                seconds=row.seconds + time.perf_counter() - started,
            )
        rows.append(row)
        if callback is not None:
            callback(row, network)

    for number, teacher in enumerate(teachers):
        add(Row(f"teacher {number}", scored(teacher)), teacher, finetuned=False)
    if baseline:
        add(Row("teacher 0, trained on", rows[0].at_once), teachers[0])
    for name in methods:
        try:
            with alike(), warnings.catch_warnings():
                outcome = apply(name, teachers, train_loader, **given[name])
            row = Row(name, scored(outcome.network), None, float(given[name].get("epochs", 0)), outcome.cost)
            row = dataclasses.replace(row, memory=outcome.memory, seconds=outcome.seconds)
            add(row, outcome.network, finetuned=METHODS[name].one_network)
        except Exception as error:  # whatever it is, the others get their rows
            add(Row(name, error=" ".join(str(error).split()) or type(error).__name__))
    return rows

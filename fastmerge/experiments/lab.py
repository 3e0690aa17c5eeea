"""What a strategy works with: networks of some replicates, trained, merged, scored and chosen together."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import nn

from fastmerge import methods
from fastmerge.batch_statistics import ENOUGH_SAMPLES, has_statistics, recalibrate
from fastmerge.big_student import BigStudent
from fastmerge.checkpoints import fingerprint
from fastmerge.evaluation import evaluate
from fastmerge.experiments.column import Column, Curve, curve_of, joined, mean_curve, picked
from fastmerge.experiments.place import Loaders, Place, seed_for
from fastmerge.experiments.recipes import Recipe
from fastmerge.history import EpochRecord, History, Score
from fastmerge.merging.api import merge_by, train_by
from fastmerge.merging.options import Options, Plan
from fastmerge.methods.cost import Operations
from fastmerge.methods.distill import DISTILL
from fastmerge.stack import Stack

Note = Callable[[dict[str, Any]], object]


def lengths(plan: Plan) -> dict[str, Any]:
    """Options of a merge whose fine-tuning is as long as a plan."""
    return {"finetune_epochs": plan.epochs, "milestones": tuple(plan.milestones), "warmup": plan.warmup}


class Lab:
    """Trains networks for the strategies of an experiment.

    Within a replicate all strategies see the same teachers, order of the data and test samples, so that their differences
    are paired.

    Args:
        place: where and what networks train.
        replicates: their numbers in the run; more than one for a recipe in memory alone, which train as one stack.
        name: of the strategy, for the log.
        note: told of every epoch.
        operations: counts; None makes one.
    """

    def __init__(
        self,
        place: Place,
        replicates: Sequence[int],
        name: str,
        note: Note | None = None,
        operations: Operations | None = None,
    ) -> None:
        self.place, self.replicates, self.name, self.note = place, tuple(replicates), name, note
        self.recipe: Recipe = place.recipe
        self.operations = Operations(place.example) if operations is None else operations
        self._lost: set[int] = set()
        self._costs: dict[int, tuple[float, float]] = {}

    def only(self, rows: Sequence[int]) -> Lab:
        """The same for some of the replicates, by their positions."""
        return type(self)(self.place, [self.replicates[row] for row in rows], self.name, self.note, self.operations)

    def fresh(self, number: int = 0, width: int = 1) -> list[nn.Module]:
        """A network with weights of its own for each replicate; the same number gives the same network again."""
        networks = []
        for replicate in self.replicates:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_for(self.place.seed, "weights", replicate, number, width))
                networks.append(self.recipe.make_network(self.place.classes, width).to(self.place.device))
        return networks

    def train(
        self,
        networks: Sequence[nn.Module | None],
        plan: Plan,
        stage: str = "training",
        number: int = 0,
        after: Sequence[Column] = (),
        teachers: Sequence[Column] = (),
        **options: Any,
    ) -> Column:
        """Trains one network of each replicate as usual.

        Args:
            networks: fresh ones, or what a method has made of others. They are not changed.
            plan: how long, at which learning rates.
            stage: its name in the log.
            number: among networks of its kind: networks of one number read their data in one order.
            after: what the networks were made of, whose epochs and cost count too.
            teachers: to learn from, beside the labels.
            options: others than the recipe's, such as ``criterion``.
        """
        rows = [row for row, network in enumerate(networks) if network is not None]
        known = [network for network in networks if network is not None]
        if not rows:
            return Column.lost(len(networks))
        if len(rows) < len(networks):  # the others go on
            before, taught = ([column.only(rows) for column in columns] for columns in (after, teachers))
            part = self.only(rows)
            trained = part.train(known, plan, stage, number, before, taught, **options)
            return trained.spread(rows, len(networks))
        network = copy.deepcopy(self.together(known))
        if teachers:
            options = {
                "distill": self.recipe.merge.distill or DISTILL,
                "temperature": self.recipe.merge.temperature,
            } | options
        loaders = self.loaders("after" if after else "fresh", number)
        path = (stage, self.replicates[0], number)
        given = self._given(replace(self.recipe.training(plan), **options), path, stage, number)
        try:
            history = train_by(
                given,
                network,
                loaders.train,
                loaders.test,
                teachers=[self._of(column) for column in teachers],
                processes=self.place.processes,
                also=self._also,
                count=self.operations,
                title=" ".join(map(str, path)),
            )
        except FloatingPointError as error:
            return self._diverged(error)
        return self._column(network, history, after)

    def merge(self, teachers: Sequence[Column], stage: str = "student", number: int = 0, **options: Any) -> Column:
        """Merges teachers and fine-tunes the student, as :func:`fastmerge.merge` does.

        Args:
            teachers: a column for each.
            stage: names its checkpoints.
            number: among merges of its stage, which read their data in other orders.
            options: others than the recipe's.
        """
        chosen = replace(self.recipe.merge, **options)
        if chosen.compact_at is not None and len(self.replicates) > 1:  # they come to differ in size
            rows = range(len(self.replicates))
            parts = [self.only([r]).merge([t.only([r]) for t in teachers], stage, number, **options) for r in rows]
            return joined(parts)
        loaders = self.loaders("after", number)
        path = (stage, self.replicates[0], number)
        try:
            student, history = merge_by(
                self._given(chosen, path, None, number),
                [self._of(teacher) for teacher in teachers],
                loaders.train,
                loaders.test,
                processes=self.place.processes,
                also=self._also,
                count=self.operations,
            )
        except FloatingPointError as error:
            return self._diverged(error)
        return self._column(student, history, teachers)

    def merge_for(self, teachers: Sequence[Column], stage: str, **options: Any) -> Column:
        """:meth:`merge`, with as many epochs of fine-tuning as bring it to the cost of the recipe's one long network.

        Args:
            teachers: a column for each.
            stage: names its checkpoints.
            options: others than the recipe's.

        Raises:
            ValueError: the merge stage alone costs as much.
        """
        chosen = replace(self.recipe.merge, **options)
        spent = sum(column.cost for column in teachers) + self.merging_cost(len(teachers), **options)
        plan = self._plan(spent, len(teachers) if chosen.distill else 0)
        return self.merge(teachers, stage, **options | lengths(plan))

    def costs(self, count: int) -> tuple[float, float]:
        """Of an epoch of the big student of so many teachers, block-diagonal and linked, in epochs of one teacher."""
        if count not in self._costs:
            fresh = [self.recipe.make_network(self.place.classes, 1) for _ in range(count)]
            big = BigStudent(*fresh, example_inputs=self.place.example, verify=False)
            apart = self.operations(big) / self._unit
            big.link()
            self._costs[count] = (apart, self.operations(big) / self._unit)
        return self._costs[count]

    def merging_cost(self, count: int, **options: Any) -> float:
        """Of a merge stage of so many teachers; options are others than the recipe's."""
        chosen = replace(self.recipe.merge, **options)
        apart, linked = self.costs(count)
        return (chosen.merge_epochs - chosen.linked_epochs) * apart + chosen.linked_epochs * linked

    def apply(self, method: str, teachers: Sequence[Column], **options: Any) -> Column:
        """What a method of :mod:`fastmerge.methods` makes of each replicate's teachers, as it is.

        Args:
            method: its name.
            teachers: a column for each.
            options: of the method.

        Raises:
            ValueError: several processes train a network together; each has only its share of the samples.
        """
        if self.place.processes.size > 1:
            raise ValueError(
                f"strategies that use {method} run in one process; start without torchrun, or leave them out"
            )
        train = self.loaders("samples").train
        each = [train]
        if self.recipe.in_memory:
            epoch = list(train)
            each = [[(inputs[row], target[row]) for inputs, target in epoch] for row in range(len(self.replicates))]
        made = [
            methods.apply(method, networks, batches, **options)
            for *networks, batches in zip(*(column.networks for column in teachers), each, strict=True)
        ]
        return self.scored(
            [one.network for one in made],
            teachers,
            cost=max(one.cost for one in made),
            seconds=sum(one.seconds for one in made),
        )

    def scored(
        self, networks: Sequence[nn.Module | None], after: Sequence[Column], cost: float = 0.0, seconds: float = 0.0
    ) -> Column:
        """Networks that were made of others without training, scored on the test data.

        Args:
            networks: one for each replicate.
            after: what they were made of, whose epochs and cost count too.
            cost: of making them.
            seconds: likewise.
        """
        epochs = sum(column.epochs for column in after)
        scores = self.scores(networks, self.loaders("test").test)
        values = [float(each.loss if self.recipe.metric == "test_loss" else each.accuracy) for each in scores]
        histories = [History(len(after), borders={"compressed": score}) for score in scores]
        figures = [
            {"test_loss": s.loss} | ({} if s.accuracy is None else {"test_accuracy": s.accuracy}) for s in scores
        ]
        curves: list[Curve] = [[(epochs, each)] for each in figures]
        return Column([*networks], values, curves, [*histories], cost=cost, seconds=seconds).after(after)

    def finetuned(self, start: Column, stage: str, teachers: Sequence[Column] = (), **options: Any) -> Column:
        """Trains on for what is left of the cost of the recipe's one long network.

        Args:
            start: what was made so far.
            stage: names its checkpoints.
            teachers: to learn from, beside the labels.
            options: others than the recipe's.

        Raises:
            ValueError: nothing is left.
        """
        plan = self._plan(start.cost, len(teachers))
        column = self.train(start.networks, plan, stage, after=[start], teachers=teachers, **options)
        for history, before in zip(column.histories, start.histories, strict=True):
            if history is not None and before is not None and "compressed" in before.borders:
                history.borders.setdefault("compressed", before.borders["compressed"])
        return column

    def recalibrated(self, networks: Sequence[nn.Module]) -> list[nn.Module]:
        """A network of each replicate with BatchNorm's statistics estimated anew on its training data; they are changed."""
        if not has_statistics(networks[0]):
            return list(networks)
        network, train = self.place.setting.place(self.together(networks)), self.loaders("recalibrate").train
        batches = islice(self.place.setting.batches(train), -(-ENOUGH_SAMPLES // self.recipe.batch_size))
        if not isinstance(network, Stack):
            recalibrate(network, batches)
            return [network]
        network.recalibrate(batches)
        return list(network.networks())

    def best(self, columns: Sequence[Column]) -> Column:
        """The network of each replicate that is the best on the training data that was held out; of equals, by the loss."""
        ranks = zip(*(self.ranks(column) for column in columns), strict=True)
        return picked(columns, [each.index(min(each)) for each in ranks])

    def ranks(self, column: Column) -> list[tuple[float, float]]:
        """How bad the network of each replicate is on the training data that was held out: by the metric, then the loss."""

        def rank(score: Score) -> tuple[float, float]:
            loss = score.loss if math.isfinite(score.loss) else math.inf
            by_accuracy = self.recipe.metric == "test_accuracy" and score.accuracy is not None and math.isfinite(loss)
            return (-score.accuracy if by_accuracy else loss), loss

        return [rank(score) for score in self.scores(column.networks, self.loaders("held out").held_out)]

    def scores(self, networks: Sequence[nn.Module | None], loader: Any) -> list[Score]:
        """How good a network of each replicate is, on a loader of :meth:`loaders`; infinitely bad where there is none."""
        known = [network for network in networks if network is not None]
        if len(known) < len(networks):
            return [Score(math.inf, -math.inf)] * len(networks)
        network = self.place.setting.place(self.together(known))
        score = evaluate(network, loader, self.place.setting, processes=self.place.processes)
        if not isinstance(network, Stack):
            return [score]
        each = score.accuracy or [None] * len(networks)
        return [Score(loss, accuracy) for loss, accuracy in zip(score.loss, each, strict=True)]

    def loaders(self, order: str, number: int = 0) -> Loaders:
        """What one network of each replicate reads; of a stack, batches (R, N, ...)."""
        return self.place.loaders(self.replicates, order, number)

    def together(self, networks: Sequence[nn.Module]) -> nn.Module:
        """A network of each replicate as what trains: a stack, for a recipe in memory."""
        if self.recipe.in_memory:
            return Stack(networks)
        (network,) = networks
        return network

    def _of(self, column: Column) -> nn.Module:
        return self.together([network for network in column.networks if network is not None])

    def left(self, spent: float, taught: int, times: int = 1) -> float:
        """Epochs of fine-tuning that bring a cost to that of the recipe's one long network.

        Args:
            spent: the cost so far.
            taught: how many teachers are asked, each for a third of its training's operations.
            times: how many networks they are asked for.
        """
        asked = taught / 3
        if self.recipe.in_memory and self.recipe.augment is None:  # once
            return self.recipe.epochs - spent - times * asked + 1e-6
        return (self.recipe.epochs - spent) / (1 + asked) + 1e-6

    def _plan(self, spent: float, taught: int) -> Plan:
        """Fine-tuning, as the recipe's, of what is :meth:`left`."""
        epochs = int(self.left(spent, taught))
        if epochs < 1:
            raise ValueError(
                f"{self.recipe.name}, {self.name}: no epoch is left for fine-tuning, since {spent:.1f} of the cost of "
                f"{self.recipe.epochs} epochs are spent; raise --budget"
            )
        plan = self.recipe.merge.finetune_plan
        return plan.scaled(epochs / plan.epochs)

    @cached_property
    def _also(self) -> dict[str, Any]:
        if self.place.dataset is None:
            return {}
        return {"replicates": list(self.replicates), "data": fingerprint(vars(self.place.dataset[0]))}

    @cached_property
    def _unit(self) -> float:
        """Operations of a teacher per sample."""
        return self.operations(self.recipe.make_network(self.place.classes, 1))

    def _given(self, options: Options, path: Sequence[int | str], stage: str | None, number: int) -> Options:
        def tell(record: EpochRecord) -> None:
            self._look(record)
            if self.note is not None:
                self.note(self._noted(record, stage or record.stage, number))

        return self.place.placed(options, path, callback=tell)

    def _look(self, record: EpochRecord) -> None:
        losses = record.train.loss if isinstance(record.train.loss, list) else [record.train.loss]
        for replicate, loss in zip(self.replicates, losses, strict=True):
            if not math.isfinite(loss) and replicate not in self._lost:
                self._lost.add(replicate)
                warnings.warn(
                    f"{self.recipe.name}, {self.name}: the loss of replicate {replicate} is no longer finite after epoch "
                    f"{record.epoch}; the learning rate {record.lr:g} may be too high",
                    stacklevel=2,
                )

    def _noted(self, record: EpochRecord, stage: str, number: int) -> dict[str, Any]:
        values: dict[str, Any] = {"strategy": self.name, "replicates": list(self.replicates), "stage": stage}
        values |= {"network": number, "epoch": record.epoch, "lr": record.lr, "train_loss": _listed(record.train.loss)}
        if record.val is not None:
            values["test_loss"] = _listed(record.val.loss)
            if record.val.accuracy is not None:
                values["test_accuracy"] = _listed(record.val.accuracy)
        if record.stage == "merge":
            values |= {"gate_loss": _listed(record.gate_loss), "open_probability": record.open_probability}
            values |= {"linked": record.linked} | ({} if record.lam is None else {"lam": record.lam})
        return values | {"images_per_second": record.images_per_second}

    def _diverged(self, error: FloatingPointError) -> Column:
        warnings.warn(f"{self.recipe.name}, {self.name}, replicate {self.replicates[0]}: {error}", stacklevel=3)
        return Column.lost(len(self.replicates))

    def _column(self, network: nn.Module, history: History, before: Sequence[Column]) -> Column:
        """What a training came to, after others."""
        networks, histories = [network], [history]
        if isinstance(network, Stack):
            networks, histories = network.networks(), history.parts(len(network))
        first = sum(column.epochs for column in before)
        operations = sum(record.operations or 0.0 for record in history.epochs)
        values = [self._value(each) for each in histories]
        samples = self.place.samples[0]  # of each network, as the history's rate is
        return Column(
            networks=[n if math.isfinite(value) else None for n, value in zip(networks, values, strict=True)],
            values=values,
            curves=[
                [*mean_curve([column.curves[row] for column in before]), *curve_of(each, first)]
                for row, each in enumerate(histories)
            ],
            histories=[*histories],
            epochs=len(history.epochs),
            cost=operations / self._unit,
            seconds=sum(samples / record.images_per_second for record in history.epochs),
        ).after(before)

    def _value(self, history: History) -> float:
        score = history.epochs[-1].val
        assert score is not None  # the last epoch of a stage is always scored
        value = score.loss if self.recipe.metric == "test_loss" else score.accuracy
        return float(value) if value is not None and math.isfinite(score.loss) else math.nan


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]

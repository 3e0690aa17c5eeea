"""The paper's strategy: two teachers, a merge stage, compression, fine-tuning."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastmerge.big_student import BigStudent
from fastmerge.data.dataset import Dataset
from fastmerge.gate_budget import GateBudget
from fastmerge.merging.gate_report import gate_warnings, origins
from fastmerge.narrowing.closing import UnsettledGatesWarning
from fastmerge.schedules import QuadraticLambda
from fastmerge.training.job_stages import train_stage
from fastmerge.training.job_state import JobState
from fastmerge.training.jobs import Job, Outcome, Reporter, predictions, state_on_cpu
from fastmerge.training.scores import Curves, score, spread
from fastmerge.training.stack import Stack
from fastmerge.training.stacked_step import open_means
from fastmerge.training.stacks import Stacks
from fastmerge.training.stage import EpochLosses, Stage

TEACHERS = 2


def student(job: Job, data: Dataset, reporter: Reporter, state: JobState) -> Outcome:
    """Two thirds of the epochs in two teachers, a sixth in the merge stage, a sixth in fine-tuning."""
    return _StudentRun(job, data, reporter, state).run()


class _StudentRun:
    """One job of the student strategy; ``rows`` are the replicates that have not diverged."""

    def __init__(self, job: Job, data: Dataset, reporter: Reporter, state: JobState) -> None:
        self.job, self.data, self.reporter, self.state, self.recipe = job, data, reporter, state, job.recipe
        self.size = len(job.replicates)
        self.rows = list(range(self.size))
        self.curves = Curves(self.size)
        self.borders: dict[str, list[float]] = {}
        self.open_probability: list[dict[str, Tensor]] = []
        self.lam: list[float | None] = []
        self.kept: list[dict[str, list[int]] | None] = [None] * self.size
        self.left: list[dict[str, Any]] = []  # of each compaction: its epoch, whom each replicate kept, and how many
        self.teacher_scores: dict[str, Tensor] = {}
        if state.records is not None:
            self._restore(dict(state.records))

    def run(self) -> Outcome:
        teachers = self._teachers()
        if not self.rows:
            return Outcome([math.nan] * self.size, self.curves, [None] * self.size)
        students = self._finetune(self._merge(teachers))
        final = self.borders["student"]
        drawn = predictions(self.job, students)
        networks: list[dict[str, Tensor] | None] = [None] * self.size
        for row, network in zip(self.rows, students.networks(), strict=True):
            networks[row] = state_on_cpu(network) if math.isfinite(final[row]) else None
        return Outcome(
            values=final,
            curves=self.curves,
            networks=networks,
            predictions=None if drawn is None else spread(drawn, self.rows, self.size),
            student={
                "lam": self.lam,
                "open_probability": self._gates(),
                "borders": self.borders,
                "kept": self.kept,
                "compactions": self._compactions(),
            },
        )

    def _teachers(self) -> list[nn.Module]:
        """Trains the teachers and returns those of the replicates that go on, two by two."""
        stack = Stack(self.job.fresh_networks(TEACHERS, 1))
        stage = self.recipe.teacher_stage()
        every = list(range(self.size))
        for losses in self._train(stack, stage, every):
            if self._is_tested(losses.epoch, stage.epochs):
                self.teacher_scores = {"train_loss": losses.loss, **self._score(stack)}
                means = {name: _mean_of_two(value) for name, value in self.teacher_scores.items()}
                self._record(TEACHERS * losses.epoch, means)
        metric = self.teacher_scores[self.recipe.metric].view(self.size, TEACHERS)
        for index in range(TEACHERS):
            self.borders[f"teacher {index}"] = metric[:, index].tolist()
        finite = _mean_of_two(self.teacher_scores["train_loss"]).isfinite()
        self.rows = [row for row in every if finite[row]]
        return [stack.network(TEACHERS * row + index) for row in self.rows for index in range(TEACHERS)]

    def _merge(self, teachers: list[nn.Module]) -> Stack:
        """Trains the big students and returns them compressed."""
        example = self.data.normalise(self.data.train_inputs[:2])
        widened = []
        for position, row in enumerate(self.rows):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.job.seed_for("gates", self.job.replicates[row]))
                pair = teachers[TEACHERS * position : TEACHERS * (position + 1)]
                widened.append(BigStudent(*pair, example_inputs=example))
        stack = Stack(widened)
        before = _open_probabilities(stack)
        first = TEACHERS * 2 * self.recipe.unit
        for losses in self._merge_epochs(stack):
            self.open_probability.append(_open_probabilities(self.big_stack))
            self.lam.append(losses.lam)
            if self._is_tested(losses.epoch, self.recipe.unit):
                self._record(first + losses.epoch, {"train_loss": losses.loss, **self._score(self.big_stack)})
        bigs: list[Any] = self.big_stack.networks()
        if "big student" not in self.borders:  # all its epochs may have been done before the run was interrupted
            self._border("big student", self.big_stack)
            self._warn_of_gates(before, self.open_probability[-1])
            for row, big in zip(self.rows, bigs, strict=True):
                self.kept[row] = origins(big)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnsettledGatesWarning)  # said already, of all replicates together
            compressed = Stack([big.compress() for big in bigs])
        self._border("compressed", compressed)
        return compressed

    def _merge_epochs(self, stack: Stack) -> Iterator[EpochLosses]:
        """The merge stage of ``big_stack``, epoch by epoch.

        Linking and compaction restart the momentum, which ten steps build up again.
        """
        self.big_stack: Stack | Stacks = stack
        recipe, gates = self.recipe, _gate_names(stack)
        options: dict[str, Any] = {"lam": self._weight_of_gates(), "gates": gates, "total": recipe.unit}
        for first, part in recipe.merge_parts():
            if first in (recipe.link_from, *recipe.compact_from):
                bigs: list[Any] = self.big_stack.networks()
                if first == recipe.link_from:
                    for big in bigs:
                        big.link()
                if first in recipe.compact_from:
                    self._compact(first, bigs)
                self.big_stack = Stack(bigs) if all(map(_is_whole, bigs)) else Stacks(bigs)
            for losses in self._train(self.big_stack, part, self.rows, done=first, **options):
                yield EpochLosses(first + losses.epoch, losses.loss, losses.gate_loss, losses.lam)

    def _compact(self, epoch: int, bigs: list[Any]) -> None:
        """Drops what is closed for good, or what was dropped before the run was interrupted."""
        known = next((each["candidates"] for each in self.left if each["epoch"] == epoch), None)
        if known is not None:
            for big, candidates in zip(bigs, known, strict=True):
                big.keep_only(candidates)
            return
        for big in bigs:
            big.compact()
        shrunk = [{name: gate for name, gate in big.gates.items() if gate.candidates is not None} for big in bigs]
        candidates = [{name: gate.candidates.cpu() for name, gate in gates.items()} for gates in shrunk]
        counts = [{name: gate.channels for name, gate in big.gates.items()} for big in bigs]
        self.left.append({"epoch": epoch, "candidates": candidates, "counts": counts})

    def _compactions(self) -> list[dict[str, Any]]:
        """After which epochs of the merge stage channels were dropped, and how many of each group each replicate had left."""
        found = []
        for each in self.left:
            counts: list[dict[str, int] | None] = [None] * self.size
            for row, left in zip(self.rows, each["counts"], strict=True):
                counts[row] = left
            found.append({"epoch": each["epoch"], "left": counts})
        return found

    def _weight_of_gates(self) -> QuadraticLambda | GateBudget:
        if self.recipe.gate_schedule == "quadratic":
            return QuadraticLambda(self.recipe.lam_start, self.recipe.lam_step)
        steps = self.recipe.merge_steps(len(self.data.train_inputs))
        return GateBudget(steps, gate_lr=self.recipe.merge_stage().gate_lr, momentum=self.recipe.momentum)

    def _finetune(self, stack: Stack) -> Stack:
        stage = self.recipe.finetune_stage()
        first = self.recipe.epochs - self.recipe.unit
        for losses in self._train(stack, stage, self.rows):
            if self._is_tested(losses.epoch, stage.epochs):
                self._record(first + losses.epoch, {"train_loss": losses.loss, **self._score(stack)})
        self._border("student", stack)
        return stack

    def _train(self, stack: Stack | Stacks, stage: Stage, rows: list[int], **options: Any) -> Iterator[EpochLosses]:
        arguments = (self.job, stack, self.data, stage, rows, self.reporter, self.state, self._records)
        return train_stage(*arguments, **options)

    def _records(self) -> dict[str, Any]:
        return {
            "curves": self.curves.to_dict(),
            "borders": self.borders,
            "open_probability": self.open_probability,
            "lam": self.lam,
            "kept": self.kept,
            "left": self.left,
            "teacher_scores": self.teacher_scores,
        }

    def _restore(self, records: dict[str, Any]) -> None:
        self.curves.restore(records.pop("curves"))
        vars(self).update(records)

    def _is_tested(self, epoch: int, last: int) -> bool:
        return epoch % self.recipe.test_every == 0 or epoch == last

    def _score(self, stack: Stack | Stacks) -> dict[str, Tensor]:
        return score(stack, self.data, self.recipe.criterion)

    def _record(self, epoch: int, values: dict[str, Tensor]) -> None:
        full = {name: spread(value.double(), self.rows, self.size) for name, value in values.items()}
        self.curves.add(epoch, full)

    def _border(self, name: str, stack: Stack | Stacks) -> None:
        if name in self.borders:
            return
        self.borders[name] = spread(self._score(stack)[self.recipe.metric], self.rows, self.size).tolist()

    def _warn_of_gates(self, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
        start, end = ({name: value.nanmean().item() for name, value in each.items()} for each in (before, after))
        lam_step = self.recipe.lam_step if self.recipe.gate_schedule == "quadratic" else None
        for warning in gate_warnings(start, end, 1 / TEACHERS, lam_step):
            self.reporter.warn(f"mean of {len(self.rows)} replicates: {warning}")

    def _gates(self) -> dict[str, list[list[float]]]:
        return {
            name: [spread(each[name], self.rows, self.size).tolist() for each in self.open_probability]
            for name in self.open_probability[0]
        }


def _mean_of_two(values: Tensor) -> Tensor:
    return values.view(-1, TEACHERS).mean(1)


def _is_whole(big: BigStudent) -> bool:
    gates: Any = big.gates
    return all(gates[group.name].channels == big.num_teachers * group.size for group in big.groups)


def _gate_names(stack: Stack) -> set[str]:
    big: Any = stack.skeleton
    gates = {id(parameter) for parameter in big.gate_parameters()}
    return {name for name, parameter in big.named_parameters() if id(parameter) in gates}


def _open_probabilities(stack: Stack | Stacks) -> dict[str, Tensor]:
    """Mean P[g > 0] of every channel group, (R,), on the CPU."""
    big: Any = stack.parts[0].skeleton
    means = torch.cat([open_means(part) for part in stack.parts]).cpu()
    return {group.name: means[:, number] for number, group in enumerate(big.groups)}

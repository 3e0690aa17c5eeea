"""The stages of a merge with one choice varied, as ablations go through them: on stacks of replicates or one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import nn

from benchmarks.ablation_variants import Variant
from fastmerge.batch_statistics import ENOUGH_SAMPLES
from fastmerge.experiments.lab import Lab
from fastmerge.experiments.place import Place, seed_for
from fastmerge.experiments.run import teacher
from fastmerge.history import EpochRecord, History
from fastmerge.merging.api import trainer_for
from fastmerge.merging.stages import finetune, learn_importance
from fastmerge.merging.trainer import Trainer
from fastmerge.stack import BigStack, Stack


class Ablation:
    """The stages for some replicates, each from the same seeds whatever the variant, by the loop of :func:`fastmerge.merge`.

    The teachers are those that ``fastmerge run`` trains with the same seed: from checkpoints in the place they are read, or
    gone on with.

    Args:
        place: where, with a recipe of the run's epochs.
        replicates: their numbers.
        epoch: called after every epoch with how many networks were trained in it.
    """

    def __init__(self, place: Place, replicates: Sequence[int], epoch: Callable[[int], object]) -> None:
        self.place, self.recipe, self.replicates, self.epoch = place, place.recipe, tuple(replicates), epoch
        self.lab = Lab(place, replicates, "ablations", lambda values: epoch(len(replicates)))

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Epochs of a teacher, of the merge stage, and of fine-tuning."""
        return self.recipe.teacher.epochs, self.recipe.merge.merge_epochs, self.recipe.merge.finetune_epochs

    def teachers(self) -> list[list[nn.Module]]:
        """The teachers of each replicate.

        Raises:
            FloatingPointError: one diverged.
        """
        columns = [teacher(self.lab, number) for number in range(self.recipe.teachers)]
        found: list[Any] = [list(each) for each in zip(*(column.networks for column in columns), strict=True)]
        if any(network is None for each in found for network in each):
            raise FloatingPointError("a teacher diverged")
        return found

    def merged(self, teachers: Sequence[Sequence[nn.Module]], variant: Variant) -> list[Any]:
        """The big students at the end of their stage, one per replicate."""
        options = replace(self.recipe.merge, **variant.changes)
        if options.compact_at is not None and len(teachers) > 1:  # they come to differ in size
            rows = range(len(teachers))
            singles = [Ablation(self.place, [self.replicates[row]], self.epoch) for row in rows]
            return [single.merged([teachers[row]], variant)[0] for row, single in enumerate(singles)]
        example = self.place.example.to(self.place.device)
        with torch.random.fork_rng(self._cuda):
            bigs = []
            for replicate, each in zip(self.replicates, teachers, strict=True):
                torch.manual_seed(self._seed("gates", replicate))
                bigs.append(variant.big(*map(copy.deepcopy, each), example_inputs=example))
            big: Any = self.place.setting.place(BigStack(bigs) if self.recipe.in_memory else bigs[0])

            def learn(trainer: Trainer) -> None:
                learn_importance(big, options.fitted(big, trainer.steps), trainer)

            self._train(options, "merge", variant.draws, learn)
        return list(big.networks()) if isinstance(big, Stack) else [big]

    def compressed(self, bigs: Sequence[Any], variant: Variant) -> list[nn.Module]:
        """The students before fine-tuning."""
        students = []
        for row, big in enumerate(bigs):
            student: nn.Module = big.compress()
            if variant.edit is not None:
                variant.edit(student, big, self.calibration(row))
            students.append(student)
        return students

    def finetuned(self, students: Sequence[nn.Module], variant: Variant) -> list[nn.Module]:
        """The students after fine-tuning; those given may be changed."""
        student = self.place.setting.place(self.lab.together(students))
        with torch.random.fork_rng(self._cuda):
            options = self.recipe.merge
            self._train(options, "fine-tune", variant.draws, lambda trainer: finetune(student, options, trainer))
        return list(student.networks()) if isinstance(student, Stack) else [student]

    def scores(self, networks: Sequence[nn.Module]) -> list[float]:
        """The recipe's metric on the test data, of a network of each replicate."""
        if len({tuple(p.shape for p in network.parameters()) for network in networks}) > 1:  # compacted ones
            singles = [Ablation(self.place, [replicate], self.epoch) for replicate in self.replicates]
            return [single.scores([network])[0] for single, network in zip(singles, networks, strict=True)]
        found = self.lab.scores(networks, self.lab.loaders("test").test)
        return [score.loss if self.recipe.metric == "test_loss" else score.accuracy for score in found]

    def calibration(self, row: int) -> Iterable[Any]:
        """Batches of at least ENOUGH_SAMPLES training samples, or of all there are, of one replicate."""
        batches = islice(self.lab.loaders("recalibrate").train, -(-ENOUGH_SAMPLES // self.recipe.batch_size))
        if not self.recipe.in_memory:
            return batches
        return [(inputs[row], targets[row]) for inputs, targets in batches]

    def _train(self, options: Any, stage: str, draws: int, work: Callable[[Trainer], object]) -> None:
        def tell(record: EpochRecord) -> None:  # without an answer: True would end the stage
            self.epoch(len(self.replicates))

        loaders = self.place.loaders(self.replicates, f"{stage} {draws}")
        given = replace(
            options,
            device=self.place.device,
            seed=self._seed("draws", stage, self.replicates[0], draws),
            progress=False,
            callback=tell,
        )
        history, setting = History(self.recipe.teachers), self.place.setting
        with trainer_for(given, setting, loaders.train, None, history, self.place.processes, {}, None) as trainer:
            work(trainer)

    @property
    def _cuda(self) -> list[torch.device]:
        return [self.place.device] if self.place.device.type == "cuda" else []

    def _seed(self, *path: int | str) -> int:
        return seed_for(self.place.seed, "ablations", *path)

"""Ablations of recipes over loaders: networks train one after another, by the stages of :func:`fastmerge.merge`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import nn

from benchmarks.ablation_stages import TEACHERS, Ablation
from benchmarks.ablation_variants import Variant
from fastmerge.data.loading import ImageLoaders
from fastmerge.evaluation import evaluate
from fastmerge.history import EpochRecord, History
from fastmerge.merging.plan import MergePlan
from fastmerge.merging.stages import finetune, learn_importance
from fastmerge.merging.trainer import Trainer
from fastmerge.recalibration import ENOUGH_SAMPLES
from fastmerge.training.loader_networks import merge_numbers, trainer_of
from fastmerge.training.loader_place import Place
from fastmerge.training.loader_recipe import LoaderRecipe
from fastmerge.training.loader_teachers import train_teachers


class LoaderAblation(Ablation):
    """One replicate of a recipe over loaders.

    Its teachers are those that ``fastmerge run`` trains with the same seed: from checkpoints in the place they are read,
    or gone on with.

    Args:
        recipe: with the epochs of the run.
        place: where the networks are trained.
        replicate: its number.
        epoch: as :class:`Ablation`'s.
    """

    def __init__(self, recipe: LoaderRecipe, place: Place, replicate: int, epoch: Callable[[int], object]) -> None:
        super().__init__([replicate], place.seed, epoch)
        self.recipe, self.place, self.replicate = recipe, place, replicate
        self.loaders = self._loaders("test")
        self.setting = place.setting
        self._cuda = [place.device] if place.device.type == "cuda" else []

    @property
    def lengths(self) -> tuple[int, int, int]:
        return self.recipe.teacher.epochs, self.recipe.merge.epochs, self.recipe.finetune.epochs

    def make_network(self) -> nn.Module:
        return self.recipe.make_network(self.loaders.classes, 1)

    def teachers(self) -> list[nn.Module]:
        def tell(stage: str, record: EpochRecord, index: int) -> None:
            self.epoch(1)

        return train_teachers(self.recipe, self.place, self.replicate, None, tell)[0]

    def merged(self, teachers: Sequence[nn.Module], variant: Variant) -> list[Any]:
        recipe = replace(self.recipe, compact_at=min(variant.compact_at, default=None), **variant.changes)
        plan = MergePlan(**merge_numbers(recipe), milestones=None)
        images, _ = next(iter(self.loaders.val))
        placed = [self.setting.place(copy.deepcopy(teacher)) for teacher in teachers]
        with torch.random.fork_rng(self._cuda):
            torch.manual_seed(self._seed("gates", self.replicate))
            big = self.setting.place(variant.big(*placed, example_inputs=images[:2]))
            torch.manual_seed(self._seed("draws", "merge", self.replicate, variant.draws))
            with self._trainer("merge", variant.draws) as trainer:
                learn_importance(big, plan.fitted(big, trainer.steps), trainer)
        return [big]

    def finetuned(self, students: Sequence[nn.Module], variant: Variant) -> list[nn.Module]:
        plan = MergePlan(**merge_numbers(self.recipe), milestones=None)
        (student,) = map(self.setting.place, students)
        with torch.random.fork_rng(self._cuda), self._trainer("fine-tune", variant.draws) as trainer:
            torch.manual_seed(self._seed("draws", "fine-tune", self.replicate, variant.draws))
            finetune(student, plan, self.recipe.finetune.schedule, trainer)
        return [student]

    def score(self, network: nn.Module) -> float:
        accuracy = evaluate(self.setting.place(network), self.loaders.val, self.setting).accuracy
        assert accuracy is not None  # targets of images are classes
        return accuracy

    def calibration(self, replicate: int) -> Iterable[Any]:
        return islice(self._loaders("recalibrate").train, -(-ENOUGH_SAMPLES // self.recipe.batch_size))

    def _loaders(self, stage: str, draws: int = 0) -> ImageLoaders:
        return self.place.loaders(self.recipe, "ablations", stage, self.replicate, draws)

    @contextmanager
    def _trainer(self, stage: str, draws: int) -> Iterator[Trainer]:
        loaders, history = self._loaders(stage, draws), History(TEACHERS)
        with trainer_of(
            self.recipe, self.place, loaders, history, stage, note=lambda record: self.epoch(1), validate=False
        ) as trainer:
            yield trainer

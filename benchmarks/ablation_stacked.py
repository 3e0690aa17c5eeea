"""Ablations of recipes whose data is in memory: replicates train as one stack."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from benchmarks.ablation_stages import TEACHERS, Ablation
from benchmarks.ablation_variants import Variant
from fastmerge.data.dataset import Dataset
from fastmerge.gate_budget import GateBudget
from fastmerge.recalibration import ENOUGH_SAMPLES
from fastmerge.schedules import QuadraticLambda
from fastmerge.training.recipe import Recipe
from fastmerge.training.scores import score
from fastmerge.training.seeds import generator_for
from fastmerge.training.stack import Stack
from fastmerge.training.stacked import train
from fastmerge.training.stage import Stage


class StackedAblation(Ablation):
    """Replicates of a recipe in memory, trained together.

    Args:
        recipe: with the epochs of the run.
        data: where the networks are trained.
        replicates, seed, epoch: as :class:`Ablation`'s.
    """

    def __init__(
        self, recipe: Recipe, data: Dataset, replicates: Sequence[int], seed: int, epoch: Callable[[int], object]
    ) -> None:
        super().__init__(replicates, seed, epoch)
        self.recipe, self.data = recipe, data

    @property
    def lengths(self) -> tuple[int, int, int]:
        stages = self.recipe.teacher_stage(), self.recipe.merge_stage(), self.recipe.finetune_stage()
        teacher, merge, finetune = (stage.epochs for stage in stages)
        return teacher, merge, finetune

    def make_network(self) -> nn.Module:
        return self.recipe.make_network(1)

    def teachers(self) -> list[nn.Module]:
        networks = []
        for replicate in self.replicates:
            for number in range(TEACHERS):
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(self._seed("weights", replicate, number))
                    networks.append(self.recipe.make_network(1))
        stack = Stack(networks)
        self._train(stack, self.recipe.teacher_stage(), "teachers", self.replicates)
        return stack.networks()

    def merged(self, teachers: Sequence[nn.Module], variant: Variant) -> list[Any]:
        recipe = replace(self.recipe, **variant.changes)
        example = self.data.normalise(self.data.train_inputs[:2])
        bigs: list[Any] = []
        for position, replicate in enumerate(self.replicates):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed("gates", replicate))
                pair = teachers[TEACHERS * position : TEACHERS * (position + 1)]
                bigs.append(variant.big(*pair, example_inputs=example))
        stage, unit = recipe.merge_stage(), recipe.unit
        link_from = round(recipe.link_at * unit)
        cuts = {round(at * unit) for at in variant.compact_at}
        gates = {f"gates.{name}" for name, _ in bigs[0].gates.named_parameters()}
        parts = [(self.replicates, bigs, _weight_of_gates(recipe, self.data))]
        for start, end in pairwise(sorted({0, link_from, *cuts, unit})):
            if start == link_from:
                for big in bigs:
                    big.link()
            if start in cuts:  # from here on the replicates are of different sizes
                for big in bigs:
                    big.compact()
                single = [(r, b, copy.deepcopy(lam)) for rs, bs, lam in parts for r, b in zip(rs, bs, strict=True)]
                parts = [([replicate], [big], lam) for replicate, big, lam in single]
            rest = tuple(milestone - start for milestone in stage.milestones)
            # Until something is cut, all variants read the data in one order.
            name = f"merge {int(start >= link_from)}" + (f" from {start}" if start in cuts else "")
            segment = replace(stage, epochs=end - start, milestones=rest)
            for index, (replicates, together, lam) in enumerate(parts):
                stack = Stack(together)
                self._train(stack, segment, name, replicates, variant.draws, lam, gates)
                parts[index] = (replicates, stack.networks(), lam)
            bigs = [big for _, together, _ in parts for big in together]
        return bigs

    def finetuned(self, students: Sequence[nn.Module], variant: Variant) -> list[nn.Module]:
        stack = Stack(students)
        self._train(stack, self.recipe.finetune_stage(), "fine-tune", self.replicates, variant.draws)
        return stack.networks()

    def score(self, network: nn.Module) -> float:
        return float(score(Stack([network]), self.data, self.recipe.criterion)[self.recipe.metric])

    def calibration(self, replicate: int) -> Iterable[Any]:
        inputs = self.data.train_inputs[:ENOUGH_SAMPLES].split(self.recipe.batch_size)
        return map(self.data.normalise, inputs)

    def _train(
        self,
        stack: Stack,
        stage: Stage,
        name: str,
        replicates: Sequence[int],
        draws: int = 0,
        lam: QuadraticLambda | GateBudget | None = None,
        gates: Collection[str] = (),
    ) -> None:
        each, path = len(stack) // len(replicates), (name, draws) if draws else (name,)
        orders = [
            generator_for(self.seed, "ablations", "order", *path, replicate, number)
            for replicate in replicates
            for number in range(each)
        ]
        noise = generator_for(self.seed, "ablations", "noise", *path, replicates[0], device=stack.device)
        torch.manual_seed(self._seed("draws", *path, replicates[0]))
        for _ in train(stack, self.data, stage, orders, noise, lam, gates):
            self.epoch(len(stack))


def _weight_of_gates(recipe: Recipe, data: Dataset) -> QuadraticLambda | GateBudget:
    if recipe.gate_schedule == "quadratic":
        return QuadraticLambda(recipe.lam_start, recipe.lam_step)
    steps = recipe.merge_steps(len(data.train_inputs))
    return GateBudget(steps, gate_lr=recipe.merge_stage().gate_lr, momentum=recipe.momentum)

"""Strategies at equal epochs, or at equal cost: each is one function, of a lab and the teachers that it starts from.

`student`, `paper`, `bo3`, `one` and their like have equal epochs. All others have equal cost: what they make of the teachers is
fine-tuned for as long as brings their counted operations to those of `one` and `bo3`; ensembles are what they are.

To add one, write a function here, or in a module that is imported before the run, and decorate it:

    @strategy("on", teachers=1)
    def on(lab, teachers):
        \"\"\"The first teacher, trained on.\"\"\"
        return lab.finetuned(teachers[0], "on")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from torch.optim.lr_scheduler import CosineAnnealingLR

from fastmerge.experiments.column import Column
from fastmerge.experiments.lab import Lab, lengths
from fastmerge.experiments.recipes import Recipe
from fastmerge.methods.average import mean_of
from fastmerge.methods.distill import DISTILL
from fastmerge.schedules import scaled_lam_step

Work = Callable[[Lab, Sequence[Column]], Column]


@dataclass(frozen=True)
class Strategy:
    """A way to spend the epochs of a recipe.

    Attributes:
        name: as on the command line.
        run: does it, for the replicates of a lab; given so many teachers, a column each.
        teachers: how many of the run's teachers, which strategies share, it starts from.
        classifies: whether networks must be classifiers.
    """

    name: str
    run: Work
    teachers: Callable[[Recipe], int]
    classifies: bool = False


STRATEGIES: dict[str, Strategy] = {}


def strategy(
    name: str, teachers: int | Callable[[Recipe], int] | None = None, classifies: bool = False
) -> Callable[[Work], Work]:
    """Registers a function as a strategy.

    Args:
        name: as on the command line.
        teachers: how many it starts from, or a function of the recipe that says so; None is the recipe's own number.
        classifies: whether networks must be classifiers.
    """

    def count(recipe: Recipe) -> int:
        if teachers is None:
            return recipe.teachers
        return teachers if isinstance(teachers, int) else teachers(recipe)

    def register(run: Work) -> Work:
        STRATEGIES[name] = Strategy(name, run, count, classifies)
        return run

    return register


@strategy("student")
def student(lab: Lab, teachers: Sequence[Column]) -> Column:
    """Merges the teachers."""
    return lab.merge(teachers)


@strategy("bo3", teachers=lambda recipe: 3 if recipe.best_of == recipe.teacher else 0)
def best_of_three(lab: Lab, teachers: Sequence[Column]) -> Column:
    """Three networks, of which the best on held-out training data counts; the teachers, where these train as long."""
    return lab.best(teachers or _three(lab, "bo3", 1))


@strategy("one", teachers=0)
def one(lab: Lab, teachers: Sequence[Column]) -> Column:
    """One network for all epochs; it begins as the first teacher does."""
    return lab.train(lab.fresh(), lab.recipe.long, "one")


@strategy("bo3-big", teachers=0)
def best_of_three_big(lab: Lab, teachers: Sequence[Column]) -> Column:
    """The best of three networks of double width."""
    return lab.best(_three(lab, "bo3-big", 2))


@strategy("one-big", teachers=0)
def one_big(lab: Lab, teachers: Sequence[Column]) -> Column:
    """One network of double width for all epochs."""
    return lab.train(lab.fresh(width=2), lab.recipe.long, "one-big")


def _three(lab: Lab, stage: str, width: int) -> list[Column]:
    return [lab.train(lab.fresh(number, width), lab.recipe.best_of, stage, number) for number in range(3)]


@strategy("paper")
def paper(lab: Lab, teachers: Sequence[Column]) -> Column:
    """Merges the teachers as the paper does, whatever the recipe's own options are."""
    return lab.merge(teachers, "paper", **vars(lab.recipe.varied(paper=True).merge))


def short(recipe: Recipe, part: float = 1 / 3) -> dict[str, Any]:
    """Options of a merge stage that is a part of the recipe's, linked after a quarter; λ ends where the recipe's does."""
    whole = recipe.merge
    plan = whole.merge_plan.scaled(part)
    step = whole.lam_step
    if step is not None:
        step = scaled_lam_step(whole.lam_start, step, whole.merge_epochs, plan.epochs)
    return {
        "merge_epochs": plan.epochs,
        "merge_milestones": tuple(plan.milestones) or None,
        "lam_step": step,
        "link_at": 0.25,
    }


@strategy("ours", classifies=True)
def ours(lab: Lab, teachers: Sequence[Column]) -> Column:
    """Merges the teachers at equal cost: a short merge stage, and fine-tuning in which the student learns from them, too."""
    return lab.merge_for(teachers, "ours", **short(lab.recipe), distill=DISTILL)


@strategy("ours-plain")
def ours_without_distillation(lab: Lab, teachers: Sequence[Column]) -> Column:
    """The same without learning from the teachers."""
    return lab.merge_for(teachers, "ours-plain", **short(lab.recipe), distill=0.0)


def short_teachers(lab: Lab, count: int) -> list[Column]:
    """So many teachers that share the epochs of the recipe's: the more they are, the shorter each trains."""
    plan = lab.recipe.teacher.scaled(lab.recipe.teachers / count)
    return [lab.train(lab.fresh(number), plan, f"{lab.name}, teacher", number) for number in range(count)]


def merged_at_once(lab: Lab, count: int) -> Column:
    """Ours, of so many short teachers, in a merge stage that is shorter the more it costs."""
    two, many = ((apart + 3 * linked) / 4 for apart, linked in map(lab.costs, (2, count)))
    stage = short(lab.recipe, two / many / 3)
    return lab.merge_for(short_teachers(lab, count), f"ours-{count}", **stage, distill=DISTILL)


def merged_by_pairs(lab: Lab, count: int) -> Column:
    """Ours, of so many short teachers, a power of two: pairs are merged, and pairs of these, until one is left.

    All merge stages together are as long as the one of two teachers. Of what is left for fine-tuning, the last student gets
    half, and those before it share the other half.
    """
    columns, name, merges = short_teachers(lab, count), f"recursive-{count}", count - 1
    options = {**short(lab.recipe, 1 / 3 / merges), "distill": DISTILL}
    spent = sum(column.cost for column in columns) + merges * lab.merging_cost(2, **options)
    whole = lab.recipe.merge.finetune_plan
    plan = whole.scaled(lab.left(spent, 2, merges) / 2 / (merges - 1) / whole.epochs)
    while len(columns) > 2:
        stage, pairs = f"{name}-{len(columns)}", zip(columns[::2], columns[1::2], strict=True)
        columns = [lab.merge(pair, stage, number, **options, **lengths(plan)) for number, pair in enumerate(pairs)]
    return lab.merge_for(columns, name, **options)


def _of_many(name: str, work: Callable[[Lab, int], Column], count: int) -> None:
    @strategy(name, teachers=0, classifies=True)
    def merged(lab: Lab, teachers: Sequence[Column]) -> Column:
        return work(lab, count)


for _count in (3, 4, 8):
    _of_many(f"ours-{_count}", merged_at_once, _count)
for _count in (4, 8):
    _of_many(f"recursive-{_count}", merged_by_pairs, _count)


@strategy("one-cosine", teachers=0)
def one_cosine(lab: Lab, teachers: Sequence[Column]) -> Column:
    """One network for all epochs, with a cosine, and the weight decay that is the best for held-out data.

    It is the best of three in the mean over the replicates; the cost is that of one training.
    """
    long = lab.recipe.long
    cosine = partial(CosineAnnealingLR, T_max=long.epochs)
    columns = [
        lab.train(lab.fresh(), long, f"one-cosine {decay:g}", schedule=cosine, weight_decay=decay)
        for decay in (lab.recipe.merge.weight_decay, 5e-4, 2e-3)
    ]
    means = [fmean(rank for rank, _ in lab.ranks(column)) for column in columns]
    return columns[means.index(min(means))]


@strategy("restart")
def restart(lab: Lab, teachers: Sequence[Column]) -> Column:
    """The teacher that is the best for held-out data, trained on from the full learning rate."""
    return lab.finetuned(lab.best(teachers), "restart")


@strategy("cyclic-swa", teachers=1)
def cyclic_swa(lab: Lab, teachers: Sequence[Column]) -> Column:
    """One network in four cycles of the learning rate, and the mean of its weights at their ends, for the same cost.

    Source: P. Izmailov et al., Averaging weights leads to wider optima (arXiv 1803.05407).
    """
    left = lab.recipe.epochs - teachers[0].epochs
    whole = lab.recipe.merge.finetune_plan
    lengths = [left * (n + 1) // 4 - left * n // 4 for n in range(4)]
    last, ends = teachers[0], list[Column]()
    for number, length in enumerate(lengths):
        last = lab.train(last.networks, whole.scaled(length / whole.epochs), "cycle", number, [last])
        ends.append(last)
    if any(network is None for network in last.networks):  # where a cycle diverged there is no mean
        return last
    networks = [mean_of(each) for each in zip(*(end.networks for end in ends), strict=True)]
    return lab.scored(lab.recalibrated(networks), [last])


@strategy("distill", classifies=True)
def distilled(lab: Lab, teachers: Sequence[Column]) -> Column:
    """The first teacher learns what all say."""
    start = lab.scored(teachers[0].networks, teachers)
    return lab.finetuned(start, "distill", teachers)


@strategy("distill-fresh", classifies=True)
def distilled_afresh(lab: Lab, teachers: Sequence[Column]) -> Column:
    """A fresh network learns what the teachers say."""
    start = lab.scored(lab.fresh(len(teachers)), teachers)
    return lab.finetuned(start, "distill-fresh", teachers)


@strategy("ensemble")
def ensemble(lab: Lab, teachers: Sequence[Column]) -> Column:
    """The teachers side by side: not one network, but the ceiling for those made of them."""
    return lab.apply("ensemble", teachers)


@strategy("ensemble-3", teachers=3)
def ensemble_of_three(lab: Lab, teachers: Sequence[Column]) -> Column:
    """Three networks side by side."""
    return lab.apply("ensemble", teachers)


def _by(method: str) -> None:
    @strategy(method)
    def then_finetuned(lab: Lab, teachers: Sequence[Column]) -> Column:
        return lab.finetuned(lab.apply(method, teachers), method)

    @strategy(f"{method}-distill", classifies=True)
    def then_taught(lab: Lab, teachers: Sequence[Column]) -> Column:
        return lab.finetuned(lab.apply(method, teachers), f"{method}-distill", teachers)


for _method in ("average", "rebasin", "repair", "zipit", "transplant", "reconstruct"):
    _by(_method)

"""Strategies at equal epochs: each is one function, of a lab and the teachers that it starts from.

To add one, write a function here, or in a module that is imported before the run, and decorate it:

    @strategy("restart", teachers=1)
    def restart(lab, teachers):
        \"\"\"The first teacher, trained on.\"\"\"
        return lab.train(teachers[0].networks, plan, "restart", after=teachers)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastmerge.experiments.lab import Column, Lab
from fastmerge.experiments.recipe import Recipe

Work = Callable[[Lab, Sequence[Column]], Column]


@dataclass(frozen=True)
class Strategy:
    """A way to spend the epochs of a recipe.

    Attributes:
        name: as on the command line.
        run: does it, for the replicates of a lab; given so many teachers, a column each.
        teachers: how many of the run's teachers, which strategies share, it starts from.
    """

    name: str
    run: Work
    teachers: Callable[[Recipe], int]


STRATEGIES: dict[str, Strategy] = {}


def strategy(name: str, teachers: int | Callable[[Recipe], int] | None = None) -> Callable[[Work], Work]:
    """Registers a function as a strategy.

    Args:
        name: as on the command line.
        teachers: how many it starts from, or a function of the recipe that says so; None is the recipe's own number.
    """

    def count(recipe: Recipe) -> int:
        if teachers is None:
            return recipe.teachers
        return teachers if isinstance(teachers, int) else teachers(recipe)

    def register(run: Work) -> Work:
        STRATEGIES[name] = Strategy(name, run, count)
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

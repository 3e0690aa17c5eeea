"""Why networks can't be merged: where, what, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One reason why networks can't be merged.

    Attributes:
        what: what is needed and what came, naming the layer.
        remedy: what to do; empty where there is nothing but another network.
        where: path of the module or tensor; empty for a network as a whole.
        code: ``file:line`` of the user's code, where known; messages name it.
    """

    what: str
    remedy: str = ""
    where: str = ""
    code: str = ""

    def __str__(self) -> str:
        what = f"{self.what} ({self.code})" if self.code else self.what
        if not self.remedy:
            return what
        return f"{what}; {self.remedy}" if self.remedy[0].islower() else f"{what}. {self.remedy}"


class UnmergeableError(ValueError):
    """Networks can't be merged, for one reason or several; the message is the first one's.

    Args:
        problems: the reasons, at least one.
    """

    def __init__(self, *problems: Problem) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return str(self.problems[0])


class WrongTeacherError(UnmergeableError, TypeError):
    """What was passed as a teacher is of the wrong type."""

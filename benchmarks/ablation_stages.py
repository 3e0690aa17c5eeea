"""The stages of a merge that ablations go through, whatever trains them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from benchmarks.ablation_variants import Variant
from fastmerge.training.seeds import seed_for

TEACHERS = 2


class Ablation(ABC):
    """The stages for some replicates, each from the same seeds whatever the variant.

    Args:
        replicates: their numbers.
        seed: of the run.
        epoch: called after every epoch with how many networks were trained in it.
    """

    def __init__(self, replicates: Sequence[int], seed: int, epoch: Callable[[int], object]) -> None:
        self.replicates, self.seed, self.epoch = replicates, seed, epoch

    @property
    @abstractmethod
    def lengths(self) -> tuple[int, int, int]:
        """Epochs of a teacher, of the merge stage, and of fine-tuning."""

    @abstractmethod
    def make_network(self) -> nn.Module:
        """A network of the teachers' architecture."""

    @abstractmethod
    def teachers(self) -> list[nn.Module]:
        """Two trained networks for each replicate, one after another."""

    @abstractmethod
    def merged(self, teachers: Sequence[nn.Module], variant: Variant) -> list[Any]:
        """The big students at the end of their stage, one per replicate."""

    @abstractmethod
    def finetuned(self, students: Sequence[nn.Module], variant: Variant) -> list[nn.Module]:
        """The students after fine-tuning; those given may be changed."""

    @abstractmethod
    def score(self, network: nn.Module) -> float:
        """The recipe's metric on the test data."""

    @abstractmethod
    def calibration(self, replicate: int) -> Iterable[Any]:
        """Batches of at least ENOUGH_SAMPLES training samples, or of all there are."""

    def compressed(self, bigs: Sequence[Any], variant: Variant) -> list[nn.Module]:
        """The students before fine-tuning."""
        students = []
        for replicate, big in zip(self.replicates, bigs, strict=True):
            student: nn.Module = big.compress()
            if variant.edit is not None:
                variant.edit(student, big, self.calibration(replicate))
            students.append(student)
        return students

    def _seed(self, *path: int | str) -> int:
        return seed_for(self.seed, "ablations", *path)

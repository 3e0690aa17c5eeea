"""What happened in a merge, epoch by epoch and at the borders of its stages."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

Stage = Literal["merge", "finetune"]


@dataclass(frozen=True)
class Score:
    """Mean of the criterion over a data set, accuracy in 0..1, None where the targets are no classes, and other metrics.

    Of a stack of networks, a list with one for each; so are the other figures of a history.
    """

    loss: Any
    accuracy: Any = None
    metrics: dict[str, float] | None = None


@dataclass(frozen=True)
class EpochRecord:
    """What was recorded of one epoch.

    Attributes:
        stage: "merge" (the big student) or "finetune" (the student).
        epoch: Counts from 1 in each stage.
        train: Criterion and accuracy over the epoch's batches, in training mode, as it went.
        val: The same on the validation data after the epoch, in eval mode; None without validation data, and where
            the epoch was not scored.
        lr: Learning rate of the weights in this epoch.
        lam: λ in this epoch; None with a budget. In fine-tuning it and the next three are None.
        gate_loss: Mean gate loss, without λ.
        open_probability: Mean P[g > 0] of each channel group after the epoch.
        linked: Whether the big student was dense in this epoch.
        images_per_second: Training samples per second, evaluation left out.
        operations: Of a forward and backward pass per sample, where they were counted.
    """

    stage: Stage
    epoch: int
    train: Score
    val: Score | None
    lr: float
    images_per_second: float
    lam: float | None = None
    gate_loss: Any = None
    open_probability: dict[str, Any] | None = None
    linked: bool | None = None
    operations: float | None = None


@dataclass
class History:
    """The record of a merge.

    Attributes:
        num_teachers: T.
        epochs: One record per epoch, the merge stage's first.
        borders: Scores on the validation data by name: ``teacher 0`` and so on, ``big student, gates open`` (the mean
            of the teachers' outputs), ``big student`` (at the end of its stage), ``compressed`` (before fine-tuning),
            ``student``. Empty without validation data.
        kept: For each channel group how many of the kept channels came from each teacher, T numbers.
        warnings: What the merge warned of.
        compactions: What was dropped early, after which epoch of the merge stage: per group how many channels were
            ``dropped`` and how many are ``left``, and which groups were left ``whole`` and why.
    """

    num_teachers: int
    epochs: list[EpochRecord] = field(default_factory=list)
    borders: dict[str, Score] = field(default_factory=dict)
    kept: Any = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    compactions: list[dict[str, Any]] = field(default_factory=list)

    def stage(self, stage: Stage) -> list[EpochRecord]:
        """The records of one stage."""
        return [record for record in self.epochs if record.stage == stage]

    def to_dict(self) -> dict[str, Any]:
        """The whole record as JSON values, with ``curves``, ``stages`` and ``gates`` as the plots read them."""
        return self.record() | self._plotted()

    def record(self) -> dict[str, Any]:
        """The record alone as JSON values."""
        return dataclasses.asdict(self)

    def parts(self, count: int) -> list[History]:
        """The histories of each network of a stack of so many."""
        return [_part_of(self, index) for index in range(count)]

    def restore(self, record: dict[str, Any]) -> None:
        """Becomes what a :meth:`record` tells."""
        self.num_teachers = record["num_teachers"]
        self.epochs = [
            EpochRecord(**epoch | {name: epoch[name] and Score(**epoch[name]) for name in ("train", "val")})
            for epoch in record["epochs"]
        ]
        self.borders = {name: Score(**score) for name, score in record["borders"].items()}
        self.kept, self.warnings = record["kept"], record["warnings"]
        self.compactions = record["compactions"]

    def _plotted(self) -> dict[str, Any]:
        merge = self.stage("merge")
        curves: dict[str, list[Any]] = {"epochs": list(range(1, len(self.epochs) + 1))}
        curves["train_loss"] = [record.train.loss for record in self.epochs]
        curves["train_accuracy"] = [record.train.accuracy for record in self.epochs]
        curves["val_loss"] = [record.val and record.val.loss for record in self.epochs]
        curves["val_accuracy"] = [record.val and record.val.accuracy for record in self.epochs]
        groups = list(merge[0].open_probability or {}) if merge else []
        gates = {
            "epochs": [record.epoch for record in merge],
            "lam": [record.lam for record in merge],
            "target": 1 / self.num_teachers,
            "open_probability": {name: [(record.open_probability or {})[name] for record in merge] for name in groups},
        }
        known = {key: values for key, values in curves.items() if any(value is not None for value in values)}
        return {
            "curves": {"student": known},
            "stages": {"student": {"merge": 0, "fine-tune": len(merge)}},
            "gates": gates,
        }


def _part_of(history: Any, index: int) -> Any:
    """What one network of a stack has: the entry of every list of figures."""
    if isinstance(history, Score):
        return Score(*(value and value[index] for value in (history.loss, history.accuracy)))
    if isinstance(history, EpochRecord):
        opened = history.open_probability
        return dataclasses.replace(
            history,
            train=_part_of(history.train, index),
            val=history.val and _part_of(history.val, index),
            gate_loss=history.gate_loss and history.gate_loss[index],
            open_probability=opened and {name: values[index] for name, values in opened.items()},
        )
    return dataclasses.replace(
        history,
        epochs=[_part_of(record, index) for record in history.epochs],
        borders={name: _part_of(score, index) for name, score in history.borders.items()},
        kept=history.kept and history.kept[index],
    )


def mean_of(figure: Any) -> float:
    """A figure of a history; of a stack's, the mean over its networks."""
    return fmean(figure) if isinstance(figure, list) else figure

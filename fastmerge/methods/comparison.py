"""Methods beside each other: how good each one's network is at once and after fine-tuning, and what it took."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import shutil
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastmerge.channels.same_code import is_torchs
from fastmerge.checkpoints import (
    fingerprints,
    loader_state,
    random_states,
    restore_loader_state,
    restore_random_states,
)
from fastmerge.evaluation import Criterion, Setting, evaluate
from fastmerge.history import Score
from fastmerge.merging.checks import check_criterion, check_device, check_loader, check_metrics, listed_teachers
from fastmerge.merging.options import Options, plain
from fastmerge.methods.cost import Meter
from fastmerge.methods.distill import train
from fastmerge.methods.registry import METHODS, apply, checked
from fastmerge.reporting.results import write_json
from fastmerge.stack import load_tensors, tensors_of
from fastmerge.validation import check_teachers


@dataclass(frozen=True)
class Row:
    """One network of a comparison.

    Attributes:
        name: of the method, or "teacher 0" and so on; "teacher 0, trained on" is what all others have to beat: the teacher that
            scores best, trained on alone for the cost of the dearest method.
        at_once: its score before fine-tuning.
        tuned: after it; None for what is not fine-tuned.
        epochs: of training, fine-tuning included; the teachers' own not.
        cost: counted operations in epochs of training one teacher, fine-tuning included.
        memory: bytes at the method's peak beyond those in use before; None where unknown.
        seconds: of the method and of fine-tuning; of one that was stopped, those since it went on.
        error: what went wrong, if anything did; then the scores are None.
        warnings: what the method and fine-tuning warned of, each once.
    """

    name: str
    at_once: Score | None = None
    tuned: Score | None = None
    epochs: float = 0.0
    cost: float = 0.0
    memory: int | None = None
    seconds: float = 0.0
    error: str = ""
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        """The row of :meth:`to_dict`, whose NaN and Inf JSON has as null."""
        scores = {key: values[key] and {"loss": math.nan, **_known(values[key])} for key in ("at_once", "tuned")}
        read = {key: score and Score(**score) for key, score in scores.items()}
        return cls(**{**values, **read, "warnings": tuple(values.get("warnings", ()))})


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


class _Kept:
    """What is finished of a comparison, in its directory, for one that goes on. Rows that ended in an error are made again.

    Args:
        directory: of checkpoints; None keeps nothing.
        resume: whether it goes on.
        same: what it has to have in common with the one that was begun, JSON values.

    Raises:
        ValueError: there is a comparison, and it is not to go on, is another one, or can't be read.
    """

    def __init__(self, directory: Path | None, resume: bool, same: dict[str, Any]) -> None:
        self.directory, self.same = directory, same
        self.rows: dict[str, Row] = {}
        self.finished: set[str] = set()
        file = None if directory is None else directory / "rows.json"
        if file is None or not file.exists():
            return
        if not resume:
            raise ValueError(
                f"{directory} holds the checkpoints of a comparison; continue it (resume=True), remove them, or choose "
                "another directory"
            )
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            before, finished = dict(found["same"]), set(found["finished"])
            rows = {row["name"]: Row.from_dict(row) for row in found["rows"]}
            if unknown := finished - rows.keys():
                raise ValueError(f"it lacks {', '.join(sorted(unknown))}")
            self.rows = {name: row for name, row in rows.items() if not row.error}
            self.finished = finished & self.rows.keys()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file} is damaged, or of another version of fastmerge ({error}); remove {directory} to begin anew"
            ) from error
        if changed := [name for name in {**same, **before} if same.get(name) != before.get(name)]:
            raise ValueError(
                f"{directory} holds a comparison with other {', '.join(changed)}; choose another directory"
            )

    def of(self, name: str) -> Path:
        """The directory of a row."""
        assert self.directory is not None
        return self.directory / name

    def begun(self, name: str, like: nn.Module) -> tuple[Row, nn.Module] | None:
        """A row that is not fine-tuned yet, and what its method made; None where it is to be made, with a warning if again."""
        if name not in self.rows:
            return None
        network = copy.deepcopy(like)
        try:
            _fill(network, self.of(name) / "network.safetensors")
        except (OSError, ValueError) as error:
            warnings.warn(f"{error}; {name} makes its network again", stacklevel=3)
            for stage in self.of(name).glob("finetune*"):
                shutil.rmtree(stage, ignore_errors=True)
            return None
        return self.rows[name], network

    def begin(self, row: Row, network: nn.Module) -> None:
        """Keeps a row and its network, which is to be fine-tuned."""
        if self.directory is not None:
            from fastmerge.weights import save_weights

            save_weights(tensors_of(network), self.of(row.name) / "network.safetensors")
        self._write(row)

    def finish(self, row: Row) -> None:
        """Keeps a row that is finished."""
        self.finished.add(row.name)
        self._write(row)
        if self.directory is not None:
            shutil.rmtree(self.of(row.name), ignore_errors=True)

    def _write(self, row: Row) -> None:
        self.rows[row.name] = row
        if self.directory is not None:
            rows = [each.to_dict() for each in self.rows.values()]
            found = {"same": self.same, "rows": rows, "finished": sorted(self.finished)}
            write_json(self.directory / "rows.json", found)


def compare(
    teachers: Sequence[nn.Module],
    train_loader: Iterable[Any],
    val_loader: Iterable[Any],
    methods: Sequence[str],
    *,
    finetune_epochs: int = 50,
    epochs: int | None = None,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    warmup: int = 0,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    criterion: Criterion = cross_entropy,
    metrics: Mapping[str, Any] | None = None,
    seed: int = 0,
    baseline: bool = True,
    callback: Callable[[Row, nn.Module | None], object] | None = None,
    progress: bool | None = False,
    checkpoint_dir: Path | str | None = None,
    checkpoint_seconds: float = 300.0,
    resume: bool = False,
) -> list[Row]:
    """Runs methods on the same teachers, fine-tunes each network in the same way, and scores all.

    Args:
        teachers: two or more trained networks of one architecture, on the device to work on.
        train_loader: (input, target) batches to merge and train with.
        val_loader: to score on.
        methods: names, of :data:`~fastmerge.methods.METHODS`.
        finetune_epochs: that each network is trained for afterwards.
        epochs: of the methods that train; None: of each as many as it has by default.
        lr: learning rate of all training.
        momentum: of all training.
        weight_decay: of all training.
        warmup: epochs of fine-tuning in which the learning rate rises to its value; ``reconstruct`` may need some.
        options: further options, by name of the method.
        criterion: of the output and the target.
        metrics: what else to score, by name, as :func:`fastmerge.merge`'s; they stand in ``row.tuned.metrics``.
        seed: each method and each fine-tuning begins with the same random numbers, and reads the training data in the same
            order.
        baseline: whether to train the teacher that scores best on alone, too, for as many epochs as the dearest of the methods
            cost. It is chosen by ``val_loader``, which can only flatter it.
        callback: called with each row when it is known, and its network: the fine-tuned one, where there is one, and None where
            the row was known before.
        progress: whether training shows a bar; None on a terminal.
        checkpoint_dir: a directory for checkpoints and finished rows; None keeps none.
        checkpoint_seconds: least seconds between two checkpoints.
        resume: whether to go on from what is there. Rows that were finished are not made again. Those that ended in an error
            are, and so is the baseline where the dearest method now costs another number of epochs.

    Returns:
        A row for each teacher, one for each method, and one for the baseline. A method or fine-tuning that fails has its error
        there.

    Raises:
        ValueError, TypeError: there is no such method or option, a method stands twice, there are fewer than two teachers, they
            or the criterion can't work with the data, or the directory holds another comparison; before anything is run.
        RuntimeError: a method changed a teacher, which all others work on.
        Interrupted: a KeyboardInterrupt: Ctrl-C or SIGTERM came while a network trained, and a checkpoint was written.
    """
    teachers = listed_teachers(teachers)
    check_teachers(teachers)
    if isinstance(methods, str):
        raise ValueError(f"methods: a list of names; got {methods!r}")
    if epochs is not None and (not isinstance(epochs, int) or epochs < 1):
        raise ValueError(f"epochs of the methods that train: a whole number of at least 1, or None; got {epochs}")
    if len(set(methods)) < len(methods):
        raise ValueError(f"methods: each one once; got {', '.join(methods)}")
    if unknown := set(options or ()) - set(methods):
        raise ValueError(f"options are for the methods that are compared; got some for {', '.join(sorted(unknown))}")
    Options(
        finetune_epochs=finetune_epochs, finetune_lr=lr, momentum=momentum, weight_decay=weight_decay, warmup=warmup
    )
    given = {name: dict((options or {}).get(name, {})) for name in methods}
    length = {} if epochs is None else {"epochs": epochs}
    common: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "criterion": criterion}
    for name, own in given.items():
        known = checked(name, own).options
        given[name] = {key: value for key, value in (length | common).items() if key in known} | own
    check_criterion(criterion)
    setting = Setting(check_device(None, teachers[0]), criterion)
    check_loader("train_loader", train_loader, teachers[0], setting, trained=True)
    check_loader("val_loader", val_loader, teachers[0], setting)
    check_metrics(metrics, val_loader)
    same: dict[str, Any] = {name: plain(value) for name, value in common.items()} | {
        "finetune_epochs": finetune_epochs,
        "epochs": epochs,
        "warmup": warmup,
        "seed": seed,
        "baseline": baseline,
        "methods": [*methods],
        "metrics": sorted(metrics) if metrics else None,
        "options": {
            name: {key: plain(own[key]) for key in own if key != "how"} for name, own in (options or {}).items()
        },
    }
    same |= fingerprints(teachers)
    kept = _Kept(None if checkpoint_dir is None else Path(checkpoint_dir), resume, same)
    how = {"progress": progress, "checkpoint_seconds": checkpoint_seconds}
    run = _Comparison(teachers, train_loader, val_loader, setting, metrics, seed, common, warmup, how, kept, callback)
    for number, teacher in enumerate(teachers):
        name = f"teacher {number}"
        if not run.has(name):
            run.add(Row(name, run.score(teacher)), teacher)
    for name, own in given.items():
        if not run.has(name):
            run.add(*run.made(name, own), finetune_epochs if METHODS[name].one_network else 0)
    best = min(range(len(teachers)), key=lambda number: _badness(run.rows[number].at_once))
    name = f"teacher {best}, trained on"
    dearest = max((row.cost for row in run.rows if row.name in METHODS), default=0.0)
    longest = max(finetune_epochs, round(dearest))
    if baseline and not run.has(name, longest):
        run.add(Row(name, run.rows[best].at_once), teachers[best], longest)
    return run.rows


class _Comparison:
    """Networks that are made, trained and scored alike, one row after another.

    Args:
        teachers, train_loader, val_loader, metrics, seed, warmup, callback: as :func:`compare`'s.
        setting: where networks are scored, and by which criterion.
        common: options of all training.
        how: options of all training that do not change what comes out.
        kept: what was finished before, and where more is kept.

    Attributes:
        rows: those that are known.
    """

    def __init__(
        self,
        teachers: Sequence[nn.Module],
        train_loader: Iterable[Any],
        val_loader: Iterable[Any],
        setting: Setting,
        metrics: Mapping[str, Any] | None,
        seed: int,
        common: Mapping[str, Any],
        warmup: int,
        how: Mapping[str, Any],
        kept: _Kept,
        callback: Callable[[Row, nn.Module | None], object] | None,
    ) -> None:
        self.teachers, self.train_loader, self.val_loader, self.setting = teachers, train_loader, val_loader, setting
        self.metrics, self.seed, self.common, self.warmup, self.how = metrics, seed, common, warmup, how
        self.kept, self.callback = kept, callback
        self.rows: list[Row] = []
        self._random, self._order = random_states(setting.device), loader_state(train_loader)

    def has(self, name: str, epochs: int | None = None) -> bool:
        """Whether a row was finished before, of so many epochs if they are given; then it is told of."""
        if name not in self.kept.finished:
            return False
        if epochs not in (None, self.kept.rows[name].epochs):
            self.kept.finished.discard(name)
            return False
        self._tell(self.kept.rows[name], None)
        return True

    def score(self, network: nn.Module) -> Score:
        """How good a network is on the validation data."""
        return evaluate(network, self.val_loader, self.setting, metrics=self.metrics)

    def made(self, name: str, options: Mapping[str, Any]) -> tuple[Row, nn.Module | None]:
        """What a method makes, or made before the comparison was stopped; or the row of its error."""
        if (begun := self.kept.begun(name, self.teachers[0])) is not None:
            return begun
        if "how" in METHODS[name].options:
            options = {**options, "how": {**self._how(name, "method"), **(options.get("how") or {})}}
        try:
            with self._alike(), _noted() as warned:
                outcome = apply(name, self.teachers, self.train_loader, **options)
            trained = float(options.get("epochs", METHODS[name].epochs))
            row = Row(name, self.score(outcome.network), None, trained, outcome.cost, warnings=(*warned,))
            row, made = dataclasses.replace(row, memory=outcome.memory, seconds=outcome.seconds), outcome.network
        except Exception as error:  # whatever it is, the others get their rows
            row, made = _failed(name, error), None
        if changed := [key for key, now in fingerprints(self.teachers).items() if now != self.kept.same[key]]:
            raise RuntimeError(
                f"method {name!r} changed {', '.join(changed)}, which all methods work on; let it change copies"
            )
        return row, made

    def add(self, row: Row, network: nn.Module | None, epochs: int = 0) -> None:
        """Fine-tunes a row's network for so many epochs, if there is one, and keeps the row."""
        if network is not None and epochs:
            self.kept.begin(row, network)
            row, network = self._finetuned(row, network, epochs)
        self._tell(row, network)
        self.kept.finish(row)

    def _finetuned(self, row: Row, network: nn.Module, epochs: int) -> tuple[Row, nn.Module | None]:
        started = time.perf_counter()
        try:
            with Meter() as meter, self._alike(), _noted() as warned:
                network = copy.deepcopy(network)
                how = self._how(row.name, f"finetune{epochs}")  # a baseline may come to another length
                train(network, self.train_loader, epochs=epochs, warmup=self.warmup, how=how, **self.common)
            row = dataclasses.replace(
                row,
                tuned=self.score(network),
                epochs=row.epochs + epochs,
                cost=row.cost + meter.epochs(self.teachers[0], self.train_loader),
                seconds=row.seconds + time.perf_counter() - started,
                warnings=(*dict.fromkeys([*row.warnings, *warned]),),
            )
            return row, network
        except Exception as error:
            return _failed(row.name, error), None

    def _tell(self, row: Row, network: nn.Module | None) -> None:
        self.rows.append(row)
        if self.callback is not None:
            self.callback(row, network)

    def _how(self, name: str, stage: str) -> dict[str, Any]:
        if self.kept.directory is None:
            return dict(self.how)
        return {**self.how, "checkpoint_dir": self.kept.of(name) / stage, "resume": True}

    @contextlib.contextmanager
    def _alike(self) -> Iterator[None]:
        """The same random numbers and order of the data for all."""
        before = random_states(self.setting.device)
        restore_random_states(self._random, self.setting.device)
        restore_loader_state(self.train_loader, self._order)
        torch.manual_seed(self.seed)
        try:
            yield
        finally:
            restore_random_states(before, self.setting.device)


@contextlib.contextmanager
def _noted() -> Iterator[dict[str, None]]:
    """Within, what is warned of is shown as ever, and kept, each text once."""
    found: dict[str, None] = {}
    with warnings.catch_warnings():
        show = warnings.showwarning

        def note(message: Warning | str, *more: Any, **options: Any) -> None:
            found[" ".join(str(message).split())] = None
            show(message, *more, **options)

        warnings.showwarning = note
        yield found


def _fill(network: nn.Module, file: Path) -> None:
    """Gives a network the tensors of a file, with those that a state dict leaves out.

    Raises:
        OSError, ValueError: there is no such file, it is damaged, or another network's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error})") from error
    own = tensors_of(network)
    if {name: tensor.shape for name, tensor in own.items()} != {name: tensor.shape for name, tensor in found.items()}:
        raise ValueError(f"{file} holds another network")
    load_tensors(network, found)


def _failed(name: str, error: Exception) -> Row:
    """The row of an error; of one that is no refusal it says the kind, and the innermost line outside PyTorch."""
    said = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, (ValueError, FloatingPointError)):
        *_, line = (f for f in traceback.extract_tb(error.__traceback__) if not is_torchs(f.filename))
        said = f"{type(error).__name__}: {said} ({line.filename}:{line.lineno})"
    return Row(name, error=said)


def _badness(score: Score | None) -> float:
    assert score is not None
    badness: float = score.loss if score.accuracy is None else -score.accuracy
    return math.inf if math.isnan(badness) else badness

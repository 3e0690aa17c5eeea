"""A merge by several processes, each with its share of every batch, in float64 and with gates that draw 0 or 1 for sure."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastmerge import HardConcrete, merge
from fastmerge.checkpoints import Snapshots
from fastmerge.merging import compiling
from teachers import OPEN

BATCH, STEPS, VALIDATION = 12, 4, 11
EPOCHS = {"merge_epochs": 4, "finetune_epochs": 2, "link_at": 0.5}


class Net(nn.Module):
    """No BatchNorm, whose statistics would differ between a batch and its parts."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv, self.hidden, self.head = nn.Conv2d(1, 4, 3), nn.Linear(64, 6), nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.conv(x).relu().flatten(1)).relu())


class Normed(Net):
    """Its running statistics differ between processes until they are shared."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(self.conv, nn.BatchNorm2d(4))


class Wide(nn.Module):
    """BatchNorms of images and of vectors, of enough channels to drop some before linking."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 24, 3), nn.BatchNorm2d(24)
        self.hidden, self.flat, self.head = nn.Linear(24, 24), nn.BatchNorm1d(24, momentum=None), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.head(self.flat(self.hidden(x)).relu())


def coloured(seed: int = 0, num_classes: int = 2) -> nn.Module:
    """A network for coloured images of any size."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(24, num_classes))


def teachers(make: Callable[[], nn.Module] = Net) -> list[nn.Module]:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(make().double())
    return found


def batches(samples: int, size: int, rank: int, parts: int, classes: int = 3) -> list[tuple[Tensor, Tensor]]:
    """A process's share of batches of so many samples."""
    generator = torch.Generator().manual_seed(samples)
    x, y = torch.randn(samples, 1, 6, 6, generator=generator, dtype=torch.float64), torch.arange(samples) % classes
    return [(a[rank::parts], b[rank::parts]) for a, b in zip(x.split(size), y.split(size), strict=True)]


def validation(rank: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """A process's share, which may be smaller than another's, in batches of two and one."""
    ((x, y),) = batches(VALIDATION, VALIDATION, rank, size)
    return list(zip(x.split(2), y.split(2), strict=True))


def fixed_gates(gate: HardConcrete) -> None:
    with torch.no_grad():
        gate.loc.copy_(OPEN * (2 * (torch.arange(gate.channels) % 3 > 0).to(gate.loc) - 1))


def run(rank: int, size: int, directory: Path | None = None, accumulate: int = 1, **options: Any) -> Any:
    """What one process does. Its share of a batch comes in as many parts as make a step."""
    parts = size * accumulate
    train = [
        (x[first::accumulate], y[first::accumulate])
        for x, y in batches(BATCH * STEPS, BATCH, rank, size)
        for first in range(accumulate)
    ]
    assert all(len(x) == BATCH // parts for x, _ in train)
    reset = HardConcrete.reset_parameters
    HardConcrete.reset_parameters = options.pop("reset", fixed_gates)  # type: ignore[method-assign]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "P.g>0.")
            return merge(
                teachers(options.pop("make", Net)),
                options.pop("train", train),
                val_loader=options.pop("val", None) or validation(rank, size),
                accumulate=accumulate,
                checkpoint_dir=directory,
                **{"seed": 3, "progress": False, "lr": 0.05, "resume": directory is not None, **EPOCHS, **options},
            )
    finally:
        HardConcrete.reset_parameters = reset  # type: ignore[method-assign]


# Work for a process; what it returns is pickled.


def merged(rank: int, size: int, *arguments: Any, **options: Any) -> dict[str, Any]:
    student, history = run(rank, size, *arguments, **options)
    return {"student": {k: v.numpy() for k, v in student.state_dict().items()}, "history": history.record()}


def label_sets(rank: int, size: int, one_loader: bool, **options: Any) -> dict[str, Any]:
    """A merge of teachers of three classes and of two, of whose images a process has shares; or all as they come."""
    counts, lengths = (3, 2), (STEPS, STEPS - 1)
    train = [batches(BATCH * n, BATCH, rank, size, k) for n, k in zip(lengths, counts, strict=True)]
    val = [batches(n, n, rank, size, k) for n, k in zip((VALIDATION, 1 if one_loader else 3), counts, strict=True)]
    if one_loader:  # the last process scores no image of the second teacher's
        (x, y), (x_2, y_2) = (its[0] for its in val)
        val = [(torch.cat([x, x_2]), torch.cat([y, y_2 + 3]))]
        train = [(torch.cat([x, z]), torch.cat([y, t + 3])) for (x, y), (z, t) in zip(*train, strict=False)]
    makes = map(Net, counts)
    return merged(rank, size, make=lambda: next(makes), train=train, val=val, heads="concatenate", **options)


def normed(rank: int, size: int) -> dict[str, Any]:
    student, _ = run(rank, size, make=Normed)
    return {name: value.tolist() for name, value in student.state_dict().items()}


def synced(rank: int, size: int, wanted: bool = True, **options: Any) -> dict[str, Any]:
    """A merge with BatchNorm over all processes: block-diagonal, compacted, linked, compacted, fine-tuned."""
    return merged(rank, size, None, 1, make=Wide, sync_batch_norm=wanted, compact_at=0.25, **options)


def compiled(rank: int, size: int) -> dict[str, Any]:
    """The same under torch.compile; what the log says comes along."""
    said: list[str] = []
    compiling.BACKEND = "aot_eager"
    compiling.LOG.info = lambda text, *parts: said.append(text % parts)  # type: ignore[method-assign]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what the compiler imports
        return synced(rank, size, compile=True) | {"said": said}


def interrupted(rank: int, size: int, directory: Path, number: int, at: int) -> None:
    """Gets a signal in the last process, so many steps into the merge."""
    made = 0

    def criterion(output: Tensor, target: Tensor) -> Tensor:
        nonlocal made
        made += 1
        if made == at and rank == size - 1:
            os.kill(os.getpid(), number)
        return cross_entropy(output, target)

    criterion.__qualname__ = "cross_entropy"  # to a checkpoint it is the same
    run(rank, size, directory, criterion=criterion, checkpoint_seconds=0)


def draws(rank: int, size: int) -> list[float]:
    """First outputs of a training step on the same data in every process, with the gates of a fresh merge."""
    seen: list[float] = []

    def criterion(output: Tensor, target: Tensor) -> Tensor:
        if output.requires_grad and not seen:
            seen.extend(output.detach().flatten().tolist())
        return cross_entropy(output, target)

    same = batches(BATCH * STEPS, BATCH, 0, 1)
    run(rank, size, criterion=criterion, train=same, reset=_drawn_gates, merge_epochs=1, finetune_epochs=0, link_at=0.0)
    return seen


def _drawn_gates(gate: HardConcrete) -> None:
    nn.init.normal_(gate.loc, 1.0, 0.01)


def diverging(rank: int, size: int, training: bool) -> Any:
    """The last process alone comes upon NaN, in the third step or in the first validation after it."""
    made = 0

    def criterion(output: Tensor, target: Tensor) -> Tensor:
        nonlocal made
        made += output.requires_grad
        bad = rank == size - 1 and made >= 3 and output.requires_grad == training
        return cross_entropy(output, target) * (float("nan") if bad else 1.0)

    return run(rank, size, criterion=criterion)


def shown(rank: int, size: int) -> str:
    """What a process writes to stderr in an epoch of 25 steps."""
    with contextlib.redirect_stderr(io.StringIO()) as error:
        train = batches(BATCH * 25, BATCH, rank, size)
        run(rank, size, train=train, progress=True, merge_epochs=1, finetune_epochs=0)
    return error.getvalue()


def other_teachers(rank: int, size: int) -> Any:
    """Each process has its own."""

    def make() -> nn.Module:
        network = Net()
        with torch.no_grad():
            next(network.parameters()).add_(rank)
        return network

    return run(rank, size, make=make)


def uneven(rank: int, size: int) -> Any:
    return run(rank, size, train=batches(BATCH * STEPS, BATCH, 0, 1)[: STEPS - rank])


class Streamed:
    """Batches, nobody knows how many."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def streamed(rank: int, size: int, **options: Any) -> dict[str, Any]:
    """The second process has two batches more than the first."""
    own = batches(BATCH * STEPS, BATCH, rank, size)
    return merged(rank, size, train=Streamed(own + own[: 2 * rank]), lam_step=1.0, gate_lr=0.2, **options)


def has_checkpoint(directory: Path) -> bool:
    return bool(Snapshots(directory, {}).files())


KILL = signal.SIGKILL


def assert_close(found: dict[str, Any], alone: dict[str, Any]) -> None:
    for name, value in found["student"].items():
        torch.testing.assert_close(torch.from_numpy(value), torch.from_numpy(alone["student"][name]), **TOLERANCE)
    ours, theirs = found["history"], alone["history"]
    assert ours["kept"] == theirs["kept"]
    for epoch, other in zip(ours["epochs"], theirs["epochs"], strict=True):
        for score in ("train", "val"):
            assert epoch[score] == near(other[score])


def near(score: dict[str, Any]) -> dict[str, Any]:
    """What a score must be, up to rounding; what is None must be None."""
    return {name: value if value is None else pytest.approx(value, rel=1e-5) for name, value in score.items()}


TOLERANCE = {"rtol": 1e-8, "atol": 1e-10}

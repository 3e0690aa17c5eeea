"""Merging teachers of different label sets: the data of all as one, and a loss by which each sample trains its own part.

Classes are counted through, in the teachers' order: class k of teacher t is class ``K_1 + … + K_{t-1} + k`` of the student.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastmerge.checkpoints import loader_state, restore_loader_state
from fastmerge.evaluation import Criterion, as_tuple, has_classes
from fastmerge.merging.checks import check_classes, check_loader, examples_of, listed_teachers
from fastmerge.merging.options import Options
from fastmerge.processes import Processes
from fastmerge.stack import Stack
from fastmerge.wide.blueprint import join_heads
from fastmerge.wide.heads import Parts


class LabelSets:
    """Which classes are which teacher's.

    Args:
        sizes: classes of each teacher.

    Attributes:
        slices: of all classes, each teacher's.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)
        ends = [*accumulate(self.sizes)]
        self.slices = [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]
        self._owners: dict[torch.device, Tensor] = {}

    def owners(self, device: torch.device) -> Tensor:
        """The teacher of each class, int64 (K,)."""
        if device not in self._owners:
            sizes = torch.tensor(self.sizes, device="cpu")
            self._owners[device] = torch.arange(len(sizes), device="cpu").repeat_interleave(sizes).to(device)
        return self._owners[device]

    def owner_of(self, target: Tensor) -> Tensor:
        """The teacher of each target; of targets that cross_entropy ignores, the first."""
        return self.owners(target.device)[target.clamp(min=0)]

    def own_logits(self, output: Tensor, target: Tensor) -> Tensor:
        """The logits (N, K, ...) with -inf for the classes of other teachers than each sample's."""
        shape = [-1 if d == 1 else 1 for d in range(output.dim())]
        foreign = self.owner_of(target).unsqueeze(1) != self.owners(target.device).view(shape)
        return output.masked_fill(foreign, float("-inf"))

    def check(self, output: Any, target: Any) -> None:
        """Raises a ValueError for what are no logits of all classes, and classes."""
        if not has_classes(output, target) or output.shape[1] != sum(self.sizes):
            described = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in (output, target)]
            raise ValueError(
                f"teachers of different label sets need logits (N, {sum(self.sizes)}) and classes (N,) as targets; "
                f"got {described[0]} and {described[1]}"
            )


class PartCriterion:
    """A criterion of each sample's own part of the logits: ``Σ over t of N_t / N · criterion(part t, targets)``.

    Args:
        criterion: of logits and classes, a mean over the batch.
        sets: of the teachers.
        all_classes: whether it is that of all logits instead.
    """

    def __init__(self, criterion: Criterion, sets: LabelSets, all_classes: bool = False) -> None:
        self.criterion, self.sets, self.all_classes = criterion, sets, all_classes
        name = getattr(criterion, "__qualname__", str(criterion))
        self.__qualname__ = f"{name} of {list(sets.sizes)} classes"  # by which checkpoints are compared

    def __call__(self, output: Any, target: Any) -> Tensor:
        """The loss of logits (N, K) and targets that count the classes of all teachers through."""
        self.sets.check(output, target)
        if self.all_classes:
            return self.criterion(output, target)
        if self.criterion is cross_entropy:  # without the device having to tell which samples are whose
            return cross_entropy(self.sets.own_logits(output, target), target)
        owner, losses = self.sets.owner_of(target), []
        for number, part in enumerate(self.sets.slices):
            own = owner == number
            if bool(own.any()):
                loss = self.criterion(output.movedim(1, -1)[own][:, part], target[own] - part.start)
                losses.append(loss * own.sum() / own.numel())
        return torch.stack(losses).sum()


class Reached:
    """Whose classes come among targets.

    Args:
        sets: of the teachers.
    """

    def __init__(self, sets: LabelSets) -> None:
        self.sets = sets
        self._seen = torch.zeros(len(sets.sizes) + 1, device="cpu")  # the last: of targets that cross_entropy ignores

    def note(self, target: Tensor) -> None:
        """Adds a batch, without the device having to tell."""
        self._seen = self._seen.to(target.device)
        owner = torch.where(target >= 0, self.sets.owner_of(target), len(self.sets.sizes))
        self._seen.index_fill_(0, owner.flatten(), 1)

    def warnings(self, processes: Processes) -> list[str]:
        """What to say of teachers whose classes came in no process."""
        seen = processes.most(*self._seen.tolist())
        return [
            f"no target in the first epoch was of teacher {number}'s classes, {part.start}..{part.stop - 1}, so nothing trains "
            "its part of the output; pass a loader per teacher, or targets that number the classes of all teachers, teacher "
            "0's first"
            for number, part in enumerate(self.sets.slices)
            if not seen[number]
        ]


class PartAccuracy:
    """A metric: how many samples of some teachers are right among the classes of their own teacher.

    Args:
        sets: of the teachers.
        number: whose samples count; None: all.
    """

    def __init__(self, sets: LabelSets, number: int | None = None) -> None:
        self.sets, self.number = sets, number

    def __call__(self, output: Tensor, target: Tensor) -> tuple[float, int]:
        """The share of a batch, in 0..1, and of how many samples it is; NaN of none."""
        right = self.sets.own_logits(output, target).argmax(1) == target
        if self.number is not None:
            right = right[self.sets.owner_of(target) == self.number]
        return float(right.float().mean()), right.numel()


class TeachersLoader:
    """The loaders of all teachers as one, whose targets count the classes of all through.

    Args:
        loaders: one per teacher, with a length, of (input, target).
        sets: of the teachers.
        together: whether a batch is one of each loader's, side by side, until the longest is through, shorter ones beginning
            anew meanwhile; else all samples come once, one loader's after another's.
    """

    def __init__(self, loaders: Sequence[Any], sets: LabelSets, together: bool) -> None:
        self.loaders, self.sets, self.together = list(loaders), sets, together

    def __len__(self) -> int:
        lengths = [len(loader) for loader in self.loaders]
        return max(lengths) if self.together else sum(lengths)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        if not self.together:
            for number, loader in enumerate(self.loaders):
                for batch in loader:
                    yield self._counted_through(batch, number)
            return
        passes = [iter(loader) for loader in self.loaders]
        for _ in range(len(self)):
            batches = []
            for number, loader in enumerate(self.loaders):
                batch = next(passes[number], None)
                if batch is None:
                    passes[number] = iter(loader)
                    batch = next(passes[number])
                batches.append(self._counted_through(batch, number))
            inputs, targets = zip(*batches, strict=True)
            several = isinstance(inputs[0], tuple)
            yield tuple(map(torch.cat, zip(*inputs, strict=True))) if several else torch.cat(inputs), torch.cat(targets)
        for number, loader in enumerate(self.loaders):
            if len(loader) == len(self):
                next(passes[number], None)  # which ends a whole pass

    def state_dict(self) -> dict[str, Any]:
        """Where all loaders are in their random orders."""
        return {"loaders": [loader_state(loader) for loader in self.loaders]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts them back."""
        for loader, its in zip(self.loaders, state["loaders"], strict=True):
            restore_loader_state(loader, its)

    def _counted_through(self, batch: Any, number: int) -> tuple[Any, Tensor]:
        inputs, target = batch
        inputs = tuple(inputs) if isinstance(inputs, (tuple, list)) else inputs
        return inputs, torch.where(target >= 0, target + self.sets.slices[number].start, target)


def with_label_sets(
    options: Options, teachers: Sequence[nn.Module], train_loader: Any, val_loader: Any
) -> tuple[Options, list[nn.Module], Iterable[Any], Iterable[Any] | None, Parts | None]:
    """A merge of teachers of different label sets as one of teachers of one architecture, whose outputs lie side by side.

    Args:
        options: of the merge; where heads are averaged, all stays as it is.
        teachers: of one architecture but for the number of classes.
        train_loader, val_loader: one loader per teacher, each with its teacher's classes, or one whose targets count the
            classes of all through.

    Returns:
        Options, teachers and loaders of that merge, and where the teachers' parts lie in its output.

    Raises:
        TypeError, ValueError: the teachers or the data don't fit together, naming which.
    """
    teachers = listed_teachers(teachers)
    if options.heads == "average":
        return options, teachers, train_loader, val_loader, None
    if any(isinstance(teacher, Stack) for teacher in teachers):
        raise ValueError("heads= merges networks, not stacks of them")
    setting = options.setting(teachers[0])
    loaders = {"train_loader": train_loader, "val_loader": val_loader}
    each = {name: loader for name, loader in loaders.items() if _is_one_per_teacher(name, loader, len(teachers))}
    # with all_classes the criterion never sees the part of a teacher alone
    of_part = replace(setting, criterion=cross_entropy) if options.all_classes else setting
    for name, its in each.items():
        for number, loader in enumerate(its):
            try:
                len(loader)
            except TypeError:
                what = f"merge needs loaders with a length where there is one per teacher; {name}[{number}] has none"
                raise TypeError(what) from None
            check_loader(f"{name}[{number}]", loader, teachers[number], of_part, number, trained=name == "train_loader")
    inputs, _ = next(iter(train_loader[0] if "train_loader" in each else train_loader))
    networks, parts = join_heads(teachers, examples_of(as_tuple(inputs), teachers[0]))
    found = {part for of_mode in parts.outputs.values() for part in of_mode.values()}
    if any(set(of_mode) != {0} for of_mode in parts.outputs.values()) or len(found) != 1 or next(iter(found)).dim != 1:
        raise ValueError(
            "merge with heads= needs networks with one output, logits (N, K); for others, build a BigStudent"
        )
    sets = LabelSets(found.pop().sizes)
    for name, loader in loaders.items():
        if loader is not None and name not in each:
            target = next(iter(loader))[1]
            if isinstance(target, Tensor):
                check_classes(name, target, sum(sets.sizes))
    for name, its in each.items():
        loaders[name] = TeachersLoader(its, sets, together=name == "train_loader")
    metrics = {"own part": PartAccuracy(sets)}
    metrics |= {f"part {number}": PartAccuracy(sets, number) for number in range(len(teachers))}
    criterion = PartCriterion(options.criterion, sets, options.all_classes)
    options = replace(options, criterion=criterion, metrics=metrics | dict(options.metrics or {}))
    return options, networks, loaders["train_loader"], loaders["val_loader"], parts


def _is_one_per_teacher(name: str, loader: Any, count: int) -> bool:
    """Whether what was passed as a loader are loaders, one for each teacher, and not batches."""
    if not isinstance(loader, (list, tuple)) or not loader:
        return False
    batch = loader[0]
    if isinstance(batch, (list, tuple)) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return False
    if len(loader) != count:
        raise ValueError(f"merge needs one {name} per teacher, or one for all; got {len(loader)} for {count} teachers")
    return True

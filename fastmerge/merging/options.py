"""Every option of a merge, once: its default, its range, its help, and whether a checkpoint must have been made with it.

The arguments of :func:`fastmerge.merge`, the flags of the command line, the checks before the first epoch, what a checkpoint
is compared by and what recipes choose all follow from the fields of :class:`Options`.
"""

# ruff: noqa: RUF009

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from fractions import Fraction
from functools import partial
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from fastmerge.big_student import BigStudent
from fastmerge.checkpoints import fingerprint
from fastmerge.evaluation import Criterion, Setting
from fastmerge.gate_budget import GateBudget
from fastmerge.history import EpochRecord
from fastmerge.merging.checks import Schedule, check_device
from fastmerge.processes import Processes
from fastmerge.schedules import (
    GATE_MOMENTUM,
    PAPERS_GATE_LR,
    GateWeight,
    QuadraticLambda,
    fitting_gate_lr,
    fitting_lam_step,
)
from fastmerge.stack import BigStack
from fastmerge.wide.heads import HEADS
from fastmerge.wide.population import Keep

GateSchedule = Literal["quadratic", "budget"]
CompactAt = float | Literal["settled"] | None

_WARM_FROM = 1e-4
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long a stage trains, and at which learning rates.

    Attributes:
        epochs: passes over the training data.
        lr: learning rate, after the warm-up.
        milestones: epochs after which it is divided by ten.
        warmup: epochs in which it rises, linearly from 0.0001, or from a tenth of it where that is less.
    """

    epochs: int
    lr: float
    milestones: Sequence[int] = ()
    warmup: int = 0

    def scaled(self, budget: float) -> Plan:
        """A fraction of it; milestones move along, a warm-up of less than half an epoch goes."""
        epochs = max(1, round(self.epochs * budget))
        factor = epochs / self.epochs
        milestones = tuple(max(1, round(value * factor)) for value in self.milestones)
        return replace(self, epochs=epochs, milestones=milestones, warmup=round(self.warmup * factor))

    def factor(self, epoch: int) -> float:
        """The learning rate in an epoch, counted from 0, over :attr:`lr`."""
        if epoch < self.warmup and self.lr:
            start = min(_WARM_FROM, self.lr / 10)  # below what it rises to, however small that is
            return (start + (self.lr - start) * epoch / self.warmup) / self.lr
        return float(0.1 ** sum(epoch >= milestone for milestone in self.milestones))

    def schedule(self, optimizer: Optimizer) -> LRScheduler:
        """The scheduler of an optimizer that begins with :attr:`lr`, stepped once an epoch."""
        return LambdaLR(optimizer, self.factor)


def option(
    default: Any,
    what: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    choices: Sequence[Any] | None = None,
    compared: bool = True,
    flag: Any = None,
    varies: bool = False,
    merging: bool = False,
) -> Any:
    """A field of :class:`Options`.

    Args:
        default: of Python and of the command line.
        what: it is, for the help; an error says it too.
        least, above, most, choices: its range, for numbers that are not None. ``least`` of an int asks for a whole number.
        compared: whether a merge may go on only with the same.
        flag: the type of its value on the command line; bool for a switch; None for no flag.
        varies: whether ``fastmerge run`` lets it differ from the recipe's.
        merging: whether it concerns gates and students alone, so that networks trained by themselves have the default.
    """
    limits = {"least": least, "above": above, "most": most, "choices": choices}
    uses = {"compared": compared, "flag": flag, "varies": varies, "merging": merging}
    return field(default=default, metadata={"what": what, **limits, **uses})


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of :func:`fastmerge.merge`, which explains them.

    Raises:
        ValueError: One is out of range; the message names it.
    """

    merge_epochs: int = option(10, "epochs of the big student", least=1, flag=int)
    finetune_epochs: int = option(50, "epochs of the student", least=0, flag=int)
    link_at: float = option(
        0.25,
        "the fraction of the merge stage before linking; 1 is never",
        least=0.0,
        most=1.0,
        flag=float,
        varies=True,
        merging=True,
    )
    lr: float = option(0.01, "learning rate of the weights", above=0.0, flag=float)
    momentum: float = option(0.9, "momentum of the weights' SGD", least=0.0, most=1.0, flag=float)
    weight_decay: float = option(0.0, "weight decay of the weights' SGD", least=0.0, flag=float)
    gate_lr: float | None = option(
        None, "learning rate of the gates; without it 0.2, more in a short stage", above=0.0, flag=float, merging=True
    )
    lam_start: float = option(
        0.01, "weight of the gate loss (λ) in the first epoch", least=0.0, flag=float, merging=True
    )
    lam_step: float | None = option(
        None,
        "growth of λ per epoch; without it what fits the length of the stage",
        least=0.0,
        flag=float,
        merging=True,
    )
    gate_schedule: GateSchedule = option(
        "quadratic",
        "how the gate loss is weighted: by a growing λ (quadratic), or by weights that adapt themselves (budget)",
        choices=("quadratic", "budget"),
        flag=str,
        varies=True,
        merging=True,
    )
    finetune_lr: float | None = option(
        None, "learning rate of the fine-tuning; without it that of the merge", above=0.0, flag=float
    )
    milestones: Sequence[int] | None = option(
        None, "epochs of the fine-tuning after which lr is divided by ten; without it two thirds", flag=list
    )
    distill: float = option(
        0.0,
        "weight of the teachers' outputs in the fine-tuning's loss (distillation); the labels have the rest",
        least=0.0,
        most=1.0,
        flag=float,
        varies=True,
        merging=True,
    )
    temperature: float = option(
        2.0, "temperature of the softmax in distillation", above=0.0, flag=float, varies=True, merging=True
    )
    heads: Literal["average", "concatenate", "separate"] = option(
        "average",
        "what the student gives: the teachers' mean, or the classes of all teachers in one tensor or in a tuple",
        choices=HEADS,
        flag=str,
        merging=True,
    )
    all_classes: bool = option(
        False, "unless heads are averaged, train each sample among the classes of all teachers", flag=bool, merging=True
    )
    keep: Keep = option(
        None,
        "channels of the student, as a fraction of a teacher's, or NAME=X,NAME=X by channel group; without it as many as a "
        "teacher",
        flag=float,
        merging=True,
    )
    tie_streams: bool = option(
        False,
        "one gate per teacher for the channels that LayerNorms take together, so that the student has one teacher's",
        flag=bool,
        merging=True,
    )
    warmup: int = option(0, "epochs of the fine-tuning in which lr rises to its value", least=0, flag=int)
    schedule: Schedule | None = option(None, "maker of the fine-tuning's scheduler", compared=False)
    optimizer: Callable[..., Optimizer] | None = option(None, "maker of the weights' optimizer, in place of SGD")
    clip_norm: float | None = option(
        None, "largest norm of the weights' gradients; without it no limit", above=0.0, flag=float
    )
    ema: float | None = option(
        None, "decay of the moving average that the student becomes; without it no average", above=0.0, most=1.0
    )
    metrics: Mapping[str, Any] | None = option(None, "what else validation measures", compared=False)
    criterion: Criterion = option(cross_entropy, "the loss")
    device: torch.device | str | None = option(None, "where to train", compared=False)
    autocast: torch.dtype | None = option(None, "dtype of mixed precision", choices=(torch.bfloat16, torch.float16))
    channels_last: bool = option(False, "channels-last layout", flag=bool)
    cuda_graph: bool | None = option(None, "whether steps are captured as a CUDA graph", compared=False)
    seed: int | None = option(None, "seed that makes the merge repeatable", least=0, most=2**64 - 1, flag=int)
    progress: bool | None = option(None, "whether to show a progress bar", compared=False)
    callback: Callable[[EpochRecord], object] | None = option(None, "called after every epoch", compared=False)
    checkpoint_dir: str | Path | None = option(None, "where checkpoints go", compared=False)
    checkpoint_seconds: float = option(300.0, "least seconds between two checkpoints", least=0.0, compared=False)
    resume: bool = option(False, "whether to go on from a checkpoint", compared=False)
    accumulate: int = option(
        1, "parts in which the images of a step are read, to save memory", least=1, compared=False, flag=int
    )
    compact_at: CompactAt = option(
        None,
        "the fraction of the merge stage after which closed channels are dropped, or 'settled'; without it never",
        flag=float,
        varies=True,
        merging=True,
    )
    layerwise: int = option(
        1,
        "parts of the depth whose gates are learned one after another, in less memory; 1 is all at once",
        least=1,
        flag=int,
        merging=True,
    )
    merge_milestones: Sequence[int] | None = option(
        None, "epochs of the merge stage after which lr is divided by ten", flag=list, merging=True
    )
    val_every: int = option(1, "epochs between two scores on the validation data", least=1, compared=False, flag=int)
    compile: bool = option(False, "run networks under torch.compile, where that works", compared=False, flag=bool)
    sync_batch_norm: bool = option(False, "BatchNorm over the images of all processes", flag=bool)
    recalibrate: bool = option(
        True,
        "whether BatchNorm's statistics are estimated anew after compression",
        flag=bool,
        merging=True,
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            value = _as_pythons(getattr(self, each.name))
            check(each, value)
            object.__setattr__(self, each.name, value)
        at = self.compact_at
        is_number = isinstance(at, (int, float)) and not isinstance(at, bool) and 0 <= at <= 1
        if not (at is None or is_number or (isinstance(at, str) and at == "settled")):
            what = self.__dataclass_fields__["compact_at"].metadata["what"].partition(", or")[0]
            raise ValueError(f"merge needs compact_at, {what}, in 0..1, 'settled' or None; got {at!r}")
        if self.layerwise > self.merge_epochs:
            raise ValueError(
                f"layerwise={self.layerwise} needs merge_epochs of at least {self.layerwise}; got {self.merge_epochs}"
            )
        if self.all_classes and self.heads == "average":
            raise ValueError('all_classes goes with heads="concatenate" or "separate"')
        for name in ("milestones", "merge_milestones"):
            at = getattr(self, name)
            if at is None:
                continue
            if isinstance(at, (str, torch.Tensor)) or not isinstance(at, Iterable) or not all(map(_is_whole, at)):
                raise ValueError(f"merge needs {name}, whole numbers of epochs such as (20, 40); got {at!r}")
            object.__setattr__(self, name, tuple(map(int, at)))
        if self.ema == 1:
            raise ValueError("merge needs ema below 1: at 1 the average would stay what it was after the first step")
        if not isinstance(self.checkpoint_dir, (str, PathLike, type(None))):
            raise TypeError(f"merge needs checkpoint_dir, a path; got a {type(self.checkpoint_dir).__name__}")
        for name in ("criterion", "callback"):
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise TypeError(f"merge needs {name}, a function; got a {type(function).__name__}")

    def setting(self, network: nn.Module) -> Setting:
        """Device, precision, layout and criterion; the device is the network's where none is chosen.

        Raises:
            ValueError: The device can't be used.
        """
        device = check_device(self.device, network)
        return Setting(device, self.criterion, self.autocast, self.channels_last)

    def check_cuda_graph(self, device: torch.device, processes: Processes) -> None:
        """Raises a ValueError where a CUDA graph is wanted and there can be none."""
        if not self.cuda_graph:
            return
        if device.type != "cuda":
            raise ValueError(f"cuda_graph=True needs a CUDA device; got {device}")
        if processes.size > 1 or self.accumulate > 1:
            raise ValueError(
                f"cuda_graph=True needs one process and accumulate=1; got {processes.size} processes and "
                f"accumulate={self.accumulate}"
            )

    def compared(self) -> dict[str, Any]:
        """What a checkpoint must have been made with, as JSON values: functions and dtypes by their names."""
        return {each.name: plain(getattr(self, each.name)) for each in fields(self) if each.metadata["compared"]}

    def as_in_the_paper(self) -> Options:
        """The same with the paper's choices where the defaults or a recipe have others.

        Linked from the start, quadratic λ, gates that learn as slowly in a short stage as in a long one, no channels dropped
        before compression, BatchNorm's statistics as compression gives them, students that learn from labels alone.
        """
        return replace(
            self,
            link_at=0.0,
            gate_schedule="quadratic",
            gate_lr=PAPERS_GATE_LR if self.gate_lr is None else self.gate_lr,
            compact_at=None,
            recalibrate=False,
            distill=0.0,
        )

    def compacts_after(self, epochs: int) -> bool:
        """Whether candidates are dropped when so many epochs of the merge stage are over."""
        if self.compact_at is None or epochs == self.merge_epochs:  # then everything is compressed anyway
            return False
        return self.compact_at == "settled" or epochs >= self.compact_at * self.merge_epochs

    def is_linked_in(self, epoch: int) -> bool:
        """Whether the big student is linked in an epoch of the merge stage, counted from 0: in the last one, unless in none."""
        return self.link_at < 1 and epoch >= min(self.link_at * self.merge_epochs, self.merge_epochs - 1)

    @property
    def of_big(self) -> dict[str, Any]:
        """What a :class:`~fastmerge.BigStudent` takes of them."""
        return {"keep": self.keep, "tie_streams": self.tie_streams}

    @property
    def carries_optimizer(self) -> bool:
        """Whether parameters change their shape in the merge stage, and what the optimizer keeps for them with them."""
        linked = [self.is_linked_in(epoch) for epoch in range(self.merge_epochs)]
        return linked != sorted(linked, reverse=True) or any(map(self.compacts_after, range(1, self.merge_epochs)))

    @property
    def linked_epochs(self) -> int:
        """Epochs of the merge stage in which the big student is linked."""
        return sum(map(self.is_linked_in, range(self.merge_epochs)))

    @property
    def merge_plan(self) -> Plan:
        """Of the merge stage."""
        return Plan(epochs=self.merge_epochs, lr=self.lr, milestones=tuple(self.merge_milestones or ()))

    @property
    def finetune_plan(self) -> Plan:
        """Of the fine-tuning."""
        usual = [max(1, round(self.finetune_epochs * 2 / 3))]
        return Plan(
            epochs=self.finetune_epochs,
            lr=self.lr if self.finetune_lr is None else self.finetune_lr,
            milestones=tuple(usual if self.milestones is None else self.milestones),
            warmup=self.warmup,
        )

    def fitted(self, big: BigStudent | BigStack, steps: int | None) -> Options:
        """The same with a ``gate_lr`` and a ``lam_step``: those chosen, or those that fit this network and stage.

        Args:
            big: The network.
            steps: Of an epoch, or None where that is not known.
        """
        in_all = None if steps is None else self.merge_epochs * steps
        gate_lr = fitting_gate_lr(in_all) if self.gate_lr is None else self.gate_lr
        lam_step = self.lam_step
        if lam_step is None and self.gate_schedule == "quadratic":
            widest = big.num_teachers * max(group.size for group in big.groups)
            lam_step = fitting_lam_step(self.merge_epochs, in_all, widest, self.lam_start, gate_lr)
        return replace(self, gate_lr=gate_lr, lam_step=lam_step)

    def gate_weight(self, steps: int | None) -> GateWeight:
        """What weighs the gates in the merge stage, of fitted options.

        Raises:
            ValueError: A budget has to know how many steps there are, and the loader has no length.
        """
        if self.gate_schedule == "quadratic":
            assert self.lam_step is not None
            return QuadraticLambda(self.lam_start, self.lam_step)
        if steps is None:
            raise ValueError(
                "gate_schedule='budget' needs a train_loader with a length, to plan its steps; this one has none"
            )
        assert self.gate_lr is not None
        return GateBudget(self.merge_epochs * steps, gate_lr=self.gate_lr)

    def weight_optimizer(self, network: Any, lr: float) -> Optimizer:
        """Of a network's weights, or of a big student's without its gates."""
        big = isinstance(network, (BigStudent, BigStack))
        return self.optimizer_of(network.weight_parameters() if big else network.parameters(), lr)

    def optimizer_of(self, parameters: Iterable[nn.Parameter], lr: float) -> Optimizer:
        """Of parameters, by SGD where no other optimizer is chosen."""
        parameters = list(parameters)  # who sorts them into groups goes through them more than once
        if self.optimizer is None:
            return SGD(parameters, lr, self.momentum, weight_decay=self.weight_decay)
        made = self.optimizer(parameters)
        for group in getattr(made, "param_groups", ()):
            if isinstance(group.get("lr"), torch.Tensor):  # which schedulers change in place, for all who share it
                group["lr"] = group["lr"].clone()
        return made

    def gate_optimizer(self, big: BigStudent | BigStack) -> Optimizer:
        """Of the gates."""
        assert self.gate_lr is not None
        return SGD(big.gate_parameters(), self.gate_lr, GATE_MOMENTUM)


def _as_pythons(value: Any) -> Any:
    """Numbers of NumPy, fractions and tensors without dimensions as Python's own, which all that takes them understands."""
    if isinstance(value, np.generic) or (isinstance(value, torch.Tensor) and not value.dim()):
        return value.item()
    return float(value) if isinstance(value, Fraction) else value


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and int(value) >= 0


def check(each: Field[Any], value: Any) -> None:
    """Checks a value against the range of its field.

    Raises:
        ValueError: It is outside.
    """
    facts = each.metadata
    name, what = f"merge needs {each.name}", facts["what"].partition(";")[0]
    least, above, most = facts["least"], facts["above"], facts["most"]
    if value is None and each.default is None:
        return
    if isinstance(each.default, bool):
        if not isinstance(value, (bool, int)) or value not in (0, 1):
            raise ValueError(f"{name}, {what}, True or False; got {value!r}")
        return
    if facts["choices"] is not None:
        if not any(isinstance(value, type(choice)) and value == choice for choice in facts["choices"]):
            kind = what.partition(":")[0]
            raise ValueError(f"{name}, {kind}: {' or '.join(map(str, facts['choices']))}; got {value!r}")
        return
    if isinstance(least, int):
        too_large = most is not None and isinstance(value, int) and value > most
        if isinstance(value, bool) or not isinstance(value, int) or value < least or too_large:
            bound = f"of at least {least}" if most is None else f"in {least}..{most}"
            raise ValueError(f"{name}, {what}, a whole number {bound}; got {value!r}")
        return
    if least is None and above is None:
        return
    if (
        not isinstance(value, (int, float))
        or isinstance(value, bool)
        or not abs(value) <= _LARGEST
        or (least is not None and value < least)
        or (above is not None and value <= above)
        or (most is not None and value > most)
    ):
        bound = f"above {above:g}" if least is None else f"of at least {least:g}"
        bound = bound if most is None else f"in {above if least is None else least:g}..{most:g}"
        raise ValueError(f"{name}, {what}, a finite number {bound}; got {value!r}")


def plain(value: Any) -> Any:
    """An option as a JSON value that is the same in another process.

    Of a function, a class or a dtype it is the name; of another object its class, the plain values among its attributes, and
    what its tensors hold. An address, as in the ``str`` of a partial or an object, would be another one there.
    """
    if isinstance(value, (list, tuple, range)):
        return [plain(each) for each in value]
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (type(None), bool, int, float, str)):
        return value
    if isinstance(value, Real):  # NumPy's
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, (torch.dtype, torch.device, Path)) or hasattr(value, "__qualname__"):
        return getattr(value, "__qualname__", str(value))
    if isinstance(value, partial):
        return [plain(value.func), plain(value.args), plain(value.keywords)]
    state = {"weights": fingerprint(value)} if isinstance(value, nn.Module) else {}
    attributes = getattr(value, "__dict__", {}).items()
    options = {name: each for name, each in attributes if isinstance(each, (bool, int, float, str))}
    return [type(value).__qualname__, options | state]

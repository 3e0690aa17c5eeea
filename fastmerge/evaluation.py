"""How a network meets a batch: where, in which dtype and layout, and what counts as right."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_map_only

from fastmerge.batch_statistics import single_samples_named
from fastmerge.history import Score
from fastmerge.processes import Processes
from fastmerge.stack import Stack

Criterion = Callable[[Any, Any], Tensor]
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Setting:
    """Device, precision, layout and criterion of a merge.

    Attributes:
        device: Where networks and batches go.
        criterion: ``criterion(output, target)``, a mean over the batch.
        autocast: Dtype of ``torch.autocast``, or None for none.
        channels_last: Whether networks and inputs of images or volumes are laid out channels-last.
    """

    device: torch.device
    criterion: Criterion
    autocast: torch.dtype | None = None
    channels_last: bool = False

    def place(self, network: Network) -> Network:
        """Moves a network, in place, to the device and layout."""
        network.to(self.device)
        if self.channels_last:
            network._apply(lambda tensor: tensor.to(memory_format=_layout(tensor)))
        return network

    def batches(self, loader: Iterable[Any]) -> Iterator[tuple[tuple[Tensor, ...], Any]]:
        """Yields (inputs, target) on the device; several inputs come as a tuple in place of one tensor."""
        for inputs, target in loader:
            yield tuple(map(self._input, as_tuple(inputs))), self._target(target)

    def apply(self, network: nn.Module, inputs: tuple[Tensor, ...], target: Any) -> tuple[Any, Tensor]:
        """Runs network and criterion; returns (output, loss), the loss (R,) of a stack."""
        with self.precision():
            with single_samples_named(inputs):
                output = network(*inputs)
            criterion = vmap(self.criterion) if isinstance(network, Stack) else self.criterion
            return output, criterion(output, target)

    def precision(self) -> torch.autocast:
        """A context with the precision that networks and the criterion run in."""
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    def _input(self, value: Tensor) -> Tensor:
        layout = _layout(value) if self.channels_last else torch.preserve_format
        return value.to(self.device, non_blocking=True, memory_format=layout)

    def _target(self, value: Any) -> Any:
        """Tensors in lists, dicts and named tuples, such as a detector's boxes, go to the device, too."""
        return tree_map_only(Tensor, lambda tensor: tensor.to(self.device, non_blocking=True), value)


def _layout(tensor: Tensor) -> torch.memory_format:
    """Channels-last for images and volumes."""
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim(), torch.preserve_format)


def as_tuple(inputs: Any) -> tuple[Tensor, ...]:
    """The inputs of a batch, of which there may be one or several."""
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def samples_in(network: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Samples of a batch; of a stack, for each of its networks."""
    return inputs[0].shape[1] if isinstance(network, Stack) else len(inputs[0])


def length_of(loader: Any) -> int | None:
    """Batches of an epoch, where a loader has a length: a DataLoader always has ``__len__``, which may fail."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def has_classes(output: Any, target: Any) -> bool:
    """Whether targets are class indices of shape (N, ...) for outputs of shape (N, K, ...)."""
    if not (isinstance(output, Tensor) and isinstance(target, Tensor)):
        return False
    integer = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
    return integer and output.dim() >= 2 and target.shape == output.shape[:1] + output.shape[2:]


def logits_of(output: Any) -> Tensor:
    """A network's output, as what it is distilled from.

    Raises:
        ValueError: It is not one tensor of logits.
    """
    if isinstance(output, Tensor) and output.dim() >= 2:
        return output
    got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise ValueError(
        f"distillation needs networks with one output, logits (N, K); got {got}. Wrap the networks in a module that returns "
        "the logits alone, or train without distillation"
    )


def class_dimension(output: Tensor, target: Any, criterion: Criterion) -> int:
    """The dimension of logits that classes lie along: 1 for cross entropy, as in PyTorch; else the one that class numbers lack.

    Args:
        output: such as (N, K), (N, K, H, W), or (N, L, K) of a language model.
        target: of the criterion.
        criterion: what trains networks of such outputs.

    Raises:
        ValueError: The target has no class numbers, there is one class, or several dimensions may be those of the classes.
    """
    shape, dims = tuple(output.shape), list(range(1, output.dim()))
    function = criterion.func if isinstance(criterion, partial) else criterion
    if not (function is cross_entropy or isinstance(function, nn.CrossEntropyLoss)):
        if isinstance(target, Tensor) and target.is_floating_point():
            dims = []
        elif output.dim() > 2:
            lacked = tuple(target.shape) if isinstance(target, Tensor) else ()
            dims = [dim for dim in dims if shape[:dim] + shape[dim + 1 :] == lacked]
    else:
        dims = dims[:1]
    if len(dims) != 1 or shape[dims[0]] < 2:
        came = f"{tuple(target.shape)} of {target.dtype}" if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(
            "distillation needs logits of classes, and targets that are class numbers, so that it is clear where the classes "
            f"lie; the output is {shape}, the target {came}. Train with cross_entropy or CrossEntropyLoss, whose logits are "
            "(N, K, ...), or without distillation"
        )
    return dims[0]


class NotFiniteError(FloatingPointError):
    """A loss became NaN or Inf.

    Its args are the batch, counted from 1, the loss's name, its value and, in an evaluation, whether the inputs are finite
    where that is known.
    """

    def __str__(self) -> str:
        batch, name, value = self.args[:3]
        return f"the {name} became {value} in batch {batch}"


class Tally:
    """Sums loss and accuracy over batches without waiting for the device, except now and then.

    Losses are 0-d, or (R,) for a stack of R networks, of which one may come upon NaN without an error.

    Args:
        every: How many batches may go unread.
    """

    def __init__(self, every: int = 20) -> None:
        self.every = every
        self.samples = self.steps = 0
        self._sums: dict[str, Any] = {}  # floats, or float64 arrays (R,)
        self._started = time.perf_counter()
        self._pending: list[tuple[int, dict[str, Tensor]]] = []

    def add(self, output: Any, target: Any, samples: int, **losses: Tensor) -> bool:
        """Adds a batch. True when the sums were just read from the device, every ``every`` batches.

        Raises:
            NotFiniteError: A loss of one of the last batches is NaN or Inf.
            ValueError: The batch has no samples.
        """
        if not samples:
            raise ValueError(f"batch {self.steps_begun + 1} of an epoch has no samples; let the loader leave it out")
        values = {name: loss.detach().float() for name, loss in losses.items()}
        stacked = int(next(iter(values.values())).dim())
        if output is not None and has_classes(
            *(x.flatten(0, 1) if stacked and isinstance(x, Tensor) else x for x in (output, target))
        ):
            right = (output.detach().argmax(1 + stacked) == target).float().flatten(stacked)
            counted = (target != -100).float().flatten(stacked)  # cross_entropy's ignore_index
            values["accuracy"] = right.sum(-1) / counted.sum(-1).clamp(min=1)
        self._pending.append((samples, values))
        return len(self._pending) >= self.every and self.read()

    def read(self) -> bool:
        """Brings the sums up to date."""
        if not self._pending:
            return True
        names = list(self._pending[0][1])
        rows = torch.stack([torch.stack([values[name] for name in names]) for _, values in self._pending])
        stacked = rows.dim() > 2
        for (samples, _), row in zip(
            self._pending, rows.double().cpu().numpy() if stacked else rows.tolist(), strict=True
        ):
            self.steps += 1
            self.samples += samples
            for name, value in zip(names, row, strict=True):
                if not stacked and value - value != 0:  # NaN and Inf
                    raise NotFiniteError(self.steps, name, value)
                self._sums[name] = self._sums.get(name, 0.0) + samples * value
        self._pending.clear()
        return True

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on; to be called after :meth:`read`."""
        seconds = time.perf_counter() - self._started
        sums = {n: v if isinstance(v, float) else torch.from_numpy(v) for n, v in self._sums.items()}
        return {"samples": self.samples, "steps": self.steps, "sums": sums, "seconds": seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a :meth:`state_dict`; the time between does not count."""
        self.samples, self.steps = state["samples"], state["steps"]
        self._sums = {n: v.numpy() if isinstance(v, Tensor) else v for n, v in state["sums"].items()}
        self._started = time.perf_counter() - state["seconds"]

    def mean(self, name: str) -> Any:
        """Mean over the samples read so far; a list for a stack."""
        mean = self._sums[name] / self.samples
        return mean if isinstance(mean, float) else mean.tolist()

    @property
    def steps_begun(self) -> int:
        """Batches added, those not read yet too."""
        return self.steps + len(self._pending)

    def rate(self) -> float:
        """Samples per second since the tally was made, of those read so far."""
        return self.samples / (time.perf_counter() - self._started)

    def score(self, processes: Processes | None = None) -> Score:
        """Mean of the loss called ``loss``, and accuracy, over the samples of all processes.

        Raises:
            ValueError: There were no samples.
        """
        if processes is not None and processes.size > 1:
            own = [float(self.samples), *(self._sums.get(name, 0.0) for name in ("loss", "accuracy"))]
            samples, loss, right = processes.sum(own)
            (counted,) = processes.most("accuracy" in self._sums)
            if samples:
                return Score(loss / samples, right / samples if counted else None)
        if not self.samples:
            raise ValueError("the loader gave no samples in this epoch; it must give some in every epoch")
        return Score(self.mean("loss"), self.mean("accuracy") if "accuracy" in self._sums else None)


class Measured:
    """Metrics of a pass over data.

    Args:
        metrics: by name.
    """

    def __init__(self, metrics: Mapping[str, Any]) -> None:
        self.metrics = metrics
        self._sums = {name: 0.0 for name, metric in metrics.items() if not hasattr(metric, "update")}
        self._samples = dict.fromkeys(self._sums, 0)
        for name in metrics.keys() - self._sums.keys():
            metrics[name].reset()

    def add(self, output: Any, target: Any, samples: int) -> None:
        """Adds a batch."""
        for name, metric in self.metrics.items():
            if name in self._sums:
                value, count = _value_of(name, metric(output, target), samples)
                self._samples[name] += count
                self._sums[name] += count * value if count else 0.0
            else:
                metric.update(output, target)

    def values(self, processes: Processes | None) -> dict[str, float] | None:
        """What they came to; None where there are none."""
        if not self.metrics:
            return None
        totals = [*map(float, self._samples.values()), *self._sums.values()]
        totals = totals if processes is None else processes.sum(totals)
        pairs = zip(totals[len(self._sums) :], totals, strict=False)
        means = dict(zip(self._sums, (value / n if n else math.nan for value, n in pairs), strict=True))
        computed = {name: metric.compute() for name, metric in self.metrics.items() if name not in means}
        return {name: means[name] if name in means else _number(name, computed[name]) for name in self.metrics}


def _number(name: str, found: Any) -> float:
    try:
        return float(found)
    except (TypeError, ValueError, RuntimeError):
        came = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ValueError(
            f"metric {name!r} must give one number from compute(); it gave {came}. Average it, or name each number's metric "
            "by itself (of a torchmetrics.MetricCollection, pass its items)"
        ) from None


def _value_of(name: str, found: Any, samples: int) -> tuple[float, int]:
    value, count = found if isinstance(found, tuple) and len(found) == 2 else (found, samples)
    try:
        return float(value), int(count)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"metric {name!r} must give one number per batch, or (number, samples); it gave a {type(found).__name__}"
        ) from None


@torch.no_grad()
def evaluate(
    network: nn.Module,
    loader: Iterable[Any],
    setting: Setting,
    after_step: Callable[[], object] | None = None,
    processes: Processes | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> Score:
    """Scores a network in eval mode; the modes of all its modules are restored.

    Args:
        network: On the setting's device.
        loader: Yields (input, target).
        setting: Criterion and the like.
        after_step: Called after every batch; what it raises ends the evaluation.
        processes: That share the data; however unevenly, every sample counts once.
        metrics: What else to measure, by name: functions of (output, target), whose mean over the samples counts and which
            may give (value, samples) where it is one of fewer, or objects with ``update``, ``compute`` and ``reset``, which
            are told of all batches of their own process.

    Raises:
        NotFiniteError: As ``Tally.add``, in all processes.
    """
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        tally, measured = Tally(), Measured(metrics or {})
        whole = contextlib.nullcontext() if processes is None else processes.together(NotFiniteError)
        with whole:
            try:
                for inputs, target in setting.batches(loader):
                    output, loss = setting.apply(network, inputs, target)
                    tally.add(output, target, samples_in(network, inputs), loss=loss)
                    measured.add(output, target, samples_in(network, inputs))
                    if after_step is not None:
                        after_step()
                tally.read()
            except NotFiniteError as error:
                raise NotFiniteError(*error.args, _has_finite_inputs(loader, setting, error.args[0])) from None
        return dataclasses.replace(tally.score(processes), metrics=measured.values(processes))
    finally:
        for module, mode in modes.items():
            module.training = mode


def _has_finite_inputs(loader: Iterable[Any], setting: Setting, number: int) -> bool | None:
    """Whether the inputs of a batch, counted from 1, hold numbers alone; None where the loader does not give it again."""
    for inputs, _ in itertools.islice(setting.batches(loader), number - 1, number):
        return all(bool(x.isfinite().all()) for x in inputs)
    return None

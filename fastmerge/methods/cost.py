"""What a method costs, and what a merge will: counted operations, in epochs of training one teacher, and memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torch.utils.flop_counter import flop_registry

from fastmerge.channels.examples import few_samples, with_samples
from fastmerge.data.epochs import EpochLoader
from fastmerge.evaluation import Setting, as_tuple, length_of
from fastmerge.merging.checks import check_loader
from fastmerge.merging.label_sets import with_label_sets
from fastmerge.merging.layerwise import phases, stage_networks
from fastmerge.merging.options import Options
from fastmerge.merging.stages import blank_student
from fastmerge.stack import Stack

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """A product with all keys, and one with all values."""
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any) -> int:
    """The first product again, and two for the gradients of each."""
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (3 * query.shape[-1] + 2 * value.shape[-1])


# What torch.utils.flop_counter knows only as it is called on a GPU.
_ON_A_CPU: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class _Counting(TorchDispatchMode):
    """Counts operations as ``torch.utils.flop_counter`` does, without its hooks on all modules."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket) or _ON_A_CPU.get(func._overloadpacket)
        if count is not None and not _is_meta(out):  # a trace computes nothing
            self.operations += count(*args, **(kwargs or {}), out_val=out)
        return out


def _is_meta(out: Any) -> bool:
    return any(isinstance(y, Tensor) and (y.is_meta or isinstance(y, FakeTensor)) for y in pytree.tree_leaves(out))


class Meter:
    """Counts operations of matrix products and convolutions within its context.

    To watch each operation makes small ones slow, so that training is left out (:func:`unwatched`) and added by what one step
    takes (:meth:`add_training`).

    Attributes:
        operations: counted so far.
    """

    _running: ClassVar[list[Meter]] = []

    def __init__(self) -> None:
        self.operations = 0.0
        self._mode: _Counting | None = None

    def __enter__(self) -> Meter:
        Meter._running.append(self)
        self._start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()
        Meter._running.remove(self)

    def add_training(self, network: nn.Module, batches: Iterable[Any], epochs: float) -> None:
        """Adds what training takes: a sample's operations of a step, times the samples."""
        if epochs:
            self.operations += epochs * _epoch_operations(network, batches)

    def add_forward(self, network: nn.Module, batches: Iterable[Any], epochs: float) -> None:
        """Adds what forward passes over the data take."""
        self.operations += epochs * _epoch_operations(network, batches, backward=False)

    def epochs(self, teacher: nn.Module, batches: Iterable[Any]) -> float:
        """The operations in epochs of training a teacher on these batches."""
        return self.operations / _epoch_operations(teacher, batches) if self.operations else 0.0

    def _start(self) -> None:
        self._mode = _Counting()
        self._mode.__enter__()

    def _stop(self) -> None:
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
            self.operations += self._mode.operations
            self._mode = None


@contextmanager
def unwatched() -> Iterator[Meter | None]:
    """Within, the innermost meter that runs is paused, if one does."""
    meter = Meter._running[-1] if Meter._running else None
    if meter is not None:
        meter._stop()
    try:
        yield meter
    finally:
        if meter is not None:
            meter._start()


def step_operations(network: nn.Module, batches: Iterable[Any], *, backward: bool = True) -> float:
    """Operations of a training step on the first batch, or of its forward pass alone."""
    inputs, _ = next(iter(batches))
    return counted_step(copy.deepcopy(network), as_tuple(inputs), backward)[0]


def counted_step(network: nn.Module, inputs: Sequence[Tensor], backward: bool = True) -> tuple[float, int]:
    """Operations of a step, and bytes that its forward pass keeps for the backward; the network is changed."""
    parameters = list(network.train().requires_grad_(backward).parameters())
    device = parameters[0].device
    devices, placed = [device] if device.type == "cuda" else [], [x.to(device) for x in inputs]
    with torch.random.fork_rng(devices), torch.enable_grad(), _Counting() as counter:
        with kept_for_backward([*parameters, *placed]) as saved:
            outputs = pytree.tree_leaves(network(*placed))
        if backward:
            torch.autograd.backward([y.sum() for y in outputs if isinstance(y, Tensor) and y.requires_grad])
    network.zero_grad()
    return float(counter.operations), sum(saved.values())


class Operations:
    """Counts the operations of a network's forward and backward pass per sample, once for each set of shapes.

    Args:
        example: two samples, on the CPU, where the counting is done.
    """

    def __init__(self, example: Tensor) -> None:
        self.example = example
        self._found: dict[Any, float] = {}

    def __call__(self, network: nn.Module) -> float:
        key = (type(network), tuple(parameter.shape for parameter in network.parameters()))
        if key not in self._found:
            one = network.network(0) if isinstance(network, Stack) else copy.deepcopy(network)
            count = step_operations(one.cpu().float(), [(self.example, None)])
            self._found[key] = count / len(self.example)
        return self._found[key]


def _epoch_operations(network: nn.Module, batches: Iterable[Any], *, backward: bool = True) -> float:
    """Operations of an epoch of training, or of its forward passes alone: a sample's of the first batch, times the samples."""
    inputs = as_tuple(next(iter(batches))[0])
    first, several = len(inputs[0]), with_samples(inputs, max(2, len(inputs[0])))  # BatchNorm can't train on one
    operations = step_operations(network, [(several, None)], backward=backward)
    return operations / len(several[0]) * _samples_of(batches, first)


def _samples_of(batches: Iterable[Any], first: int) -> int:
    """Samples of an epoch; where the loader does not say, as many batches as it has of the first one's size."""
    if isinstance(batches, EpochLoader):
        return batches.samples
    if isinstance(batches, DataLoader) and isinstance(batches.sampler, Sized) and batches.batch_size is not None:
        samples = len(batches.sampler)
        return samples - samples % batches.batch_size if batches.drop_last else samples
    if isinstance(batches, (list, tuple)):
        return sum(len(as_tuple(inputs)[0]) for inputs, _ in batches)
    length = length_of(batches)
    return first * (sum(1 for _ in batches) if length is None else length)


@contextmanager
def kept_for_backward(known: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Within, gathers the bytes of every storage that autograd saves, by address, but for those of known tensors."""
    others = {tensor.untyped_storage().data_ptr() for tensor in known}
    saved: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        try:
            address = storage.data_ptr()
        except RuntimeError:  # a big student traces inputs of another shape meanwhile, on tensors without values
            return tensor
        if address not in others:
            saved[address] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


@dataclass(frozen=True)
class Prediction:
    """What a merge will cost, beside training one network for as many epochs.

    Attributes:
        merge_epochs, finetune_epochs: of the stages.
        epoch: of the merge stage's epochs the cheapest and the dearest, in epochs of training one teacher.
        merge: the merge stage's cost in epochs of one teacher.
        finetune: the fine-tuning's, with what teachers are asked.
        memory: bytes of a step in the merge stage, and of one network's: weights, gradients, momentum, and what the forward
            pass keeps for the backward.
        compacts: whether channels are dropped early, so that the merge stage may cost less.
    """

    merge_epochs: int
    finetune_epochs: int
    epoch: tuple[float, float]
    merge: float
    finetune: float
    memory: tuple[int, int]
    compacts: bool = False

    def __str__(self) -> str:
        plain, cost = self.merge_epochs + self.finetune_epochs, self.merge + self.finetune
        low, high = (f"{each:.1f}" for each in self.epoch)
        big, one = (f"{each / 2**20:.3g} MiB" for each in self.memory)
        return (
            f"cost: {'at most ' if self.compacts else ''}{cost:.0f} epochs of training one network, by counted operations "
            f"({self.merge_epochs} of merging at {low if low == high else f'{low} to {high}'} each, {self.finetune_epochs} of "
            f"fine-tuning at {self.finetune / max(1, self.finetune_epochs):.1f}); a plain run as long costs {plain}. "
            f"A step takes about {big}, of one network {one}"
        )


def predict(teachers: Sequence[nn.Module], train_loader: Any, setting: Setting, plan: Options) -> Prediction:
    """Counts what :func:`fastmerge.merge` will take, from two samples on the CPU in float32; nothing is changed or trained.

    Raises:
        TypeError, ValueError: As :func:`fastmerge.merge`.
    """
    with torch.random.fork_rng([setting.device] if setting.device.type == "cuda" else []):
        plan, teachers, train_loader, _, _ = with_label_sets(plan, teachers, train_loader, None)
        setting = replace(setting, criterion=plan.criterion)
        inputs = check_loader("train_loader", train_loader, teachers[0], setting, trained=True)
        few = tuple(x.float() if x.is_floating_point() else x for x in (value.cpu() for value in few_samples(inputs)))
        own = [copy.deepcopy(teacher).cpu().float() for teacher in teachers]
        example = few[0] if len(few) == 1 else few

        def step(network: nn.Module) -> tuple[float, int]:
            operations, kept = counted_step(network, few)
            weights = sum(each.nbytes for each in network.parameters())
            return operations, 3 * weights + kept * len(inputs[0]) // len(few[0])

        unit, one = step(own[0])
        student = 1.0 if plan.keep is None else step(blank_student(own, example, plan))[0] / unit
        costs, memory = [], 0
        for _, big, each in stage_networks(own, example, plan, verify=False):
            for _, epochs in phases(big, each):
                operations, kept = step(big)
                costs += [operations / unit] * epochs
                memory = max(memory, kept)
    asked = len(teachers) / 3 if plan.distill else 0.0
    return Prediction(
        plan.merge_epochs,
        plan.finetune_epochs,
        epoch=(min(costs), max(costs)),
        merge=sum(costs),
        finetune=plan.finetune_epochs * (student + asked),
        memory=(memory, one),
        compacts=plan.compact_at is not None,
    )


@contextmanager
def peak_memory(networks: Sequence[nn.Module]) -> Iterator[Callable[[], int | None]]:
    """Gives a function that says, afterwards, how many bytes were used at the peak beyond those before; None if unknown."""
    device = next(networks[0].parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    try:
        _CLEAR.write_text("5")  # the peak counts from here
        resident = _resident("VmRSS")
    except (OSError, StopIteration):
        yield lambda: None
        return
    yield lambda: max(_resident("VmHWM") - resident, 0)


def _resident(name: str) -> int:
    return int(next(line for line in _STATUS.read_text().splitlines() if line.startswith(name)).split()[1]) << 10

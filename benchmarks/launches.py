"""What one training step asks of a GPU, counted on a machine without one: launches, bytes, and the CPU's own time.

:func:`counted` runs a step on fake tensors, which have shapes and no numbers. Every ATen operation that reaches the
device below autograd counts as so many kernels as PyTorch launches for it, and every call of a Triton kernel as one. Bytes are
those of the tensors that a kernel reads or writes, each once, or twice where it takes two passes.

:func:`pretending` lets CPU tensors take the way of CUDA tensors, with Triton's own Python for every launch and nothing
launched: what a step then takes is the time in which a CPU prepares the work of a GPU.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from fastmerge.kernels.batch_norm import act
from fastmerge.kernels.block_conv import fixed_choice
from fastmerge.kernels.launch import forget
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.cases import Case
from benchmarks.steps import Step
from fastmerge.wide import streams

# What launches nothing: views, bare memory, questions.
_FREE = {
    *(
        "alias",
        "as_strided",
        "as_strided_",
        "detach",
        "diagonal",
        "empty",
        "empty_like",
        "empty_strided",
        "expand",
        "is_pinned",
    ),
    *("lift_fresh", "narrow", "new_empty", "new_empty_strided", "permute", "reshape", "select", "slice", "split"),
    *("split_with_sizes", "squeeze", "sym_size", "sym_stride", "t", "transpose", "unbind", "unfold", "unsafe_split"),
    *("unsqueeze", "view", "_reshape_alias", "_unsafe_view", "resize_"),
}
# Kernels of an operation that launches more than one: a BatchNorm takes its statistics, brings the running ones up to date and
# writes, and backward sums and writes; what is written where the rest is zero is zeroed first.
_KERNELS = {
    "native_batch_norm": 3,
    "_native_batch_norm_legit": 3,
    "_batch_norm_with_update": 3,
    "native_batch_norm_backward": 2,
    "batch_norm_backward": 2,
    "max_pool2d_with_indices_backward": 2,
    "nll_loss_backward": 2,
    "select_backward": 2,
    "slice_backward": 2,
    "_segment_reduce_backward": 2,
}
# How often an operation reads its first tensor, of those that read it more than once.
_READS = {"native_batch_norm": 2, "_native_batch_norm_legit": 2, "_batch_norm_with_update": 2}
_CATENATED = 128  # tensors that one kernel puts together
# multi_tensor_apply: tensors of one launch by how many lists it goes through; blocks of one launch; elements of a block.
_TENSORS_OF_A_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36}
_BLOCKS_OF_A_LAUNCH, _ELEMENTS_OF_A_BLOCK = 320, 65536


@dataclass
class Counts:
    """What a step launched.

    Attributes:
        kernels: by name of the operation or Triton kernel, how many.
        moved: bytes by the same names.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    moved: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, kernels: int, moved: int) -> None:
        self.kernels[name] += kernels
        self.moved[name] += moved


class _Operations(TorchDispatchMode):
    """Counts the operations that reach the device."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastmerge":
            with self:  # what it does on a device, not what it says of fake tensors
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        reads = _on_device((args, kwargs))
        if func.namespace == "aten" and name not in _FREE and (writes := _on_device(out)) + reads:
            self.counts.add(name, _kernels(name, args, reads), _bytes(name, args, reads, writes))
        return out


def _on_device(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


def _kernels(name: str, args: Sequence[Any], reads: Sequence[Tensor]) -> int:
    if name == "convolution_backward":
        return sum(args[-1])
    if name == "cat":
        return math.ceil(len(reads) / _CATENATED)
    if name.startswith(("_foreach", "_fused")):
        lists = [values for values in args if isinstance(values, (list, tuple)) and values and values[0] is not None]
        tensors = [values for values in lists if isinstance(values[0], Tensor)]
        if any(len({t.stride() for t in each}) > 1 for each in zip(*tensors, strict=True)):
            return len(tensors[0])  # one after another
        return _multi_tensor_launches(tensors[0], len(tensors))
    return _KERNELS.get(name, 1)


def _multi_tensor_launches(tensors: Sequence[Tensor], lists: int) -> int:
    """Launches of one operation over lists of tensors, as PyTorch's ``multi_tensor_apply`` cuts them."""
    launches, held, blocks = 0, 0, 0
    for tensor in tensors:
        held += 1
        for _ in range(math.ceil(tensor.numel() / _ELEMENTS_OF_A_BLOCK)):
            blocks += 1
            if blocks == _BLOCKS_OF_A_LAUNCH:
                launches, blocks, held = launches + 1, 0, 1
        if held == _TENSORS_OF_A_LAUNCH[min(lists, 4)]:
            launches, blocks, held = launches + 1, 0, 0
    return launches + bool(blocks)


def _bytes(name: str, args: Sequence[Any], reads: Sequence[Tensor], writes: Sequence[Tensor]) -> int:
    if name == "convolution_backward":
        dy, x, weight = map(_size, args[:3])
        into_x, into_weight, into_bias = args[-1]
        return sum(needed * (dy + x + weight) for needed in (into_x, into_weight)) + into_bias * dy
    if name.endswith("batch_norm_backward"):  # both passes read both
        return 2 * (_size(args[0]) + _size(args[1])) + sum(map(_size, writes))
    if name == "slice_backward":  # zeros, then the slice
        return sum(map(_size, writes)) + 2 * sum(map(_size, reads))
    again = (_READS.get(name, 1) - 1) * (_size(reads[0]) if reads else 0)
    return sum(map(_size, [*reads, *writes])) + again


def _size(tensor: Tensor) -> int:
    """Bytes that a tensor takes in memory: what an expanded one repeats counts once."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0]
    return math.prod(sizes) * tensor.element_size()


class _Kernel:
    """A compiled Triton kernel that does nothing but say that it was launched."""

    function = 0
    packed_metadata = (4, 1, 0)

    def __init__(self, name: str, launched: Callable[[str, int, Sequence[Any]], None]) -> None:
        self.name, self._launched = name, launched

    def launch_metadata(self, *arguments: Any) -> None:
        return None

    def run(self, grid_0: int, grid_1: int, grid_2: int, stream: int, *arguments: Any) -> None:
        self._launched(self.name, grid_2, arguments)

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *arguments: self.run(*grid, 0, *arguments)


@contextlib.contextmanager
def _triton_without_driver(launched: Callable[[str, int, Sequence[Any]], None]) -> Iterator[None]:
    """Within it, Triton runs up to the point where it would compile a kernel, or call the driver with a compiled one."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=0: 0,
    )

    functions: list[Any] = []

    def compiled(function: Any, key: Any, signature: Any, device: int, *rest: Any) -> _Kernel:
        functions.append(function)
        kernel = function.device_caches[device][0][key] = _Kernel(function.__name__, launched)
        return kernel

    active = triton.runtime.driver
    before, active._active = active._active, driver
    try:
        with mock.patch.object(JITFunction, "_do_compile", compiled):
            yield
    finally:
        active._active = before
        forget()
        for function in functions:
            function.device_caches.clear()


# Functions rather than mocks, whose calls would take longer than what is measured.
def _no_device(tensor: Tensor) -> contextlib.nullcontext[None]:
    return contextlib.nullcontext()


def _capability(device: Any = None) -> tuple[int, int]:
    return 9, 0


def _yes(x: Any) -> bool:
    return True


@contextlib.contextmanager
def _cuda_without_card() -> Iterator[None]:
    """Within it, what asks PyTorch for a CUDA device hears of one like an H100; no convolution is measured."""
    sgd = sys.modules[torch.optim.SGD.__module__]
    patches: list[Any] = [
        mock.patch.object(Tensor, "is_cuda", True, create=True),
        mock.patch.object(torch.cuda, "device_of", _no_device),
        mock.patch.object(torch.cuda, "get_device_capability", _capability),
        mock.patch.object(sgd, "_default_to_fused_or_foreach", return_value=(False, True)),
        mock.patch.object(act, "runs_direct", _yes),
        mock.patch.object(streams, "runs_direct", _yes),
        fixed_choice("split"),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def counted(case: Case, networks: Sequence[nn.Module]) -> Counts:
    """Counts a training step: the third, when optimizers have their state.

    Args:
        case: the task, on the CPU.
        networks: what is trained; their tensors become fake ones.
    """
    counts = Counts()

    def launched(name: str, streams: int, arguments: Sequence[Any]) -> None:
        # The kernels of BatchNorm are given the first tensor of each that has several streams.
        sizes = [_size(t) * (streams if t.dim() > 2 else 1) for t in arguments if isinstance(t, Tensor)]
        counts.add(name, 1, sum(sizes))

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for network in networks:
        _fake(network, mode)
    # Slices of one tensor lie as far apart as they do.
    address = mock.patch.object(FakeTensor, "data_ptr", lambda t: 256 + t.storage_offset() * t.element_size())
    with _cuda_without_card(), _triton_without_driver(launched), address, mode:
        step = Step(case, networks)
        for _ in range(2):
            step()
        counts.kernels.clear()
        counts.moved.clear()
        with _Operations(counts):
            step()
    return counts


def _fake(network: nn.Module, mode: FakeTensorMode) -> None:
    """Turns a network's tensors into fake ones, in place."""
    made: dict[int, Tensor] = {}

    def twin(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with mode:
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                made[id(tensor)] = nn.Parameter(fake) if isinstance(tensor, nn.Parameter) else fake
        return made[id(tensor)]

    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: twin(t) for name, t in tensors.items() if t is not None})  # type: ignore[misc]


@contextlib.contextmanager
def pretending() -> Iterator[None]:
    """Within it, CPU tensors say that they are CUDA tensors, and Triton launches nothing."""
    with _cuda_without_card(), _triton_without_driver(lambda name, streams, arguments: None):
        yield

"""Operations and memory traffic of a training step, layer by layer: what the hardware can't go below.

Each convolution, linear layer and BatchNorm of T networks side by side is counted in the form that moves least: every tensor
read or written once per pass over it, with everything elementwise fused. For BatchNorm + activation + gate that is two passes
forward (statistics; read and write) and two backward (sums; gradient). A residual block's last BatchNorm also reads the
shortcut, writes its gradient, and reads two gradients where the output has two readers. Where a max-pooling follows the first
BatchNorm, the unpooled activation is never written. A step is bounded by
``sum over layers of max(operations / rate, bytes / bandwidth)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import NETWORKS, Case

_SGD_PASSES = 5  # reads weight, gradient and momentum, writes weight and momentum


@dataclass(frozen=True)
class Work:
    """One pass over one layer.

    Attributes:
        layer: the layer's name and the pass: forward, dgrad, wgrad, norm, update.
        flops: multiplications and additions.
        bytes: read and written.
    """

    layer: str
    flops: float
    bytes: float


@dataclass(frozen=True)
class Ceilings:
    """What a machine can do, as measured.

    Attributes:
        flops: matrix multiplication, operations per second.
        bandwidth: copying, bytes read and written per second.
        cache: bytes of the last cache; passes over less are not held to the bandwidth.
    """

    flops: float
    bandwidth: float
    cache: int = 0

    def seconds(self, works: list[Work]) -> float:
        """The least time for some passes."""
        return sum(self._seconds(work) for work in works)

    def _seconds(self, work: Work) -> float:
        return max(work.flops / self.flops, work.bytes / self.bandwidth if work.bytes > self.cache else 0.0)


def step_work(case: Case, dense: bool) -> list[Work]:
    """All passes of one training step of T networks.

    Args:
        case: the task.
        dense: whether hidden layers connect every network's channels with every other's, or are block-diagonal.
    """
    size = 4 if case.precision == "fp32" else 2
    works: list[Work] = []
    weights = 0
    for name, module, x, y in _calls(case):
        if isinstance(module, nn.BatchNorm2d):
            works.append(Work(f"{name} norm", 0, _norm_passes(name, case) * size * y.numel() * case.teachers))
        else:
            works += _layer_work(name, module, case, x, y, size, dense)
            weights += module.weight.numel() * case.teachers ** (2 if dense else 1)
    works.append(Work("update", 0, _SGD_PASSES * 4 * weights))
    return works


def _calls(case: Case) -> Iterator[tuple[str, Any, torch.Size, torch.Size]]:
    """The layers of one network with the shapes that they read and write, found without computing anything."""
    with torch.device("meta"):
        network = NETWORKS[case.network]()
        calls: list[tuple[str, Any, torch.Size, torch.Size]] = []

        def record(name: str) -> Any:
            def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
                calls.append((name, module, inputs[0].shape, output.shape))

            return hook

        for name, module in network.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
                module.register_forward_hook(record(name))
        network(torch.empty(case.shape))
    yield from calls


def _layer_work(
    name: str, module: Any, case: Case, x: torch.Size, y: torch.Size, size: int, dense: bool
) -> Iterator[Work]:
    """Forward, gradient of the input, gradient of the weight."""
    t = case.teachers
    first = module.weight.shape[1] == x[1] and x == torch.Size(case.shape)
    last = name == ("fc" if case.network.startswith("resnet") else "fc3" if case.network == "lenet" else "output")
    blocks = t if first or last or not dense else t * t
    positions = y.numel() // y[1]
    flops = 2 * blocks * positions * module.weight.numel()
    weight = size * blocks * module.weight.numel()
    outputs = size * y.numel() * (1 if last else t)
    inputs = size * x.numel() * (1 if first else t)
    reads = inputs
    if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
        reads = inputs // (module.stride[0] * module.stride[1])  # the pixels between are never looked at
    yield Work(f"{name} forward", flops, reads + weight + outputs)
    if not first:
        yield Work(f"{name} dgrad", flops, inputs + weight + outputs)
    yield Work(f"{name} wgrad", flops, reads + weight + outputs)


def _norm_passes(name: str, case: Case) -> float:
    """How many times a BatchNorm with what follows it moves its tensor, forward and backward."""
    if name == "bn1" and case.network in ("resnet18", "resnet50"):
        # Read; read and write; read both; read both and write. Behind the pooling the tensor is a quarter.
        return 1 + (1 + 1 / 4) + (1 + 1 / 4) + (1 + 1 / 4 + 1)
    ends_block = name.count(".") == 2 and name.endswith("bn3" if case.network == "resnet50" else "bn2")
    return 1 + 2 + 2 + 3 + (4 if ends_block else 0)

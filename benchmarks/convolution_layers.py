"""Layers of ResNet-18 and ResNet-50 at 224 pixels and of ResNet-20 at 32, as the benchmarks of convolutions take them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from fastmerge.kernels.block_conv.choice import Run, device_milliseconds, run_beside_each_other
from fastmerge.kernels.block_conv.formulas import Geometry, fetches_boxes
from fastmerge.kernels.block_conv.layouts import empty_laid_out
from torch import Tensor

from benchmarks.race import Contender, UnavailableError

TEACHERS = 2
PASSES = ("forward", "input gradient", "weight gradient")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}


@dataclass(frozen=True)
class Layer:
    """One network's convolution: channels in and out, kernel, stride, and the side of its input, for a batch."""

    network: str
    batch: int
    channels: int
    outputs: int
    kernel: int
    stride: int
    side: int

    @property
    def name(self) -> str:
        return f"{self.network} {self.channels}-{self.outputs} k{self.kernel} s{self.stride} {self.side}px batch {self.batch}"

    @property
    def flops(self) -> int:
        """Of a pass, all teachers together: each of the three has as many."""
        products = self.channels * self.outputs * self.kernel**2
        return 2 * TEACHERS * self.batch * math.prod(self.output) * products

    @property
    def geometry(self) -> Geometry:
        padding = self.kernel // 2
        return Geometry((self.kernel, self.kernel), (self.stride, self.stride), (padding, padding))

    @property
    def output(self) -> tuple[int, int]:
        return self.geometry.output_size(self.side, self.side)


LAYERS = [
    Layer("resnet18", 256, 64, 64, 3, 1, 56),
    Layer("resnet18", 256, 128, 128, 3, 1, 28),
    Layer("resnet18", 256, 256, 256, 3, 1, 14),
    Layer("resnet18", 256, 512, 512, 3, 1, 7),
    Layer("resnet18", 256, 64, 128, 3, 2, 56),
    Layer("resnet18", 256, 128, 256, 3, 2, 28),
    Layer("resnet18", 256, 256, 512, 3, 2, 14),
    Layer("resnet18", 256, 64, 128, 1, 2, 56),
    Layer("resnet18", 256, 128, 256, 1, 2, 28),
    Layer("resnet18", 256, 256, 512, 1, 2, 14),
    Layer("resnet20", 128, 16, 16, 3, 1, 32),
    Layer("resnet20", 128, 32, 32, 3, 1, 16),
    Layer("resnet20", 128, 64, 64, 3, 1, 8),
    Layer("resnet20", 128, 16, 32, 3, 2, 32),
    Layer("resnet20", 128, 32, 64, 3, 2, 16),
    Layer("resnet50", 256, 128, 128, 3, 2, 56),
    Layer("resnet50", 256, 256, 256, 3, 2, 28),
    Layer("resnet50", 256, 512, 512, 3, 2, 14),
    Layer("resnet50", 256, 64, 64, 1, 1, 56),
    Layer("resnet50", 256, 64, 256, 1, 1, 56),
    Layer("resnet50", 256, 256, 64, 1, 1, 56),
    Layer("resnet50", 256, 512, 128, 1, 1, 28),
    Layer("resnet50", 256, 1024, 256, 1, 1, 14),
    Layer("resnet50", 256, 512, 2048, 1, 1, 7),
]


def random(size: tuple[int, ...], dtype: torch.dtype, device: str, channels_last: bool = True) -> Tensor:
    """Normal random numbers (N, C, H, W)."""
    return empty_laid_out(torch.empty((), dtype=dtype, device=device), size, channels_last).normal_()


def timed_contender(candidates: Mapping[str, Run], implementation: str, flops: int) -> Contender:
    """A candidate, or of Triton's the tile that is fastest here, with its time on the device among its facts.

    Raises:
        UnavailableError: for Triton on a device without tensor descriptors.
    """
    facts: dict[str, Any] = {"flops": flops}
    if implementation == "triton":
        if not fetches_boxes(torch.device("cuda")):
            raise UnavailableError("needs compute capability 9.0")
        tiles = {name: run for name, run in candidates.items() if name.startswith("triton")}
        run_beside_each_other(list(tiles.values()))
        facts["tiles"] = times = {name: device_milliseconds(run) for name, run in tiles.items()}
        facts["tile"] = implementation = min(times, key=times.__getitem__)
    run = candidates[implementation]
    facts["device_ms"] = device_milliseconds(run)
    return Contender(run, facts)

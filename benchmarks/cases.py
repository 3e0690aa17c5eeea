"""What is trained in the benchmarks: a network, a size of image, a batch, a precision, a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmerge.networks import LeNet, SineMLP, resnet20

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from torchvision import models

        return models.get_model(name, weights=None)

    return make


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": _torchvision("resnet18"),
    "resnet50": _torchvision("resnet50"),
    "resnet20": resnet20,
    "lenet": LeNet,
    "sine": SineMLP,
}


@dataclass(frozen=True)
class Case:
    """One training task.

    Attributes:
        network: a name of ``NETWORKS``.
        batch: samples of a step.
        side: of the images, in pixels; 0 where the input is one number.
        precision: of autocast; "fp32" for none.
        device: "cpu" or "cuda".
        teachers: T.
    """

    network: str
    batch: int
    side: int
    precision: str = "fp32"
    device: str = "cpu"
    teachers: int = 2

    @property
    def name(self) -> str:
        """Such as ``resnet18 224px batch 256 bf16 cuda``: what names the case in JSON, tables and targets."""
        image = f" {self.side}px" if self.side else ""
        return f"{self.network}{image} batch {self.batch} {self.precision} {self.device}"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the input, batch first."""
        return (self.batch, 3, self.side, self.side) if self.side else (self.batch, 1)

    def make_teachers(self) -> list[nn.Module]:
        """T networks in training mode, channels-last, on the device, the same in every call."""
        with torch.random.fork_rng([] if self.device == "cpu" else None):
            torch.manual_seed(0)
            networks = [NETWORKS[self.network]().train() for _ in range(self.teachers)]
        return [self.place(network) for network in networks]

    def place(self, network: nn.Module) -> Any:
        """Moves a network to the device, its convolutions channels-last."""
        return network.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def make_batch(self) -> tuple[Tensor, Tensor]:
        """Random inputs and targets: class indices, or numbers for the sine."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.shape, generator=generator)
        if not self.side:
            return x.to(self.device), torch.randn(self.batch, 1, generator=generator).to(self.device)
        target = torch.randint(10, (self.batch,), generator=generator)
        return x.to(self.device, memory_format=torch.channels_last), target.to(self.device)

    def criterion(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) if self.side else F.mse_loss(output, target)


CASES = [
    Case("resnet18", 256, 224, "bf16", "cuda"),
    Case("resnet20", 128, 32, "bf16", "cuda"),
    Case("resnet18", 256, 224, "fp16", "cuda"),
    Case("resnet50", 256, 224, "bf16", "cuda"),
    Case("resnet20", 512, 32, "bf16", "cuda"),
    Case("lenet", 128, 28, "bf16", "cuda"),
    Case("sine", 32, 0, "fp32", "cuda"),
    Case("resnet50", 256, 224, "fp16", "cuda"),
    Case("resnet20", 128, 32),
    Case("resnet18", 16, 64),
    Case("lenet", 128, 28),
    Case("sine", 32, 0),
]

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def parameters(cases: list[Case]) -> list[Any]:
    """The cases as pytest's parameters; those of a GPU are marked, and skipped where there is none."""
    return [pytest.param(c, id=c.name.replace(" ", "-"), marks=needs_gpu if c.device == "cuda" else []) for c in cases]

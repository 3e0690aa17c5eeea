"""The big student as the paper's authors write it: a network of doubled layers with an elementwise gate per channel group.

Convolutions, BatchNorms and linear layers are PyTorch's own at T times the width; every group draws its gates, for each sample
and channel, where the step begins, and multiplies the tensor that the next layer reads. One class per architecture.

Source: Pašen & Boža, "Merging of neural networks", section 2, and the code that goes with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines.plain_gates import PlainGate, gated
from benchmarks.baselines.stacking import stack
from fastmerge.networks import LeNet, SineMLP


class NaiveDense(nn.Module, ABC):
    """T teachers as one gated network of plain layers.

    Args:
        teachers: networks of the one architecture that a subclass is for.
        grouped: convolutions with ``groups=T`` in place of dense ones.

    Attributes:
        gates: one :class:`PlainGate` per channel group, under the names that BigStudent has for the groups.
    """

    def __init__(self, teachers: Sequence[nn.Module], grouped: bool = False) -> None:
        super().__init__()
        self.num_teachers = len(teachers)
        self.network = stack(teachers, grouped)
        sizes = self.group_sizes(teachers[0])
        self.gates = nn.ModuleDict({name: PlainGate(self.num_teachers * size) for name, size in sizes.items()})
        self.gates.to(next(teachers[0].parameters()))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, {name: self._gate(name).draw(len(x)) for name in self.gates})

    def gate_loss(self) -> Tensor:
        """``sum over groups of (1/T - mean of P[g > 0])²``."""
        losses = [(1 / self.num_teachers - self._gate(name).open_probability().mean()) ** 2 for name in self.gates]
        return torch.stack(losses).sum()

    def weight_parameters(self) -> Iterator[nn.Parameter]:
        return self.network.parameters()

    def gate_parameters(self) -> Iterator[nn.Parameter]:
        return self.gates.parameters()

    def _gate(self, name: str) -> PlainGate:
        gate = self.gates[name]
        assert isinstance(gate, PlainGate)
        return gate

    @staticmethod
    @abstractmethod
    def group_sizes(teacher: Any) -> dict[str, int]:
        """Channels of each group of one teacher."""

    @abstractmethod
    def run(self, x: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        """The forward, each group's gates given."""


class NaiveResNet(NaiveDense):
    """For torchvision's ResNets and :class:`~fastmerge.networks.ResNetCifar`.

    A stage's residual stream is one group: the same gates after each of its blocks, and after the stem where the first
    stage takes its channels over.
    """

    @staticmethod
    def group_sizes(teacher: Any) -> dict[str, int]:
        sizes = {"conv1": teacher.conv1.out_channels}
        for stage, blocks in _stages(teacher):
            for index, block in enumerate(blocks):
                *inner, last = _convolutions(block)
                names = [f"conv{number}" for number in range(1, len(inner) + 1)]
                sizes |= {f"{stage}_{index}_{n}": c.out_channels for n, c in zip(names, inner, strict=True)}
                if block.downsample is not None:
                    sizes[f"{stage}_{index}_conv{len(inner) + 1}"] = last.out_channels
        return sizes

    def run(self, x: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        network, stream = self.network, "conv1"
        x = network.relu(network.bn1(network.conv1(x)))
        if hasattr(network, "maxpool"):
            x = network.maxpool(x)
        x = gated(x, gates[stream])
        for stage, blocks in _stages(network):
            for index, block in enumerate(blocks):
                convolutions = _convolutions(block)
                out, identity = x, x
                for number, convolution in enumerate(convolutions, start=1):
                    out = getattr(block, f"bn{number}")(convolution(out))
                    if number < len(convolutions):
                        out = gated(block.relu(out), gates[f"{stage}_{index}_conv{number}"])
                if block.downsample is not None:
                    identity, stream = block.downsample(x), f"{stage}_{index}_conv{len(convolutions)}"
                out += identity
                x = block.relu(out)
                if block is not last_block(network):
                    x = gated(x, gates[stream])
        return network.fc(gated(network.avgpool(x).flatten(1), gates[stream]))


class NaiveLeNet(NaiveDense):
    """For :class:`~fastmerge.networks.LeNet`."""

    @staticmethod
    def group_sizes(teacher: Any) -> dict[str, int]:
        sizes = {name: getattr(teacher, name).out_channels for name in ("conv1", "conv2")}
        return sizes | {name: getattr(teacher, name).out_features for name in ("fc1", "fc2")}

    def run(self, x: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        network = self.network
        x = gated(F.max_pool2d(F.relu(network.conv1(x)), 2), gates["conv1"])
        x = gated(F.max_pool2d(F.relu(network.conv2(x)), 2), gates["conv2"])
        x = gated(F.relu(network.fc1(x.flatten(1))), gates["fc1"])
        x = gated(F.relu(network.fc2(x)), gates["fc2"])
        return network.fc3(x)


class NaiveSineMLP(NaiveDense):
    """For :class:`~fastmerge.networks.SineMLP`."""

    @staticmethod
    def group_sizes(teacher: Any) -> dict[str, int]:
        return {"hidden": teacher.hidden.out_features}

    def run(self, x: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        hidden = self.network.activation(self.network.hidden(x))
        return self.network.output(gated(hidden, gates["hidden"]))


def naive_dense(teachers: Sequence[nn.Module], grouped: bool = False) -> NaiveDense:
    """The naive network of some teachers."""
    kinds: dict[type[nn.Module], type[NaiveDense]] = {LeNet: NaiveLeNet, SineMLP: NaiveSineMLP}
    return kinds.get(type(teachers[0]), NaiveResNet)(teachers, grouped)


def last_block(network: Any) -> nn.Module:
    """The block before the average pooling: its gate goes on the pooled tensor, which is smaller."""
    return _stages(network)[-1][1][-1]


def _stages(network: Any) -> list[tuple[str, Any]]:
    return [
        (name, getattr(network, name)) for name in ("layer1", "layer2", "layer3", "layer4") if hasattr(network, name)
    ]


def _convolutions(block: Any) -> list[nn.Conv2d]:
    return [getattr(block, name) for name in ("conv1", "conv2", "conv3") if hasattr(block, name)]

"""Networks nobody would draw: random programs of layers, sums, products, concatenations, splits and shuffles."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RARE = "group depthwise mul cat chunk shuffle excite pad glu group_norm flip input scale twice softmax border mask"
OPERATIONS = {"conv": 3, "act": 3, "norm": 2, "pool": 2, "add": 2} | dict.fromkeys(RARE.split(), 1)
ACTIVATIONS = [F.relu, torch.tanh, F.silu, F.hardswish, F.relu6, torch.sigmoid]


class RandomNetwork(nn.Module):
    """A network whose structure follows from a seed alone.

    Args:
        seed: of the structure; parameters come from torch's generator.
        length: number of operations before the head.
    """

    def __init__(self, seed: int, length: int = 12) -> None:
        super().__init__()
        self.rng = random.Random(seed)
        self.layers = nn.ModuleDict()
        self.program: list[tuple[str, tuple[int, ...], str, object]] = []  # operation, sources, layer, option
        self.widths = [3]
        self._add("conv", (0,), 6)
        while len(self.program) < length:
            self._grow()
        self.head_reads = [i for i in range(1, len(self.widths)) if i >= len(self.widths) - 3]
        self.head = nn.Linear(sum(self.widths[i] for i in self.head_reads), 4)
        del self.rng

    def _grow(self) -> None:
        rng = self.rng
        i = rng.choice(range(max(1, len(self.widths) - 4), len(self.widths)))
        width = self.widths[i]
        same = [j for j in range(1, len(self.widths)) if self.widths[j] == width and j != i]
        (name,) = rng.choices(list(OPERATIONS), list(OPERATIONS.values()))
        if name == "conv":
            self._add("conv", (i,), rng.choice([3, 4, 5, 6, 8]))
        elif name == "group" and width % 2 == 0:
            self._add("conv", (i,), rng.choice([4, 6, 8]), groups=2)
        elif name == "depthwise":
            self._add("conv", (i,), width * rng.choice([1, 1, 2]), groups=width)
        elif name == "twice":
            self._add("twice", (i,), width)
        elif name in ("add", "mul") and same:
            self._add(name, (i, rng.choice(same)), width)
        elif name == "cat":
            self._add("cat", (i, rng.choice(range(len(self.widths)))), None)
        elif name in ("chunk", "shuffle", "glu") and width % 2 == 0:
            self._add(name, (i,), width // 2 if name in ("chunk", "glu") else width, option=rng.choice([0, 1]))
        elif name == "pad":
            self._add("pad", (i,), width + 2)
        elif name == "group_norm" and width % 2 == 0:
            self._add("group_norm", (i,), width)
        elif name in ("norm", "act", "pool", "excite", "flip", "scale", "softmax", "border", "mask"):
            self._add(name, (i,), width, option=rng.randrange(6))
        elif name == "input" and width == 3:
            self._add("add", (i, 0), width)

    def _add(
        self, name: str, sources: tuple[int, ...], width: int | None, groups: int = 1, option: object = None
    ) -> None:
        if width is None:
            width = sum(self.widths[i] for i in sources)
        before, key = self.widths[sources[0]], f"{name}{len(self.program)}"
        bias = self.rng.random() < 0.5
        if name == "conv":
            kernel = self.rng.choice([1, 3])
            self.layers[key] = nn.Conv2d(before, width, kernel, padding=kernel // 2, groups=groups, bias=bias)
        elif name == "twice":
            self.layers[key] = nn.Conv2d(before, width, 3, padding=1, bias=bias)
        elif name == "norm":
            self.layers[key] = nn.BatchNorm2d(width, affine=bias)
        elif name == "group_norm":
            self.layers[key] = nn.GroupNorm(2, width)
        elif name == "excite":
            self.layers[key] = nn.Sequential(nn.Conv2d(width, 3, 1), nn.ReLU(), nn.Conv2d(3, width, 1), nn.Sigmoid())
        elif name == "scale":
            self.layers[key] = nn.PReLU(width)
        self.program.append((name, sources, key, option))
        self.widths.append(width)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for name, sources, key, option in self.program:
            values.append(self._run(name, [values[i] for i in sources], key, option))
        return self.head(torch.cat([values[i].mean((2, 3)) for i in self.head_reads], 1))

    def _run(self, name: str, xs: list[Tensor], key: str, option: object) -> Tensor:
        x = xs[0]
        if name in ("conv", "norm", "group_norm", "scale"):
            return self.layers[key](x)
        if name == "twice":
            return self.layers[key](torch.tanh(self.layers[key](x)))
        if name == "act":
            return ACTIVATIONS[option](x)
        if name == "pool":
            pool = (F.max_pool2d, F.avg_pool2d)[option % 2]
            return pool(x, 3, 1, 1)
        if name == "add":
            return x + xs[1]
        if name == "mul":
            return x * torch.sigmoid(xs[1])
        if name == "cat":
            return torch.cat(xs, 1)
        if name == "chunk":
            return x.chunk(2, 1)[option]
        if name == "glu":
            return F.glu(x, 1)
        if name == "shuffle":
            return F.channel_shuffle(x, 2)
        if name == "pad":
            return F.pad(x, (0, 0, 0, 0, 1, 1))
        if name == "flip":
            return x.flip(1)
        if name == "softmax":
            return x.softmax(1)
        if name == "border":
            return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), value=0.1 * option), 3, 1)
        if name == "mask":
            return x * torch.sigmoid(x.mean(1, keepdim=True))
        assert name == "excite"
        return x * self.layers[key](F.adaptive_avg_pool2d(x, 1))

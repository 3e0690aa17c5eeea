"""Images that can be learned, made or read on the spot, and batches of them in an order that a seed fixes.

LeNet's are scikit-learn's digits, enlarged and repeated in each colour: 1,200 to train on, 597 to test on. Those of other
networks are made: one of ten coarse patterns of random colours, under noise that is as coarse, so that a network learns them
but makes mistakes, whatever their size, and a little noise of each pixel.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from fastmerge.data.dataset import load_digits

CLASSES = 10
_CELLS = 4  # squares of a pattern along a side
_COARSE, _FINE = 1.5, 0.5  # standard deviations of the noise of squares and of pixels; that of the patterns is 1


@dataclass(frozen=True)
class Images:
    """Labelled images on a device.

    Attributes:
        pixels: (N, H, W, C), so that the images of a batch are channels-last.
        labels: int64 (N,).
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Some of them: (n, C, H, W) channels-last, and (n,)."""
        return self.pixels[index].movedim(3, 1), self.labels[index]


def images_of(case: Case, train: int, test: int) -> tuple[Images, Images]:
    """Images for a case, always the same: to train on and to test on.

    Args:
        case: the network, the images' side, the device.
        train, test: how many; of the digits, at most.
    """
    if case.network == "lenet":
        digits = load_digits()
        parts = [(digits.train_images, digits.train_labels, train), (digits.test_images, digits.test_labels, test)]
        return tuple(_enlarged(case, torch.from_numpy(x[:n]), torch.from_numpy(y[:n])) for x, y, n in parts)  # type: ignore[return-value]
    generator = torch.Generator(case.device).manual_seed(0)
    patterns = torch.randn(CLASSES, 3, _CELLS, _CELLS, generator=generator, device=case.device)
    return _made(case, patterns, train, generator), _made(case, patterns, test, generator)


def _enlarged(case: Case, images: Tensor, labels: Tensor) -> Images:
    x = images.to(case.device).movedim(3, 1).float() / 120 - 1
    x = F.interpolate(x, size=(case.side, case.side), mode="bilinear", align_corners=False)
    return Images(x.expand(-1, 3, -1, -1).movedim(1, 3).contiguous(), labels.to(case.device))


def _made(case: Case, patterns: Tensor, count: int, generator: torch.Generator) -> Images:
    """In float16 where the network computes in halves, as large images take memory."""
    device, dtype = case.device, torch.float32 if case.precision == "fp32" else torch.float16
    labels = torch.randint(CLASSES, (count,), generator=generator, device=device)
    shown = torch.empty(count, case.side, case.side, 3, dtype=dtype, device=device)
    for part in torch.arange(count, device=device).split(256):
        squares = patterns[labels[part]]
        squares = squares + _COARSE * torch.randn(squares.shape, generator=generator, device=device)
        x = F.interpolate(squares, size=(case.side, case.side), mode="nearest")
        x += _FINE * torch.randn(x.shape, generator=generator, device=device)
        shown[part] = x.movedim(1, 3).to(dtype)
    return Images(shown, labels)


class TimedBatches:
    """Passes over images in an order that the seed fixes, each step timed: from one batch to the next, on the device.

    Args:
        images: what is gone through.
        batch: images in a batch; what is left over of a pass is left out.
        seed: of the order, another one in each whole pass.

    Attributes:
        seconds: of each whole pass so far, the median of its steps, to which what happens but once in a pass adds nothing.
    """

    def __init__(self, images: Images, batch: int, seed: int) -> None:
        self.images, self.size, self.seed = images, batch, seed
        self.seconds: list[float] = []

    def __len__(self) -> int:
        return len(self.images) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        marks = []
        generator = torch.Generator().manual_seed(1_000 * self.seed + len(self.seconds))
        order = torch.randperm(len(self.images), generator=generator).to(self.images.labels.device)
        for index in order.split(self.size)[: len(self)]:
            marks.append(self._now())
            yield self.images.batch(index)
        marks.append(self._now())
        self.seconds.append(statistics.median(self._between(a, b) for a, b in pairwise(marks)))

    def _now(self) -> Any:
        if not self.images.labels.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        if not self.images.labels.is_cuda:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

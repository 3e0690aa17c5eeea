"""Images that stay on the device: a batch is one gather and one normalisation, with no Python per image."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastmerge.data.augmentation import Augmentation, cut_windows, draw_changes, jitter_colours
from fastmerge.data.epochs import Batches, EpochLoader


class Finish:
    """From uint8 images of the final size to what networks read.

    Args:
        mean, std: Of each channel, for values of 0..255.
        dtype: float32, float16 or bfloat16.
        channels_last: The memory format of the batches, whose shape is (N, C, H, W) either way.
        device: Where.
    """

    def __init__(
        self,
        mean: NDArray[np.float64],
        std: NDArray[np.float64],
        dtype: torch.dtype,
        channels_last: bool,
        device: torch.device,
    ) -> None:
        self.mean = torch.from_numpy(mean).float().to(device)
        self.scale = torch.from_numpy(1 / std).float().to(device)
        self.dtype, self.channels_last, self.device = dtype, channels_last, device

    def __call__(self, images: Tensor) -> Tensor:
        """Normalises uint8 images (N, H, W, C) and gives them the shape (N, C, H, W)."""
        # Whole rows at once: on a CPU, loops over three channels take ten times as long.
        rows = images.flatten(2).float()
        rows.sub_(self.mean.repeat(images.shape[2])).mul_(self.scale.repeat(images.shape[2]))
        normal = rows.to(self.dtype).view(images.shape).permute(0, 3, 1, 2)
        return normal if self.channels_last else normal.contiguous()


class DeviceLoader(EpochLoader):
    """Batches from images on a device.

    Args:
        images: uint8 (N, H, W, C), already there.
        labels: int64 (N,), already there.
        batches: Which samples make which batch.
        augmentation: Random changes, or None. It may not need larger images than these.
        finish: Normalisation.
        good: bool (N,), which images could be read; the others are left out of their batches. None is all.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batches: Batches,
        augmentation: Augmentation | None,
        finish: Finish,
        good: NDArray[np.bool_] | None = None,
    ) -> None:
        super().__init__(batches)
        self.height, self.width = images.shape[1:3]
        shift = 0 if augmentation is None else augmentation.shift
        self.images = F.pad(images, (0, 0, shift, shift, shift, shift)) if shift else images
        self.labels, self.augmentation, self.finish, self.good = labels, augmentation, finish, good

    def _read(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        parts = self._parts(epoch)
        if not parts:
            return
        order = np.concatenate(parts)
        if self.augmentation is None:
            changes, windows = None, torch.from_numpy(order)[None].to(self.images.device)
        else:
            changes = draw_changes(self.augmentation, self.batches.seed, epoch, order)
            windows = changes.windows(order).to(
                self.images.device
            )  # once an epoch, so that no batch waits for the host
        ends = np.cumsum([len(part) for part in parts])
        for end, part in zip(ends.tolist(), parts, strict=True):
            piece = slice(end - len(part), end)
            samples = windows[0, piece]
            if self.augmentation is None or changes is None:
                images = self.images[samples]
            else:
                images = cut_windows(self.images, windows[:, piece], self.height, self.width)
                images = jitter_colours(images, self.augmentation, changes.of(piece))
            yield self.finish(images), self.labels[samples]

    def _parts(self, epoch: int) -> list[NDArray[np.int64]]:
        """The samples of each batch, without those that could not be read."""
        parts = self.batches.of(epoch)
        if self.good is None:
            return parts
        left = [part[self.good[part]] for part in parts]
        return [part for part in left if not self.batches.leaves_out(len(part))]

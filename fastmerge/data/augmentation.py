"""Random changes of training images, on their device, each image its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def flip_and_shift(images: Tensor, generator: torch.Generator, shift: int = 2) -> Tensor:
    """Mirrors half of the images and shifts each by up to ``shift`` pixels in both directions.

    What a shift uncovers is zero.

    Args:
        images: (N, C, H, W), any dtype.
        generator: where the draws come from, on the images' device.
        shift: pixels, at least 0.

    Returns:
        (N, C, H, W), of the same dtype.
    """
    n, _, height, width = images.shape
    options = {"generator": generator, "device": images.device}
    mirrored = torch.rand(n, 1, **options) < 0.5  # type: ignore[call-overload]
    top, left = torch.randint(2 * shift + 1, (2, n, 1), **options)  # type: ignore[call-overload]
    columns = torch.arange(width, device=images.device).expand(n, width)
    columns = torch.where(mirrored, width - 1 - columns, columns) + left
    rows = torch.arange(height, device=images.device) + top
    padded = F.pad(images, (shift, shift, shift, shift))
    sample = torch.arange(n, device=images.device)
    # Indices (N, H, W) around the channel slice put the channels last.
    return padded[sample[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()
